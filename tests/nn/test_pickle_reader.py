"""Are arrays and dictionaries read out of a pickle, is everything else refused unrun, and do NVIDIA's networks fit?

The files are made here by Python's own pickler, from classes that stand where those of stylegan2-ada-pytorch do and
reduce themselves as its `persistence` module has them do.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import stylegan
from core.nn.checkpoint import ModelFolderError
from core.nn.official_weights import read_official
from core.nn.pickle_reader import PickleRefused, read_pickle
from core.nn.style_networks import StyleConfig, StyleGenerator

CONFIG = StyleConfig(3, (12, 10, 8), z_dim=8, w_dim=16, mapping_layers=2, clamp=256.0)


def written(folder: Path, value: Any, protocol: int = 4) -> Path:
    path = folder / "file.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


# ---- what may be read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_arrays_and_tensors_come_out_as_they_were(tmp_path: Path, protocol: int) -> None:
    tensor = torch.arange(24.0).view(4, 6)
    value = {
        "none": None, "numbers": [1, -7, 2**70, 0.25, True], "tuple": ((), (1,), (1, 2, 3, 4)), "text": "\u00e9" * 300,
        "bytes": b"\x00" * 300, "set": {1, 2}, "ordered": collections.OrderedDict(a=1, b=[2]),
        "tensor": tensor, "part": tensor[1:3, ::2], "scalar": torch.tensor(2.5), "half": tensor.half(),
        "parameter": nn.Parameter(tensor[0].clone()), "same": tensor, "empty": torch.zeros(0, 3),
        "array": np.arange(6, dtype=np.float32).reshape(2, 3), "number": np.float64(0.5), "state": nn.Linear(2, 2
        ).state_dict(),
    }
    if protocol == 5:  # which has numpy's arrays by another call
        del value["array"]
    if protocol == 2:  # which has no bytes but by a call
        value = {name: one for name, one in value.items() if name in ("none", "numbers", "tuple", "text", "ordered")}
    found = read_pickle(written(tmp_path, value, protocol))
    assert list(found) == list(value) and type(found["ordered"]) is dict and found["ordered"] == value["ordered"]
    for name in ("none", "numbers", "tuple", "text", "bytes", "set", "number"):
        assert found.get(name) == value.get(name)
    for name in ("tensor", "part", "scalar", "half", "parameter", "same", "empty"):
        if name in value:
            assert type(found[name]) is torch.Tensor and found[name].dtype == value[name].dtype
            assert torch.equal(found[name], value[name].detach())
    if "array" in value:
        assert np.array_equal(found["array"]["numpy"], value["array"])
    if "state" in value:
        assert torch.equal(found["state"]["weight"], value["state"]["weight"])


# ---- what is refused -------------------------------------------------------------------------------------------------


class Calls:
    """Reduces to a call of something."""

    def __init__(self, what: Any, *args: Any) -> None:
        self.call = what, args

    def __reduce__(self) -> Any:
        return self.call


class Holds:
    """An ordinary object."""


class Refers(pickle.Pickler):
    """Gives what it pickles an id outside of the file."""

    def persistent_id(self, value: Any) -> Any:
        return "elsewhere" if isinstance(value, Holds) else None


def marked(folder: Path) -> Any:
    """What leaves a file behind, were it called."""
    return os.mkdir, str(folder / "it-ran")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_call_is_refused_and_not_made(tmp_path: Path, protocol: int) -> None:
    path = written(tmp_path, {"G_ema": Calls(*marked(tmp_path))}, protocol)
    with pytest.raises(PickleRefused, match=r"file.pkl is refused: it (asks for (posix|nt).mkdir|has the opcode)"):
        read_pickle(path)
    assert not (tmp_path / "it-ran").exists()


def test_a_call_within_the_bytes_of_a_tensor_is_refused_too(tmp_path: Path) -> None:
    inner = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + 2 * pickle.dumps(1, 2) + pickle.dumps(Calls(*marked(tmp_path)), 2)
    with pytest.raises(PickleRefused, match=r"it asks for (posix|nt).mkdir"):
        read_pickle(written(tmp_path, Calls(torch.storage._load_from_bytes, inner)))
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(("value", "said"), [
    (Holds(), "it asks for .*test_pickle_reader.Holds"),
    (Calls(eval, "1"), "it asks for builtins.eval"),
    (Calls(getattr, "x", "upper"), "it asks for builtins.getattr"),
    (np.array([Holds()]), "it asks for|holds objects"),
    (torch.nn.Linear(1, 1), "it asks for torch.nn.modules.linear.Linear"),
    (os.path.join, "it asks for posixpath.join"),
])
def test_other_names_are_refused_in_one_sentence(value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(PickleRefused, match=said) as raised:
        read_pickle(written(tmp_path, value))
    assert str(raised.value).count("\n") == 0 and "only arrays and dictionaries are read" in str(raised.value)


def test_persistent_ids_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Refers(buffer, protocol=4).dump([Holds()])
    (tmp_path / "file.pkl").write_bytes(buffer.getvalue())
    with pytest.raises(PickleRefused, match="it refers to objects outside of itself"):
        read_pickle(tmp_path / "file.pkl")


@pytest.mark.parametrize("raw", [
    b"", b"\x80\x04.", b"PK\x03\x04 a zip file", b"hello", pickle.dumps({"a": [1] * 50})[:-9], b"\x80\x04]q\x00h\x05.",
    b"\x80\x04}(K\x01u.", b"\x80\x04K\x01K\x02s.", b"\x80\x04K\x01\x85R.", b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    b"\x80\x04\x8d" + b"\xff" * 8 + b"x",
])
def test_what_is_no_pickle_or_a_broken_one_is_one_sentence(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pkl").write_bytes(raw)
    with pytest.raises(PickleRefused, match="file.pkl is refused: "):
        read_pickle(tmp_path / "file.pkl")


def rebuilt(storage: Any, *shape: Any) -> Calls:
    return Calls(torch._utils._rebuild_tensor_v2, storage, *shape, False, collections.OrderedDict())


@pytest.mark.parametrize("shape", [(0, (5,), (1,)), (3, (2,), (1,)), (0, (2, 2), (3, 1)), (-1, (1,), (1,)),
                                   (0, (2,), (1, 1)), (0, (1 << 40,), (1,))])
def test_a_tensor_beyond_its_numbers_is_refused(shape: Any, tmp_path: Path) -> None:
    typed = torch.storage.TypedStorage(wrap_storage=torch.arange(4.0).untyped_storage(), dtype=torch.float32,
                                       _internal=True)
    with pytest.raises(PickleRefused, match="a tensor in it"):
        read_pickle(written(tmp_path, rebuilt(typed, *shape)))


# ---- NVIDIA's networks -----------------------------------------------------------------------------------------------


class Official(nn.Module):
    """A module that reduces itself as those of torch_utils/persistence.py: a function and ({type, class, state},)."""

    def __reduce__(self) -> Any:
        meta = sys.modules["dnnlib.util"].EasyDict(
            type="class", version=6, module_src="raise SystemExit('never run')", class_name=type(self).__name__,
            state=dict(self.__dict__))
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def fully_connected(a: int, b: int, rate: float = 1.0) -> Official:
    module = Official()
    module.weight, module.bias = nn.Parameter(torch.randn(b, a) / rate), nn.Parameter(torch.randn(b))
    module.weight_gain, module.bias_gain, module.activation = np.float64(rate / np.sqrt(a)), rate, "lrelu"
    return module


def synthesis_layer(a: int, b: int, size: int) -> Official:
    module = Official()
    module.affine = fully_connected(CONFIG.w_dim, a)
    module.weight, module.bias = nn.Parameter(torch.randn(b, a, 3, 3)), nn.Parameter(torch.randn(b))
    module.noise_strength = nn.Parameter(torch.randn(()))
    module.register_buffer("noise_const", torch.randn(size, size))
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    module.register_buffer("resample_filter", row.outer(row) / 64)
    module.use_noise, module.activation, module.conv_clamp, module.act_gain = True, "lrelu", 256, np.sqrt(2)
    return module


@pytest.fixture(scope="module")
def official() -> Iterator[Official]:
    """A generator of the official structure that grows to 16 px, with the modules that its pickles name."""
    made = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib",
                                                      "dnnlib.util")}

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("this must never be called")

    class EasyDict(dict):
        pass

    for function, module in ((_reconstruct_persistent_obj, "torch_utils.persistence"), (EasyDict, "dnnlib.util")):
        function.__module__, function.__qualname__ = module, function.__name__
        setattr(made[module], function.__name__, function)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        for name, module in made.items():
            patch.setitem(sys.modules, name, module)
        torch.manual_seed(3)
        network, mapping, synthesis = Official(), Official(), Official()
        mapping.fc0, mapping.fc1 = fully_connected(8, 16, 0.01), fully_connected(16, 16, 0.01)
        mapping.register_buffer("w_avg", torch.randn(16))
        mapping.c_dim = 0
        for level, width in enumerate(CONFIG.channels):
            block, before = Official(), CONFIG.channels[max(level - 1, 0)]
            if level == 0:
                block.const = nn.Parameter(torch.randn(width, 4, 4))
            else:
                block.conv0 = synthesis_layer(before, width, 4 << level)
            block.conv1 = synthesis_layer(width, width, 4 << level)
            block.torgb = Official()
            block.torgb.affine = fully_connected(CONFIG.w_dim, width)
            block.torgb.weight = nn.Parameter(torch.randn(3, width, 1, 1))
            block.torgb.bias = nn.Parameter(torch.randn(3))
            setattr(synthesis, f"b{4 << level}", block)
        network.z_dim, network.w_dim, network.c_dim = 8, 16, 0
        network.mapping, network.synthesis = mapping, synthesis
        yield network


def test_an_official_generator_becomes_ours(official: Official, tmp_path: Path) -> None:
    """Every tensor under its name, none left over, and a picture comes out."""
    found = read_official(written(tmp_path, {"training_set_kwargs": None, "G": official, "G_ema": official}, 3))
    assert isinstance(found, StyleGenerator) and found.config == CONFIG
    convs, theirs = found.synthesis.convs, official.synthesis
    for ours, other in ((convs[0], theirs.b4.conv1), (convs[1], theirs.b8.conv0), (convs[2], theirs.b8.conv1),
                        (convs[4], theirs.b16.conv1)):
        assert torch.equal(ours.weight, other.weight) and torch.equal(ours.noise, other.noise_const)
        assert torch.equal(ours.affine.bias, other.affine.bias)
    assert torch.equal(found.synthesis.outputs[2].weight, theirs.b16.torgb.weight)
    assert torch.equal(found.mapping.w_mean, official.mapping.w_avg)
    assert torch.equal(found.mapping.layers[1].weight, official.mapping.fc1.weight)
    assert found(torch.randn(2, 8)).shape == (2, 3, 16, 16)


def test_the_command_converts_and_draws(official: Official, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, folder = written(tmp_path, {"G_ema": official}), tmp_path / "model"
    assert stylegan.main(["--convert", str(path), "--model", str(folder)]) == 0
    assert "16 px, its licence is that of file.pkl" in capsys.readouterr().out
    assert stylegan.main(["--sample", "--model", str(folder), "--n-images", "3", "--device", "cpu", "--out",
                          str(tmp_path / "faces.png")]) == 0
    with Image.open(tmp_path / "faces.png") as sheet:
        assert sheet.size == (48, 16)
    with pytest.raises(ModelFolderError, match="holds a trained stylegan: name another folder"):
        stylegan.main(["--convert", str(path), "--model", str(folder)])


@pytest.mark.parametrize(("change", "said"), [
    ({"use_noise": False}, "takes no noise"), ({"activation": "relu"}, "ends in another activation"),
    ({"resample_filter": torch.ones(2, 2) / 4}, "filters by another row"), ({"conv2": torch.ones(2)}, "has a tensor"),
])
def test_another_network_is_refused(official: Official, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    layer = official.synthesis.b4.conv1
    before = {name: layer._buffers.get(name, layer.__dict__.get(name)) for name in change}
    for name, value in change.items():
        if isinstance(value, torch.Tensor):
            layer._buffers[name] = value
        else:
            layer.__dict__[name] = value
    try:
        with pytest.raises(PickleRefused, match=said):
            read_official(written(tmp_path, {"G_ema": official}))
    finally:
        for name, value in before.items():
            layer._buffers.pop(name, None) if value is None else (
                layer._buffers if isinstance(value, torch.Tensor) else layer.__dict__).update({name: value})


def test_a_pickle_without_a_generator_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(PickleRefused, match="has no 'G_ema'"):
        read_official(written(tmp_path, {"G": 1}))
    with pytest.raises(PickleRefused, match="grows through"):
        read_official(written(tmp_path, {"G_ema": {"state": {"z_dim": 8}}}))
