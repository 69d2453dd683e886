"""Torch files of anybody's making, read as data: tensors, numeric numpy arrays and plain values, and nothing is called.

`torch.load(weights_only=True)` reads them and runs no code of a file's. But fifty bytes can make it allocate 10 GB
(`bytearray`), and a megabyte ends the process (the hash of a deep tuple). So each file is looked through before: its
zip, in which another archive could hide, and its pickle (dryrun.py). What passes is no larger than a few times the
file. Source: PEP 307, and the notes on serialization in torch's documentation.
"""

import codecs
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from lever_lm.utils.atomic_io import open_regular
from lever_lm.utils.errors import LeverError
from lever_lm.utils.pickle_scan import NUMBERS, Refused, look_through

_BLOCK = 1 << 20
_HEADER, _TAIL = 30, 98  # bytes of a zip's records: before a member, less its name; and the three at the end


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
    """What an array of floats or integers is pickled with, under the names that numpy 1 and 2 give it."""
    names = [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]
    numbers = [type(np.dtype(kind)) for kind in NUMBERS]
    reconstruct = np.zeros(0).__reduce__()[0]
    return [*((reconstruct, name) for name in names), np.ndarray, np.dtype, *numbers, codecs.encode]


def _look_through(file: BinaryIO) -> None:
    """Raise Refused, or whatever zipfile and pickletools do, at what is not read."""
    start = file.read(6)
    if start[:2] == b"\x80\x02" or start[:4] == b"stor":
        raise Refused("it is a plain pickle, or in torch's format before 1.6, which is not read; torch.save it anew")
    members = _members(file)
    if any(name.endswith("/constants.pkl") for name in members):
        raise Refused("it is a TorchScript archive")
    (pickled,) = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    folder = pickled.removesuffix("data.pkl")
    order = members.get(f"{folder}byteorder")
    if order is not None and b"".join(_blocks(file, order)) != b"little":
        raise Refused("its numbers are big-endian")
    pickled = b"".join(_blocks(file, members[pickled]))

    def size_of(key: str) -> int:
        return sum(map(len, _blocks(file, members[f"{folder}data/{key}"])))

    look_through(pickled, size_of, file.seek(0, 2))


def _members(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip, none of which is larger than it is there."""
    with zipfile.ZipFile(file) as archive:
        infos, start = archive.infolist(), archive.start_dir
    if any(info.compress_type or info.file_size != info.compress_size or info.flag_bits & 1 for info in infos):
        raise Refused("parts of it are compressed or encrypted")
    if sum(info.file_size for info in infos) > file.seek(0, 2):
        raise Refused("it claims to hold more bytes than it has")
    # torch.load goes to where the end says that the directory begins, zipfile counts back from it.
    file.seek(max(file.seek(0, 2) - _TAIL, 0))
    tail = file.read()
    said = {int.from_bytes(tail[-6:-2], "little")} - {0xFFFFFFFF}
    if tail[:4] == b"PK\6\6":
        said.add(int.from_bytes(tail[48:56], "little"))
    if tail[-22:-18] != b"PK\5\6" or tail[-2:] != b"\0\0" or said != {start}:
        raise Refused("it has two tables of contents")
    members = {info.filename: info for info in infos}
    if len({name.lower() for name in members}) != len(infos):  # torch.load does not look at case
        raise Refused("two parts of it have one name")
    return members


def _blocks(file: BinaryIO, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """The bytes of an uncompressed member, all of which are there and undamaged."""
    file.seek(info.header_offset)
    header = file.read(_HEADER)
    name = file.read(int.from_bytes(header[26:28], "little"))
    if header[:4] != b"PK\3\4" or name != info.filename.encode():
        raise Refused("a part of it is not where it is said to be")
    file.seek(int.from_bytes(header[28:30], "little"), 1)  # padding
    left, checksum = info.file_size, 0
    while block := file.read(min(left, _BLOCK)):
        left, checksum = left - len(block), zlib.crc32(block, checksum)
        yield block
    if left or checksum != info.CRC:
        raise Refused("its checksums are wrong: it is damaged")
