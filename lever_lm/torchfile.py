"""Torch files of anybody's making, read as data: tensors, numeric numpy arrays and plain values, and nothing is called.

`torch.load(weights_only=True)` reads them and runs no code of a file's. But fifty bytes can make it allocate 10 GB
(`bytearray`), and a megabyte ends the process (the hash of a deep tuple). So each file is looked through before: a
dry run of its pickle, with the opcodes and the eight names that weights are saved with, in which tensors have shapes
and no memory. What passes is no larger than a few times the file. Source: PEP 307, and the notes on serialization in
torch's documentation.
"""

import codecs
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from lever_lm.errors import LeverError
from lever_lm.files import open_regular
from lever_lm.untrusted import shown

MAX_DEPTH = 32  # of lists and dicts within each other
SHARED = 4  # times the file's size that all it holds may come to: weights can be tied, and values be shared
_DTYPES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_BLOCK = 1 << 20
_NUMBERS = ("f2", "f4", "f8", "i4", "i8")
_PLAIN = (str, int, float, bool, type(None))


class _Refused(Exception):
    """What a file holds that is not read."""


def load_torch(path: str | Path, expect: type | tuple[type, ...] = dict, what: str = "checkpoint"):
    """The content of a file of torch.save: tensors, numeric numpy arrays and plain values only. Raises LeverError when
    the file is missing or no regular one, or holds anything else."""
    with open_regular(path, f"the {what}") as file:
        try:
            _look_through(file)
            file.seek(0)
            with torch.serialization.safe_globals(_numpy_arrays()):
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # its bytes can fail zipfile and pickletools in any way
            why = error if isinstance(error, _Refused) else "or it is cut short"
            raise LeverError(
                f"{path} is not a {what} of tensors and plain values ({why}); it was not executed"
            ) from error
    if not isinstance(content, expect):
        kinds = " or ".join(kind.__name__ for kind in (expect if isinstance(expect, tuple) else (expect,)))
        raise LeverError(f"{path}: expected a {kinds}, found a {type(content).__name__}")
    return content


@lru_cache(maxsize=1)
def _numpy_arrays() -> list:
    """What an array of floats or integers is pickled with, under the names that numpy 1 and 2 give it."""
    names = [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]
    numbers = [type(np.dtype(kind)) for kind in _NUMBERS]
    reconstruct = np.zeros(0).__reduce__()[0]
    return [*((reconstruct, name) for name in names), np.ndarray, np.dtype, *numbers, codecs.encode]


def _look_through(file: BinaryIO) -> None:
    """Raise _Refused, or whatever zipfile and pickletools do, at what is not read."""
    start = file.read(6)
    if start[:2] == b"\x80\x02" or start[:4] == b"stor":
        raise _Refused("it is a plain pickle, or in torch's format before 1.6, which is not read; torch.save it anew")
    members = _members(file)
    if any(name.endswith("/constants.pkl") for name in members):
        raise _Refused("it is a TorchScript archive")
    (pickled,) = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    folder = pickled.removesuffix("data.pkl")
    order = members.get(f"{folder}byteorder")
    if order is not None and b"".join(_blocks(file, order)) != b"little":
        raise _Refused("its numbers are big-endian")
    pickled = b"".join(_blocks(file, members[pickled]))
    if not pickled.startswith(b"\x80\x02"):
        raise _Refused("it is not of pickle's protocol 2")
    content = _DryRun(lambda key: sum(map(len, _blocks(file, members[f"{folder}data/{key}"])))).run(pickled)
    _check_size(content, len(pickled), file.seek(0, 2))


def _members(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip, none of which is larger than it is there."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    if any(info.compress_type or info.file_size != info.compress_size or info.flag_bits & 1 for info in infos):
        raise _Refused("parts of it are compressed or encrypted")
    if sum(info.file_size for info in infos) > file.seek(0, 2):
        raise _Refused("it claims to hold more bytes than it has")
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise _Refused("two parts of it have one name")
    return members


def _blocks(file: BinaryIO, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """The bytes of an uncompressed member, all of which are there and undamaged."""
    file.seek(info.header_offset + 26)  # in its own header: lengths of the name and of the padding
    lengths = file.read(4)
    file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), 1)
    left, checksum = info.file_size, 0
    while block := file.read(min(left, _BLOCK)):
        left, checksum = left - len(block), zlib.crc32(block, checksum)
        yield block
    if left or checksum != info.CRC:
        raise _Refused("its checksums are wrong: it is damaged")


def _check_size(content, pickled: int, size: int) -> None:
    """Refuse what is larger when it is written out than SHARED times the bytes it came from, too deep to be written
    out, or of another kind. pickled: bytes of the pickle, which holds all but the tensors; size: of the file."""
    room, tensors, waiting = SHARED * pickled, SHARED * size, [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        inner = ()
        if type(value) is dict:
            inner = (*value, *value.values())
        elif type(value) in (list, tuple):
            inner = value
        elif isinstance(value, (Tensor, np.ndarray)):
            tensors -= value.nbytes
        elif type(value) in (str, bytes):
            room -= len(value)
        elif type(value) not in _PLAIN:
            raise _Refused(f"it holds a {shown(type(value).__name__.strip('_').lower())}")
        room -= len(inner)
        if room < 0 or tensors < 0 or depth > MAX_DEPTH:
            raise _Refused("what it holds repeats itself, or lies too deep")
        waiting += [(item, depth + 1) for item in inner]


class _DryRun:
    """Runs a pickle of protocol 2 to see what it would make. `size_of` gives the bytes of a storage by its key."""

    def __init__(self, size_of: Callable[[str], int]):
        self.size_of = size_of
        self.storages: dict[str, Tensor] = {}
        self.stack: list = []
        self.marks: list[list] = []

    def run(self, pickled: bytes):
        """The value that the pickle makes. Raises _Refused at whatever is none of tensors and plain values."""
        memo: dict = {}
        for opcode, argument, _ in pickletools.genops(pickled):
            name = opcode.name
            if name == "PROTO" and argument != 2:
                raise _Refused(f"it is of pickle's protocol {argument}")
            if name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(memo[argument])
            elif name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name == "GLOBAL":
                self.stack.append(_Name(argument))
            elif name == "STOP":
                return self.stack.pop()
            elif name in _ACTIONS:
                _ACTIONS[name](self)
            else:
                raise _Refused(f"it needs pickle's {name}")
        raise EOFError

    def pop_mark(self) -> list:
        """What was put on the stack after the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def empty(self, kind: type) -> None:
        self.stack.append(kind())

    def group(self, count: int | None) -> None:
        """The last `count` values, or those after the mark, become a tuple."""
        items = self.pop_mark() if count is None else self.stack[-count:]
        if count is not None:
            del self.stack[-count:]
        self.stack.append(tuple(items))

    def append(self, items: list) -> None:
        _of(self.stack[-1], list).extend(items)

    def set_items(self, items: list) -> None:
        target = _of(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in _PLAIN:
                raise _Refused(f"a key of it is a {type(key).__name__}")
            target[key] = value

    def take(self, count: int) -> list:
        """The last values of the stack, off it."""
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def storage(self) -> None:
        """(`storage`, its type, key, device, length) → a flat tensor of that length, without memory."""
        kind, of, key, _, length = _of(self.stack.pop(), tuple)
        dtype = _DTYPES.get(str(of)) if isinstance(of, _Name) else None
        if kind != "storage" or dtype is None or type(key) is not str:
            raise _Refused(f"it holds a {shown(of)}")
        if key not in self.storages:
            self.storages[key] = torch.empty(self.size_of(key) // dtype.itemsize, dtype=dtype, device="meta")
        flat = self.storages[key]
        if flat.dtype != dtype or len(flat) != length:
            raise _Refused("a tensor of it claims another size than it has")
        self.stack.append(flat)

    def reduce(self) -> None:
        """A call of one of the names that are known; made by functions of this module."""
        arguments, name = _of(self.stack.pop(), tuple), _of(self.stack.pop(), _Name)
        make = _CALLS.get(str(name))
        if make is None:
            raise _Refused(f"it wants {shown(str(name))} called")
        self.stack.append(make(*arguments))

    def build(self) -> None:
        """What an array or its dtype is filled with."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is np.ndarray:
            _, shape, dtype, fortran, content = _of(state, tuple)
            sizes = all(type(n) is int and n >= 0 for n in _of(shape, tuple))
            if not sizes or prod(shape) * _of(dtype, np.dtype).itemsize != len(_of(content, bytes)):
                raise _Refused("an array of it claims another size than it has")
            target.__setstate__((1, shape, dtype, _of(fortran, bool), content))
        elif isinstance(target, np.dtype) and state[1] in ("<", ">") and state[2:] == (None, None, None, -1, -1, 0):
            target.__setstate__((3, *state[1:]))
        elif not (type(target) is dict and type(state) is dict):  # `_metadata` of a state_dict
            raise _Refused(f"it fills a {type(target).__name__}")


class _Name(str):
    """What a file names, as `module name`: never looked up."""


def _of(value, kind: type):
    if not isinstance(value, kind):
        raise _Refused(f"found a {type(value).__name__} where a {kind.__name__.strip('_')} belongs")
    return value


def _tensor(flat, offset, size, stride, requires_grad, hooks, metadata=None) -> Tensor:
    """A view of a storage that lies within it, and repeats nothing."""
    numbers = (offset, *_of(size, tuple), *_of(stride, tuple))
    if not all(type(n) is int and n >= 0 for n in numbers) or len(size) != len(stride) or metadata:
        raise _Refused("a tensor of it has a shape that cannot be")
    count = prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > len(_of(flat, Tensor)) or (count and last >= len(flat)):
        raise _Refused("a tensor of it claims another size than it has")
    return flat.as_strided(size, stride, offset) if count else flat.new_empty(size)


def _dtype(kind, align=False, copy=True) -> np.dtype:
    if kind not in _NUMBERS:
        raise _Refused(f"it holds an array of {shown(kind)}")
    return np.dtype(kind, copy=True)


def _empty() -> dict:
    return {}


def _empty_array(kind, shape, code) -> np.ndarray:
    """What an array is before it is filled, as numpy writes it: torch.load makes it as large as it says."""
    if kind != "numpy ndarray" or shape != (0,) or code != b"b":
        raise _Refused("an array of it claims another size than it has")
    return np.empty(0)


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    return _of(text, str).encode("latin1") if encoding == "latin1" else _of(None, str)


_CALLS = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, requires_grad, hooks: _of(tensor, Tensor),
    "collections OrderedDict": _empty,
    "torch Size": lambda sizes: tuple(_of(sizes, (tuple, list))),
    "numpy dtype": _dtype,
    "_codecs encode": _encoded,
    "numpy.core.multiarray _reconstruct": _empty_array,
    "numpy._core.multiarray _reconstruct": _empty_array,
}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_ACTIONS: dict[str, Callable[[_DryRun], None]] = {
    "PROTO": lambda run: None,
    "MARK": _DryRun.mark,
    "EMPTY_DICT": lambda run: run.empty(dict),
    "EMPTY_LIST": lambda run: run.empty(list),
    "TUPLE": lambda run: run.group(None),
    "TUPLE1": lambda run: run.group(1),
    "TUPLE2": lambda run: run.group(2),
    "TUPLE3": lambda run: run.group(3),
    "APPEND": lambda run: run.append(run.take(1)),
    "APPENDS": lambda run: run.append(run.pop_mark()),
    "SETITEM": lambda run: run.set_items(run.take(2)),
    "SETITEMS": lambda run: run.set_items(run.pop_mark()),
    "BINPERSID": _DryRun.storage,
    "REDUCE": _DryRun.reduce,
    "BUILD": _DryRun.build,
}
