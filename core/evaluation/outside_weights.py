"""How do three networks that are published for TensorFlow.js become ONNX files?

`python -m core.evaluation.outside_weights NPM MODELS`, run by `core/evaluation/outside_setup.py` in the judge's own
environment. A manifest lists tensors one after another in binary files, many of them in eight bits; the networks are
then written down layer by layer: faceres (a MobileNet, https://arxiv.org/abs/1704.04861, up to its 1,024 pooled
features), dlib's identity network (a ResNet of 29 layers) and face-api's 68 landmarks (dense blocks of separable
convolutions).
Inputs and features are NCHW inside the ONNX files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MEAN_COLOUR = (122.782, 117.001, 104.298)  # of dlib's and face-api's training images, RGB
OPSET = 17


def read_tensors(manifest: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, np.ndarray]:
    """Name -> float32 array of every tensor of a TensorFlow.js manifest, storage in 8 or 16 bits undone.

    Raises ValueError when the files hold more or less than the manifest says.
    """
    found = {}
    for group in manifest:
        blob, start = b"".join((folder / path).read_bytes() for path in group["paths"]), 0
        for entry in group["weights"]:
            stored = entry.get("quantization", {})
            kind = np.dtype(stored.get("dtype", entry["dtype"]))
            stop = start + kind.itemsize * int(np.prod(entry["shape"], dtype=np.int64))
            if stop > len(blob):
                raise ValueError(f"{folder}: {entry['name']} ends behind the end of its file")
            values = np.frombuffer(blob[start:stop], kind).astype(np.float32).reshape(entry["shape"])
            if "scale" in stored:
                values = values * np.float32(stored["scale"]) + np.float32(stored["min"])
            found[entry["name"]], start = values, stop
        if start != len(blob):
            raise ValueError(f"{folder}: {len(blob) - start} bytes that no tensor claims")
    return found


class Drawing:
    """An ONNX graph under construction; its input is the image `x`, and a tensor is known by its name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, values: Any, kind: Any = np.float32) -> str:
        """A constant tensor."""
        from onnx import numpy_helper

        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values, kind), name))
        return name

    def add(self, operation: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """One operation; returns the name of what it makes."""
        from onnx import helper

        name = name or f"tensor{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, list(inputs), [name], **attributes))
        return name

    def per_channel(self, operation: str, x: str, values: np.ndarray) -> str:
        return self.add(operation, x, self.constant(values.reshape(1, -1, 1, 1)))

    def convolve(self, x: str, filters: np.ndarray, stride: int, pad: str = "SAME_UPPER", each: bool = False) -> str:
        """A convolution by filters [h, w, in, out]; `each`: every channel for itself, [h, w, channels, 1]."""
        kernel = filters.transpose(2, 3, 0, 1) if each else filters.transpose(3, 2, 0, 1)
        return self.add("Conv", x, self.constant(kernel), strides=[stride, stride], auto_pad=pad,
                        group=len(kernel) if each else 1)  # fmt: skip

    def save(self, path: Path, side: int, outputs: Mapping[str, int]) -> None:
        """Check and write the graph; outputs: name -> rank."""
        import onnx
        from onnx import TensorProto, helper

        def value(name: str, shape: Sequence[Any]) -> Any:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        given = [value(name, ["n", *(f"{name}{i}" for i in range(1, rank))]) for name, rank in outputs.items()]
        graph = helper.make_graph(self.nodes, path.stem, [value("x", ["n", 3, side, side])], given, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, str(path))


def write_faceres(source: Path, path: Path) -> None:
    """MobileNet v1 to its pooled features; input 224 x 224 in BGR less ImageNet's mean colour."""
    known = json.loads(source.read_text(encoding="utf-8"))
    w, draw = read_tensors(known["weightsManifest"], source.parent), Drawing()
    nodes = {node["name"]: node for node in known["modelTopology"]["node"]}
    x = "x"
    for layer in ("conv1", *(f"conv_{kind}_{i}" for i in range(1, 14) for kind in ("dw", "pw"))):
        normed = f"{layer}_bn/batchnorm_1"
        # dense convolutions have taken in the scale of their normalisation and go by its name
        node = nodes.get(f"{layer}/depthwise") or nodes[f"{normed}/mul_1"]
        each, stride = "_dw_" in layer, int(node["attr"]["strides"]["list"]["i"][1])
        x = draw.convolve(x, w[node["input"][1]], stride, each=each)
        if f"{layer}/depthwise" in nodes:
            x = draw.per_channel("Mul", x, w[f"{normed}/mul"])
        x = draw.per_channel("Add", x, w[f"{normed}/sub"])
        x = draw.add("Clip", x, draw.constant(0.0), draw.constant(6.0))
    draw.add("ReduceMean", x, axes=[2, 3], keepdims=0, name="features")
    draw.save(path, 224, {"features": 2})


def _tensors_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    return read_tensors(json.loads((folder / f"{name}-weights_manifest.json").read_text(encoding="utf-8")), folder)


def write_landmarks(folder: Path, path: Path) -> None:
    """face-api's 68 landmarks, as shares of a face that fills 112 x 112 pixels."""
    w, draw = _tensors_of(folder, "face_landmark_68_model"), Drawing()

    def layer(x: str, name: str, stride: int) -> str:
        if f"{name}/filters" in w:
            x = draw.convolve(x, w[f"{name}/filters"], stride)
        else:
            x = draw.convolve(x, w[f"{name}/depthwise_filter"], stride, each=True)
            x = draw.convolve(x, w[f"{name}/pointwise_filter"], 1)
        return draw.per_channel("Add", x, w[f"{name}/bias"])

    x = draw.add("Div", draw.per_channel("Sub", "x", np.array(MEAN_COLOUR)), draw.constant(255.0))
    for block in range(4):
        first = draw.add("Relu", layer(x, f"dense{block}/conv0", 2))
        total = draw.add("Add", first, layer(first, f"dense{block}/conv1", 1))
        for place in (2, 3):
            total = draw.add("Add", total, layer(draw.add("Relu", total), f"dense{block}/conv{place}", 1))
        x = draw.add("Relu", total)
    x = draw.add("AveragePool", x, kernel_shape=[7, 7], strides=[2, 2], auto_pad="VALID")
    flat = draw.add("Reshape", draw.add("Transpose", x, perm=[0, 2, 3, 1]), draw.constant([0, -1], np.int64))
    draw.add("Add", draw.add("MatMul", flat, draw.constant(w["fc/weights"])), draw.constant(w["fc/bias"]), name="y")
    draw.save(path, 112, {"y": 2})


def write_identity(folder: Path, path: Path) -> None:
    """dlib's identity network: 128 numbers `y` of a 150 x 150 face chip, and its layers at 17 x 17 and 8 x 8."""
    w, draw = _tensors_of(folder, "face_recognition_model"), Drawing()

    def layer(x: str, name: str, stride: int, pad: str) -> str:
        x = draw.per_channel("Add", draw.convolve(x, w[f"{name}/conv/filters"], stride, pad), w[f"{name}/conv/bias"])
        x = draw.per_channel("Mul", x, w[f"{name}/scale/weights"])
        return draw.per_channel("Add", x, w[f"{name}/scale/biases"])

    def pad_to(x: str, channels: int = 0, cells: int = 0) -> str:
        return draw.add("Pad", x, draw.constant([0, 0, 0, 0, 0, channels, cells, cells], np.int64))

    x = draw.add("Div", draw.per_channel("Sub", "x", np.array(MEAN_COLOUR)), draw.constant(256.0))
    x = draw.add("Relu", layer(x, "conv32_down", 2, "VALID"))
    x = draw.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], auto_pad="VALID")
    cells, width = 35, 32
    blocks = "32_1 32_2 32_3 64_down 64_1 64_2 64_3 128_down 128_1 128_2 256_down 256_1 256_2 256_down_out"
    for block in blocks.split():
        down, name = "down" in block, f"conv{block}"
        y = draw.add("Relu", layer(x, f"{name}/conv1", 2 if down else 1, "VALID" if down else "SAME_UPPER"))
        y = layer(y, f"{name}/conv2", 1, "SAME_UPPER")
        if down:  # the short cut is halved by a mean, and empty channels or cells make the sizes meet
            x = draw.add("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2], auto_pad="VALID")
            inner, now = (cells - 3) // 2 + 1, w[f"{name}/conv2/conv/bias"].size
            y = pad_to(y, cells=cells // 2 - inner) if cells // 2 > inner else y
            x = pad_to(x, channels=now - width) if now > width else x
            cells, width = cells // 2, now
        x = draw.add("Relu", draw.add("Add", x, y), name={"64_3": "cells17", "128_2": "cells8"}.get(block))
    x = draw.add("ReduceMean", x, axes=[2, 3], keepdims=0)
    draw.add("MatMul", x, draw.constant(w["fc"]), name="y")
    draw.save(path, 150, {"y": 2, "cells17": 4, "cells8": 4})


def main(arguments: Sequence[str]) -> None:
    """Write all three; see the top of the file."""
    npm, models = (Path(argument) for argument in arguments)
    write_faceres(npm / "human-models" / "models" / "faceres.json", models / "faceres.onnx")
    write_landmarks(npm / "face-api" / "model", models / "landmark68.onnx")
    write_identity(npm / "face-api" / "model", models / "dlib128.onnx")


if __name__ == "__main__":
    main(sys.argv[1:])
