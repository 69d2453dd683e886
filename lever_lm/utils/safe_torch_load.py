"""Torch files of any origin, read as data: tensors, numeric numpy arrays and plain values, and nothing is called.

`torch.load(weights_only=True)` reads them and runs no code of a file's. But fifty bytes can make it allocate 10 GB
(`bytearray`), and a megabyte ends the process (the hash of a deep tuple). So each file is looked through before: its
zip, in which another archive could hide, and its pickle (pickle_scan.py). What passes is no larger than a few times the
file. Source: PEP 307, and the notes on serialization in torch's documentation.
"""

import codecs
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from lever_lm.utils.atomic_io import open_regular
from lever_lm.utils.errors import LeverError
from lever_lm.utils.pickle_scan import NUMBERS, Refused, look_through

_BLOCK = 1 << 20
_TAIL = 98  # bytes of the three records at the end of a zip


def load_torch(path: str | Path, expect: type | tuple[type, ...] = dict, what: str = "checkpoint"):
    """Return the content of a file of torch.save: tensors, numeric numpy arrays and plain values only. Raises
    LeverError when the file is missing or no regular one, or holds anything else."""
    with open_regular(path, f"the {what}") as file:
        try:
            _look_through(file)
            file.seek(0)
            with torch.serialization.safe_globals(_numpy_arrays()):
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # its bytes can fail zipfile and pickletools in any way
            why = error if isinstance(error, Refused) else "or it is cut short"
            raise LeverError(
                f"{path} is not a {what} of tensors and plain values ({why}); it was not executed"
            ) from error
    if not isinstance(content, expect):
        kinds = " or ".join(kind.__name__ for kind in (expect if isinstance(expect, tuple) else (expect,)))
        raise LeverError(f"{path}: expected a {kinds}, found a {type(content).__name__}")
    return content


@lru_cache(maxsize=1)
def _numpy_arrays() -> list:
    """Return what an array of floats or integers is pickled with, under the names that numpy 1 and 2 give it."""
    names = [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]
    numbers = [type(np.dtype(kind)) for kind in NUMBERS]
    reconstruct = np.zeros(0).__reduce__()[0]
    return [*((reconstruct, name) for name in names), np.ndarray, np.dtype, *numbers, codecs.encode]


def _look_through(file: BinaryIO) -> None:
    """Raise Refused, or whatever zipfile and pickle do, at what is not read."""
    start, size = file.read(6), file.seek(0, 2)
    if start[:2] == b"\x80\x02" or start[:4] == b"stor":
        raise Refused("it is a plain pickle, or in torch's format before 1.6, which is not read; torch.save it anew")
    with zipfile.ZipFile(file) as archive:
        members = _members(archive, file, size)
        (pickled,) = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise Refused("its numbers are big-endian")

        def size_of(key: str) -> int:
            with archive.open(f"{folder}data/{key}") as part:  # reading it checks place, length and checksum
                return sum(map(len, iter(lambda: part.read(_BLOCK), b"")))

        look_through(archive.read(pickled), size_of, size)


def _members(archive: zipfile.ZipFile, file: BinaryIO, size: int) -> set[str]:
    """Return the names in a zip, in which no file is larger than it is there and torch.load sees the same files."""
    infos = archive.infolist()
    if any(info.compress_type or info.file_size != info.compress_size or info.flag_bits & 1 for info in infos):
        raise Refused("parts of it are compressed or encrypted")
    if sum(info.file_size for info in infos) > size:
        raise Refused("it claims to hold more bytes than it has")
    # torch.load goes to where the end says that the directory begins, zipfile counts back from it.
    file.seek(max(size - _TAIL, 0))
    tail = file.read()
    said = {int.from_bytes(tail[-6:-2], "little")} - {0xFFFFFFFF}
    if tail[:4] == b"PK\6\6":
        said.add(int.from_bytes(tail[48:56], "little"))
    if tail[-22:-18] != b"PK\5\6" or tail[-2:] != b"\0\0" or said != {archive.start_dir}:
        raise Refused("it has two tables of contents")
    if len({info.filename.lower() for info in infos}) != len(infos):  # torch.load does not look at case
        raise Refused("two parts of it have one name")
    if any(info.filename.endswith("/constants.pkl") for info in infos):
        raise Refused("it is a TorchScript archive")
    return {info.filename for info in infos}
