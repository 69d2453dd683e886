"""A dry run of the pickle in a torch file: what it would make, without making it. See safe_torch_load.py.

It knows the opcodes and the names that weights are saved with. Nothing that a file names is looked up or called.
"""

import io
import pickle
from collections.abc import Callable
from math import prod

import numpy as np
import torch
from torch import Tensor

from lever_lm.utils.terminal import shown

MAX_DEPTH = 32  # of lists and dicts within each other
SHARED = 4  # times the pickle's size that all it holds may come to: values can be shared
TIED = 64  # times the file's size that its tensors may come to, which share their memory
_FLOATS = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16}
_INTEGERS = {"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8}
_DTYPES = {f"torch {name}Storage": dtype for name, dtype in {**_FLOATS, **_INTEGERS, "Bool": torch.bool}.items()}
_TYPES = {f"torch {str(dtype).removeprefix('torch.')}" for dtype in _DTYPES.values()}
NUMBERS = ("f2", "f4", "f8", "i4", "i8")  # what numpy arrays may hold
_PLAIN = (str, int, float, bool, type(None))


class Refused(Exception):
    """What a file holds that is not read."""


def look_through(pickled: bytes, size_of: Callable[[str], int], size: int) -> None:
    """Raise Refused, or whatever pickle does, at what is not read.

    size_of: the bytes of a storage by its key; size: of the whole file.
    """
    if not pickled.startswith(b"\x80\x02"):
        raise Refused("it is not of pickle's protocol 2")
    _check_size(_DryRun(pickled, size_of).load(), len(pickled), size)


def _check_size(content, pickled: int, size: int) -> None:
    """Refuse what is larger when it is written out than SHARED or TIED times the bytes it came from, too deep to be
    written out, or of another kind.

    pickled: the bytes of the pickle, which holds all but the tensors; size: those of the file.
    """
    room, tensors, waiting = SHARED * pickled, TIED * size, [(content, 0)]
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
        elif type(value) not in _PLAIN and value not in _TYPES:
            raise Refused(f"it holds a {shown(type(value).__name__.strip('_').lower())}")
        room -= len(inner)
        if room < 0 or tensors < 0 or depth > MAX_DEPTH:
            raise Refused("what it holds repeats itself, or lies too deep")
        waiting += [(item, depth + 1) for item in inner]


class _Name(str):
    """What a file names, as `module name`: never looked up."""

    def __call__(self, *arguments):
        raise Refused(f"it wants {shown(str(self))} called")


class _DryRun(pickle._Unpickler):
    """Runs a pickle of protocol 2 with the opcodes of `_OPCODES`; what it calls are functions of this module."""

    def __init__(self, pickled: bytes, size_of: Callable[[str], int]):
        super().__init__(io.BytesIO(pickled))
        self.size_of = size_of
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str):
        """Return the function that stands for a name, or the name itself."""
        name = f"{module} {name}"
        return _CALLS.get(name, _Name(name))

    def persistent_load(self, pid) -> Tensor:
        """Return for (`storage`, type, key, device, length) a flat tensor of that length, without memory."""
        kind, of, key, _, length = _of(pid, tuple)
        dtype = _DTYPES.get(str(of)) if isinstance(of, _Name) else None
        if kind != "storage" or dtype is None or type(key) is not str:
            raise Refused(f"it holds a {shown(of)}")
        if key not in self.storages:
            self.storages[key] = torch.empty(self.size_of(key) // dtype.itemsize, dtype=dtype, device="meta")
        flat = self.storages[key]
        if flat.dtype != dtype or len(flat) != length:
            raise Refused("a tensor of it claims another size than it has")
        return flat

    def set_items(self, items: list) -> None:
        target = _of(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in _PLAIN:  # the hash of a deep tuple would end the process
                raise Refused(f"a key of it is a {type(key).__name__}")
            target[key] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    def load_proto(self) -> None:
        """Take protocol 2 alone, wherever in a pickle it is named: torch warns of others."""
        if self.read(1) != b"\x02":
            raise Refused("it is not of pickle's protocol 2")

    def load_build(self) -> None:
        """Fill an array or its dtype; the metadata of a state_dict is left out."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is np.ndarray:
            _, shape, dtype, fortran, content = _of(state, tuple)
            sizes = all(type(n) is int and n >= 0 for n in _of(shape, tuple))
            if not sizes or prod(shape) * _of(dtype, np.dtype).itemsize != len(_of(content, bytes)):
                raise Refused("an array of it claims another size than it has")
            target.__setstate__((1, shape, dtype, _of(fortran, bool), content))
        elif isinstance(target, np.dtype) and state[1] in ("<", ">") and state[2:] == (None, None, None, -1, -1, 0):
            target.__setstate__((3, *state[1:]))
        elif not (type(target) is dict and type(state) is dict and state.keys() <= {"_metadata"}):
            raise Refused(f"it fills a {type(target).__name__}")


class _Dispatch(dict):
    def __missing__(self, code: int):
        raise Refused(f"it needs pickle's opcode {chr(code)!r}")


_OPCODES = """PROTO STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS
BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE NONE NEWTRUE NEWFALSE
GLOBAL REDUCE BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET"""  # those of torch.save
_CODES = {getattr(pickle, name)[0] for name in _OPCODES.split()}
_DryRun.dispatch = _Dispatch({code: pickle._Unpickler.dispatch[code] for code in _CODES})
_DryRun.dispatch |= {
    pickle.SETITEM[0]: _DryRun.load_setitem,
    pickle.SETITEMS[0]: _DryRun.load_setitems,
    pickle.BUILD[0]: _DryRun.load_build,
    pickle.PROTO[0]: _DryRun.load_proto,
}


def _of(value, kind: type):
    if not isinstance(value, kind):
        raise Refused(f"found a {type(value).__name__} where a {kind.__name__.strip('_')} belongs")
    return value


def _tensor(flat, offset, size, stride, requires_grad, hooks, metadata=None) -> Tensor:
    """A view of a storage that lies within it, and repeats nothing."""
    numbers = (offset, *_of(size, tuple), *_of(stride, tuple))
    if not all(type(n) is int and n >= 0 for n in numbers) or len(size) != len(stride) or metadata:
        raise Refused("a tensor of it has a shape that cannot be")
    count = prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > len(_of(flat, Tensor)) or (count and last >= len(flat)):
        raise Refused("a tensor of it claims another size than it has")
    return flat.as_strided(size, stride, offset) if count else flat.new_empty(size)


def _dtype(kind, align=False, copy=True) -> np.dtype:
    if kind not in NUMBERS:
        raise Refused(f"it holds an array of {shown(kind)}")
    return np.dtype(kind, copy=True)


def _empty_array(kind, shape, code) -> np.ndarray:
    """What an array is before it is filled, as numpy writes it: torch.load makes it as large as it says."""
    if kind != "numpy ndarray" or shape != (0,) or code != b"b":
        raise Refused("an array of it claims another size than it has")
    return np.empty(0)


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    return _of(text, str).encode("latin1") if encoding == "latin1" else _of(None, str)


_CALLS = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, requires_grad, hooks: _of(tensor, Tensor),
    "collections OrderedDict": dict,
    "torch device": lambda kind, *number: _of(kind, str),
    "torch Size": lambda sizes: tuple(_of(sizes, (tuple, list))),
    "numpy dtype": _dtype,
    "_codecs encode": _encoded,
    "numpy.core.multiarray _reconstruct": _empty_array,
    "numpy._core.multiarray _reconstruct": _empty_array,
}
