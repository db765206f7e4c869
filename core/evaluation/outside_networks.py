"""What do networks that others trained see in images of faces?

`python -m core.evaluation.outside_networks measure|identify PICTURES.npy OUT.npz`, run by
`core/evaluation/outside_judge.py` in the judge's own environment (`core/evaluation/outside_setup.py`), on one thread:
uint8 images [N, S, S, 3] in CelebA's window (eyes at 42 % of the height) become arrays of N rows. Three detectors
(BlazeFace, https://arxiv.org/abs/1907.05047; dlib's HOG; MTCNN's last network, https://arxiv.org/abs/1604.02878), three
landmarkers that know nothing of each other (MediaPipe's mesh, face-api's convolutions, dlib's regression trees), two
identity networks (dlib's, faceres). It judges nothing.

Every image gets a row: where no face is found, it is read at the place where CelebA has one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MODELS = Path(__file__).resolve().parents[2] / ".cache" / "outside" / "models"
FOUND = 0.5  # BlazeFace's score from which on a face counts as found
# of CelebA's window, as shares of the side: eyes (left to right in the image), nose and mouth; and BlazeFace's box
USUAL_POINTS = np.array([[0.375, 0.440], [0.620, 0.440], [0.496, 0.584], [0.495, 0.710]])
USUAL_BOX = np.array([0.197, 0.275, 0.795, 0.873])
# the 68 landmarks as a mirror exchanges them, and the mesh's points that are nearest to them
MIRROR = np.array([*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1), 45, 44, 43, 42, 47, 46,
                   39, 38, 37, 36, 41, 40, *range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), 67, 66, 65])
MESH = np.array([
    162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389, 71, 63, 105, 66, 107,
    336, 296, 334, 293, 301, 168, 197, 5, 4, 75, 97, 2, 326, 305, 33, 160, 158, 133, 153, 144, 362, 385, 387,
    263, 373, 380, 61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 82, 13, 312, 308, 317, 14, 87,
])  # fmt: skip
BGR_MEAN = np.array([103.939, 116.779, 123.68], np.float32)  # of ImageNet, as faceres was taught


# ------------------------------------------------------------------------------------------------------------- networks


@cache
def _onnx(name: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(MODELS / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])


def _run(name: str, x: np.ndarray, only: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """An ONNX network on a batch: output name -> array."""
    network = _onnx(name)
    names = list(only or (output.name for output in network.get_outputs()))
    given = {network.get_inputs()[0].name: np.ascontiguousarray(x, np.float32)}
    return dict(zip(names, network.run(names, given), strict=True))


@cache
def _lite(name: str) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    network = Interpreter(str(MODELS / f"{name}.tflite"), num_threads=1)
    network.allocate_tensors()
    return network


def _run_lite(name: str, x: np.ndarray) -> list[np.ndarray]:
    """A TensorFlow Lite network, one image after the other: its outputs, the largest first."""
    network = _lite(name)
    outputs = sorted(network.get_output_details(), key=lambda output: -int(np.prod(output["shape"])))
    rows = []
    for one in x:
        network.set_tensor(network.get_input_details()[0]["index"], np.ascontiguousarray(one[None], np.float32))
        network.invoke()
        rows.append([network.get_tensor(output["index"])[0].copy() for output in outputs])
    return [np.stack(column) for column in zip(*rows, strict=True)]


@cache
def _trees(points: int) -> Any:
    import dlib

    return dlib.shape_predictor(str(MODELS / f"shape_predictor_{points}_face_landmarks.dat"))


@cache
def _hog() -> Any:
    import dlib

    return dlib.get_frontal_face_detector()


# ------------------------------------------------------------------------------------------------------------- geometry


def _square(centre: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Boxes (left, top, right, bottom) [N, 4] of centres [N, 2] and sides [N, 1]."""
    return np.concatenate([centre - side / 2, centre + side / 2], 1)


def _middle(box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres [N, 2] and longer sides [N, 1] of boxes."""
    return (box[:, :2] + box[:, 2:]) / 2, (box[:, 2:] - box[:, :2]).max(-1, keepdims=True)


def cut(picture: np.ndarray, box: np.ndarray, size: int, angle: float = 0.0,
        resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:  # fmt: skip
    """What `box` shows, turned by `angle` (radians) about its middle, as `size` x `size` pixels."""
    (x, y), (width, height) = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    cos, sin = np.cos(angle), np.sin(angle)
    where = (cos * width / size, -sin * height / size, x - cos * width / 2 + sin * height / 2,
             sin * width / size, cos * height / size, y - sin * width / 2 - cos * height / 2)  # fmt: skip
    return np.asarray(Image.fromarray(picture).transform((size, size), Image.Transform.AFFINE, where, resample))


def put_back(points: np.ndarray, box: np.ndarray, size: int, angle: float = 0.0) -> np.ndarray:
    """Points in an image that `cut` made, in the pixels of the whole image."""
    middle, extent = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    off = (points / size - 0.5) * extent
    cos, sin = np.cos(angle), np.sin(angle)
    return middle + np.stack([cos * off[..., 0] - sin * off[..., 1], sin * off[..., 0] + cos * off[..., 1]], -1)


def _doubled(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    return np.asarray(Image.fromarray(picture).resize((2 * width, 2 * height), Image.Resampling.BICUBIC))


def _dlib_box(box: np.ndarray) -> Any:
    """BlazeFace's box as dlib's own detector would have drawn it."""
    import dlib

    side = 0.977 * (box[2:] - box[:2]).max()
    x, y = (box[:2] + box[2:]) / 2 - [0, 0.043 * side]
    return dlib.rectangle(*(round(float(v)) for v in (x - side / 2, y - side / 2, x + side / 2, y + side / 2)))


# ------------------------------------------------------------------------------------------------------------ detectors


@cache
def _anchors() -> np.ndarray:
    """BlazeFace's 896 anchors, as shares of the side [896, 2]."""
    grids = []
    for cells, each in ((16, 2), (8, 6)):
        places = (np.arange(cells) + 0.5) / cells
        grids.append(np.repeat(np.stack(np.meshgrid(places, places), -1).reshape(-1, 2), each, 0))
    return np.concatenate(grids)


def blaze(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """BlazeFace on whole images: scores [N], boxes [N, 4] and the points (eyes, nose, mouth) [N, 4, 2] in pixels; box
    and points are the usual ones where the score is below `FOUND`."""
    side = pictures.shape[1]
    whole = np.array([0.0, 0.0, side, side])
    seen = pictures if side == 128 else np.stack([cut(picture, whole, 128) for picture in pictures])
    regressed, logits = _run_lite("face_detection_short_range", seen / 127.5 - 1.0)
    scores = 1 / (1 + np.exp(-np.clip(logits[..., 0], -60, 60)))
    told = (regressed / 128).reshape(len(pictures), -1, 8, 2)  # centre, size, six points
    told[:, :, [0, 2, 3, 4, 5, 6, 7]] += _anchors()[:, None]
    best = scores.max(1)
    box, points = np.tile(USUAL_BOX * side, (len(pictures), 1)), np.tile(USUAL_POINTS * side, (len(pictures), 1, 1))
    for i in np.flatnonzero(best >= FOUND):
        top = told[i, scores[i].argmax()]
        near = np.abs(told[i, :, 0] - top[0]).max(-1) < 0.3 * top[1].max()
        weight = scores[i] * (near & (scores[i] > 0.5 * best[i]))
        mean = np.tensordot(weight / weight.sum(), told[i], 1) * side
        box[i] = np.concatenate([mean[0] - mean[1] / 2, mean[0] + mean[1] / 2])
        points[i] = mean[2:6]
    return best, box, points


def hog(pictures: np.ndarray) -> np.ndarray:
    """The best score of dlib's HOG detector, nearly without a threshold: photographs have 0.5 to 2; -1 where none."""
    return np.array([max([-1.0, *_hog().run(np.ascontiguousarray(one), 1, -1.0)[1]]) for one in pictures])


def mtcnn(pictures: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """MTCNN's last network on BlazeFace's boxes, corrected once by itself: probability [N], five points [N, 5, 2]."""
    centre, side = _middle(box)
    centre, side = centre - np.array([0, 0.06]) * side, side * 1.12
    for _ in range(2):
        window = _square(centre, side)
        pairs = zip(pictures, window, strict=True)
        crops = np.stack([cut(*pair, 48, resample=Image.Resampling.BILINEAR) for pair in pairs])
        made = _run("onet", ((crops - 127.5) / 128).swapaxes(1, 2)).values()  # it was taught with x before y
        by_width = {one.shape[1]: one for one in made}
        points = np.stack([by_width[10][:, :5], by_width[10][:, 5:]], -1) * side[..., None] + window[:, None, :2]
        centre, side = _middle(window + by_width[4] * side)
        side = side.clip(20, 160)
    return by_width[2][:, 1], points


# ------------------------------------------------------------------------------------------------------------ landmarks


def tree_landmarks(pictures: np.ndarray, box: np.ndarray) -> np.ndarray:
    """dlib's 68 landmarks [N, 68, 2], on images twice as large."""
    found = [_trees(68)(_doubled(one), _dlib_box(2 * where)).parts() for one, where in zip(pictures, box, strict=True)]
    return np.array([[(point.x / 2, point.y / 2) for point in parts] for parts in found])


def conv_landmarks(pictures: np.ndarray, box: np.ndarray) -> np.ndarray:
    """face-api's 68 landmarks [N, 68, 2]: without a shape to fall back on, which the trees have."""
    centre, side = _middle(box)
    centre, side = centre + np.array([0, 0.03]) * side, side * 1.2
    window = _square(centre, side)
    crops = np.stack([cut(*pair, 112) for pair in zip(pictures, window, strict=True)])
    shares = _run("landmark68", crops.transpose(0, 3, 1, 2))["y"].reshape(-1, 68, 2)
    return shares * side[:, None] + window[:, None, :2]


def mesh_landmarks(pictures: np.ndarray, box: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """MediaPipe's mesh [N, 468, 2], its window turned until the eyes are level, and its logit of a face [N]."""
    across = points[:, 1] - points[:, 0]
    centre, side = _middle(box)
    window, angle = _square(centre, side * 1.5), np.arctan2(across[:, 1], across[:, 0])
    crops = np.stack([cut(one, w, 192, a) for one, w, a in zip(pictures, window, angle, strict=True)])
    mesh, flag = _run_lite("face_landmark", crops / 255.0)
    flat = mesh.reshape(len(pictures), 468, 3)[..., :2]
    return np.stack([put_back(m, w, 192, a) for m, w, a in zip(flat, window, angle, strict=True)]), flag.reshape(-1)


# ------------------------------------------------------------------------------------------------------------- identity


def _chips(pictures: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Faces as dlib cuts them, by its five points: float32 [N, 3, 150, 150]."""
    import dlib

    chips = []
    for picture, where in zip(pictures, box, strict=True):
        large = _doubled(picture)
        chips.append(dlib.get_face_chip(large, _trees(5)(large, _dlib_box(2 * where)), 150, 0.25))
    return np.stack(chips).astype(np.float32).transpose(0, 3, 1, 2)


def identify(pictures: np.ndarray, box: np.ndarray | None = None) -> np.ndarray:
    """dlib's identity descriptor [N, 128]. In CelebA at 128 px one person's images are 0.45 apart (Euclidean), other
    people's 0.86; below 0.50 it is the same person."""
    return _run("dlib128", _chips(pictures, blaze(pictures)[1] if box is None else box), ["y"])["y"]


def _faceres(pictures: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The 1,024 pooled features of faceres."""
    centre, side = _middle(box)
    window = _square(centre, side * 1.25)
    crops = np.stack([cut(*pair, 224) for pair in zip(pictures, window, strict=True)]).astype(np.float32)
    return _run("faceres", (crops[..., ::-1] - BGR_MEAN).transpose(0, 3, 1, 2))["features"]


def halves(pictures: np.ndarray, five: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each face twice, made of its left half and that one's mirror image, and of its right: uint8 [N, 160, 160, 3]."""
    left, right = [], []
    for picture, points in zip(pictures, five, strict=True):
        eyes, mouth = points[:2].mean(0), points[3:].mean(0)
        down, middle = mouth - eyes, (eyes + mouth) / 2
        length = np.linalg.norm(down)
        reach, angle = max(1.5 * length, 10.0), np.arctan2(-down[0], down[1])
        upright = cut(picture, np.concatenate([middle - reach, middle + reach]), 160, angle)
        is_left = np.arange(160)[None, :, None] < 80
        left.append(np.where(is_left, upright, upright[:, ::-1]))
        right.append(np.where(is_left, upright[:, ::-1], upright))
    return np.stack(left), np.stack(right)


# ------------------------------------------------------------------------------------------------------------ all of it


def measure(pictures: np.ndarray) -> dict[str, np.ndarray]:
    """All that `core.evaluation.outside_judge` reads of N images; points are in pixels, the networks' cells in
    float16."""
    score, box, points = blaze(pictures)
    probability, five = mtcnn(pictures, box)
    mesh, flag = mesh_landmarks(pictures, box, points)
    last = pictures.shape[2] - 1
    flipped, flipped_box = pictures[:, :, ::-1], box[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [last, 0, last, 0]
    middle = np.tile([16.0, 16.0, 144.0, 144.0], (len(pictures), 1))
    left, right = halves(pictures, five)
    own = _run("dlib128", _chips(pictures, box))
    eyes = np.stack([mesh[:, [33, 133, 159, 145]].mean(1), mesh[:, [263, 362, 386, 374]].mean(1)], 1)
    return {
        "blaze": score, "mesh_flag": flag, "hog": hog(pictures), "mtcnn": probability,
        "five": five, "mesh": mesh[:, MESH], "mesh_five": np.concatenate([eyes, mesh[:, [1, 61, 291]]], 1),
        "conv": conv_landmarks(pictures, box), "tree": tree_landmarks(pictures, box),
        "conv_flipped": (conv_landmarks(flipped, flipped_box) * [-1, 1] + [last, 0])[:, MIRROR],
        "faceres_length": np.linalg.norm(_faceres(pictures, box), axis=1),
        "identity": own["y"], "identity_flipped": identify(flipped, flipped_box),
        "identity_left": identify(left, middle), "identity_right": identify(right, middle),
        "cells17": own["cells17"].transpose(0, 2, 3, 1).astype(np.float16),
        "cells8": own["cells8"].transpose(0, 2, 3, 1).astype(np.float16),
    }  # fmt: skip


def _batches(pictures: np.ndarray, size: int = 32) -> Iterator[np.ndarray]:
    for start in range(0, len(pictures), size):
        yield np.ascontiguousarray(pictures[start : start + size])


def main(arguments: Sequence[str]) -> None:
    """See the top of the file."""
    what, source, target = arguments
    parts = []
    for batch in _batches(np.load(source, mmap_mode="r", allow_pickle=False)):
        parts.append(measure(batch) if what == "measure" else {"identity": identify(batch)})
    np.savez(target, **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


if __name__ == "__main__":
    main(sys.argv[1:])
