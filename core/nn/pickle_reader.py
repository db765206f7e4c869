"""What arrays and dictionaries does a pickle hold, if nothing that it asks for is run?

A pickle is a program for a small stack machine that may import anything and call it. This machine imports nothing: its
opcodes are read one by one (`pickletools`), the few names that arrays and dictionaries need are answered by functions
of this file, and for every other name the whole file is refused with one sentence. Objects of NVIDIA's networks come
out as a dictionary of their class's name and their attributes; the source code that such files carry is left unread. It
does not know which weights are looked for.

Sources: the opcodes https://docs.python.org/3/library/pickletools.html, arrays within pickled tensors (torch's format
before zip files) https://github.com/pytorch/pytorch/blob/main/torch/serialization.py, objects
https://github.com/NVlabs/stylegan2-ada-pytorch/blob/main/torch_utils/persistence.py.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from core.command import UserError

MAGIC = 0x1950A86A20F9469CFC6C  # how torch's older files begin
STORAGES = {"FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
            "LongStorage": np.int64, "IntStorage": np.int32, "ByteStorage": np.uint8, "BoolStorage": np.bool_}
LONGEST = 1 << 32  # bytes of a file that is read; the largest published network has less than a tenth


class PickleRefused(UserError, ValueError):
    """The pickle asks for something else than arrays and dictionaries, or is none; the message says what."""


@dataclass(frozen=True)
class Name:
    """What a pickle would import; here two words."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Mark:
    """Where on the stack the parts of something begin."""


@dataclass(frozen=True)
class Storage:
    """Where the numbers of tensors lie: [numel], or their key and type while their bytes are not read yet."""

    key: str
    kind: Any
    numel: int
    values: np.ndarray | None = None


# ------------------------------------------------------------------------- what may be asked, and what is answered then


def _mapping(*args: Any) -> dict[Any, Any]:
    return dict(*args)


def _object(meta: Any) -> dict[str, Any]:
    """An object of NVIDIA's networks: the name of its class and its attributes."""
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise PickleRefused("an object in it has no attributes")
    return {"class_name": str(meta.get("class_name")), "state": meta["state"]}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A copy of a part of a storage; sizes and strides that leave it are refused."""
    if not isinstance(storage, Storage) or storage.values is None or not _counts(offset, *size, *stride):
        raise PickleRefused("a tensor in it has no numbers")
    if len(size) != len(stride):
        raise PickleRefused("a tensor in it has another number of sizes than of strides")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(storage.values):
        raise PickleRefused("a tensor in it is longer than its numbers")
    return torch.from_numpy(storage.values).as_strided(tuple(size), tuple(stride), offset).clone()


def _counts(*values: Any) -> bool:
    return all(isinstance(value, int) and value >= 0 for value in values)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _storage_of_bytes(data: Any) -> Storage:
    """The one storage of a file that torch's older format has within a pickle."""
    if not isinstance(data, bytes):
        raise PickleRefused("a tensor in it has no bytes")
    source = io.BytesIO(data)
    if _run(source) != MAGIC:
        raise PickleRefused("a tensor in it is not in torch's format")
    _run(source), _run(source)  # version of the format, sizes of the machine's integers
    found, keys = _run(source, stored=True), _run(source)
    if not isinstance(found, Storage) or keys != [found.key]:
        raise PickleRefused("a tensor in it is not in torch's format")
    count = int.from_bytes(source.read(8), "little")
    size = count * np.dtype(found.kind).itemsize
    numbers = source.read(size) if count == found.numel and size <= len(data) else b""
    if len(numbers) != size or count != found.numel:
        raise PickleRefused("a tensor in it has too few numbers")
    return Storage(found.key, found.kind, count, np.frombuffer(numbers, found.kind).copy())


def _no_array(*_: Any) -> dict[str, Any]:
    """An array of numpy, empty until its state comes."""
    return {"numpy": None}


def _dtype(name: Any, *_: Any) -> np.dtype[Any]:
    found = np.dtype(str(name))
    if found.hasobject:
        raise PickleRefused("an array in it holds objects")
    return found


def _scalar(kind: Any, numbers: Any = None) -> Any:
    """A single number of numpy, as one of Python's."""
    if not isinstance(kind, np.dtype) or not isinstance(numbers, bytes) or len(numbers) != kind.itemsize:
        raise PickleRefused("a number in it is none")
    return np.frombuffer(numbers, kind)[0].item()


ANSWERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping,
    "dnnlib.util.EasyDict": _mapping,
    "builtins.set": set,
    "torch_utils.persistence._reconstruct_persistent_obj": _object,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _storage_of_bytes,
    "numpy.core.multiarray._reconstruct": _no_array,
    "numpy._core.multiarray._reconstruct": _no_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.dtype": _dtype,
}
AS_WORDS = {"numpy.ndarray", *(f"torch.{name}" for name in STORAGES)}  # named, never called
MAPPINGS = ("collections.OrderedDict", "dnnlib.util.EasyDict")

# --------------------------------------------------------------------------------------------------------- the machine


def read_pickle(path: str | Path) -> Any:
    """What a pickle holds, of dictionaries, lists, tuples, sets, strings, numbers and tensors or arrays alone.

    Raises PickleRefused, which names the file and what it asks for, and OSError where it cannot be read.
    """
    path = Path(path)
    if (size := path.stat().st_size) > LONGEST:
        raise PickleRefused(f"{path} is refused: it has {size:,} bytes, and at most {LONGEST:,} are read")
    with open(path, "rb") as source:
        try:
            return _run(source)
        except PickleRefused as error:
            raise PickleRefused(f"{path} is refused: {error}; only arrays and dictionaries are read") from error
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RuntimeError) as error:
            raise PickleRefused(f"{path} is refused: it is no pickle, or a damaged one "
                                f"({' '.join(str(error).split())[:120] or type(error).__name__})") from error


def _run(source: BinaryIO, *, stored: bool = False) -> Any:
    """Run one pickle to its end. ``stored``: within it, persistent ids are storages of torch."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(source):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            word, module = stack.pop(), stack.pop()
            stack.append(_named(module, word))
        elif name == "BINPERSID" and stored:
            stack.append(_stored(stack.pop()))
        elif name in _STEPS:
            _STEPS[name](stack)
        elif name in ("PERSID", "BINPERSID"):
            raise PickleRefused("it refers to objects outside of itself")
        else:
            raise PickleRefused(f"it has the opcode {name}")
    raise PickleRefused("it has no end")


_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "FLOAT", "BINFLOAT", "BINUNICODE",
           "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple, "EMPTY_SET": set, "MARK": Mark}


def _named(module: Any, name: Any) -> Name:
    found = Name({"__builtin__": "builtins"}.get(module, module), name)
    if str(found) not in ANSWERS and str(found) not in AS_WORDS:
        raise PickleRefused(f"it asks for {str(found)[:100]}")
    return found


def _stored(found: Any) -> Storage:
    """A storage that torch's older format names: ("storage", its type, key, device, number of elements, view)."""
    if not isinstance(found, tuple) or len(found) < 5 or found[0] != "storage" or not _counts(found[4]):
        raise PickleRefused("it refers to objects outside of itself")
    kind = STORAGES.get(getattr(found[1], "name", ""))
    if kind is None or (len(found) > 5 and found[5] is not None):
        raise PickleRefused("a tensor in it is of a kind that is not read")
    return Storage(str(found[2]), kind, found[4])


def _since_mark(stack: list[Any]) -> list[Any]:
    found: list[Any] = []
    while not isinstance(top := stack.pop(), Mark):
        found.append(top)
    return found[::-1]


def _call(stack: list[Any]) -> None:
    args, what = stack.pop(), stack.pop()
    answer = ANSWERS.get(str(what)) if isinstance(what, Name) else None
    if answer is None or not isinstance(args, tuple):
        raise PickleRefused(f"it calls {str(what)[:100]}")
    stack.append(answer(*args))


def _new_object(stack: list[Any]) -> None:
    args, what = stack.pop(), stack.pop()
    if not isinstance(what, Name) or str(what) not in MAPPINGS or args != ():
        raise PickleRefused(f"it makes an object of {str(what)[:100]}")
    stack.append({})


def _set_state(stack: list[Any]) -> None:
    """Attributes of a dictionary are left out; an array gets its numbers, a dtype its byte order."""
    state, target = stack.pop(), stack[-1]
    if isinstance(target, dict) and set(target) == {"numpy"}:
        _, shape, kind, fortran, numbers = state
        if not isinstance(kind, np.dtype) or not isinstance(numbers, bytes):
            raise PickleRefused("an array in it holds objects")
        array = np.frombuffer(numbers, kind).reshape(shape, order="F" if fortran else "C").copy()
        target["numpy"] = array
    elif isinstance(target, np.dtype):
        if state[1] == ">":
            raise PickleRefused("an array in it has its bytes in another order")
    elif not isinstance(target, dict):
        raise PickleRefused(f"it changes a {type(target).__name__}")


def _put(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], dict):
        raise PickleRefused(f"it sets items of a {type(stack[-1]).__name__}")
    stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _set_item(stack: list[Any]) -> None:
    value, key = stack.pop(), stack.pop()
    _put(stack, [key, value])


def _add(stack: list[Any], items: list[Any], kind: type) -> None:
    target = stack[-1]
    if not isinstance(target, kind):
        raise PickleRefused(f"it adds items to a {type(target).__name__}")
    if isinstance(target, list):
        target.extend(items)
    if isinstance(target, set):
        target.update(items)


def _tuple_of(count: int) -> Callable[[list[Any]], None]:
    def make(stack: list[Any]) -> None:
        parts = tuple(stack[-count:])
        del stack[-count:]
        stack.append(parts)

    return make


_STEPS: dict[str, Callable[[list[Any]], Any]] = {
    "POP": lambda stack: stack.pop(),
    "POP_MARK": _since_mark,
    "TUPLE": lambda stack: stack.append(tuple(_since_mark(stack))),
    "TUPLE1": _tuple_of(1), "TUPLE2": _tuple_of(2), "TUPLE3": _tuple_of(3),
    "SETITEM": _set_item,
    "SETITEMS": lambda stack: _put(stack, _since_mark(stack)),
    "APPEND": lambda stack: _add(stack, [stack.pop()], list),
    "APPENDS": lambda stack: _add(stack, _since_mark(stack), list),
    "ADDITEMS": lambda stack: _add(stack, _since_mark(stack), set),
    "REDUCE": _call, "NEWOBJ": _new_object, "BUILD": _set_state,
}
