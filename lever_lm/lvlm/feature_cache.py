"""Features of images, each made by the vision tower once: in memory up to one bound, on disk up to another.

An image of 640 × 480 is 391 tokens of 2,048 numbers in the 3B model: 1.6 MB, and 22 GB for all of OK-VQA. On disk they
are in safetensors files that are mapped, not read; the next command and other processes find them. Features that are
broken or gone there are made again.
"""

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lever_lm.data import Image, image_digest
from lever_lm.utils.atomic_io import sweep, write_tensors
from lever_lm.utils.safe_parse import loads

GIB = 1 << 30
_OPEN_FILES = 128
_PATCHES = 4  # of an image that are one token
_FLOATS = {"F32", "F16", "BF16"}  # as safetensors calls them
_NAME = re.compile(r"[0-9a-f]{16}\.safetensors")
Grid = tuple[int, int, int]  # patches in time, height, width


class FeatureCache:
    """Features (T, H) of images, by their content. `memory` and `disk` are bounds in bytes, `disk` for all the
    `processes` that write to the folder. Without a folder, or with `disk` 0, nothing is written."""

    def __init__(self, folder: Path | None, *, memory: int, disk: int, processes: int = 1):
        self.folder, self.memory = folder if disk > 0 else None, memory
        self._grids: dict[str, Grid] = {}
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self.in_memory = 0  # bytes
        self._files: dict[str, Path] = {}
        self._looked_at: set[Path] = set()
        self._open = lru_cache(_OPEN_FILES)(_open)
        self._writer, self._writing = ThreadPoolExecutor(1, "feature-cache"), Future()
        self._writing.set_result(None)
        self.find_written()
        there = sum(path.stat().st_size for path in self._looked_at if path.exists())
        self._room = (disk - there) // processes  # bytes that this process may write
        if self.folder is not None:
            sweep(self.folder)

    def __len__(self) -> int:
        """Return how many images have been seen."""
        return len(self._grids)

    def find_written(self) -> None:
        """Learn of new files in the folder, of an earlier command or of another process. Broken files are deleted."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            if path in self._looked_at or not _NAME.fullmatch(path.name) or not path.is_file():
                continue
            grids = _grids(path)
            if grids is None:
                path.unlink(missing_ok=True)
                continue
            self._looked_at.add(path)
            self._files |= dict.fromkeys(grids, path)
            self._grids |= grids

    def missing(self, images: Sequence[Image]) -> list[Image]:
        """Return the distinct images that have never been seen."""
        return [image for image in dict.fromkeys(images) if image_digest(image) not in self._grids]

    def grid(self, image: Image) -> Grid:
        """Return the patches of an image that has been seen."""
        return self._grids[image_digest(image)]

    def add(self, images: Sequence[Image], features: Sequence[Tensor], grids: Sequence[Grid]) -> None:
        """Remember images, and write them to one file in the background while the folder has room, one file at a time.
        Raises LeverError where the file before this one could not be written."""
        self.flush()
        digests = [image_digest(image) for image in images]
        self._grids |= dict(zip(digests, grids, strict=True))
        size = sum(map(_size, features))
        if self.folder is not None and size <= self._room:
            name = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
            path = self.folder / f"{name}.safetensors"
            header = {"grids": json.dumps(dict(zip(digests, grids, strict=True)))}
            self._room -= size
            self._looked_at.add(path)
            tensors = dict(zip(digests, features, strict=True))
            self._writing = self._writer.submit(self._write, path, tensors, header)
        for digest, feature in zip(digests, features, strict=True):
            self._keep(digest, feature)

    def flush(self) -> None:
        """Wait until what was added is on disk. Raises LeverError where it could not be written."""
        self._writing.result()

    def _write(self, path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        write_tensors(path, {digest: tensor.cpu().contiguous() for digest, tensor in tensors.items()}, header)
        self._files |= dict.fromkeys(tensors, path)

    def get(self, image: Image, device) -> Tensor | None:
        """Return the features of an image on a device; None where neither memory nor disk has them whole."""
        digest = image_digest(image)
        if digest in self._memory:
            self._memory.move_to_end(digest)
            return self._memory[digest]
        feature = self._read(digest)
        if feature is not None:
            feature = feature.to(device)
            self._keep(digest, feature)
        return feature

    def _read(self, digest: str) -> Tensor | None:
        from safetensors import SafetensorError

        if digest not in self._files:
            return None
        try:
            feature = self._open(self._files[digest]).get_tensor(digest)
        except (OSError, SafetensorError):
            feature = None
        # the ends tell of NaN and infinity too, in a tenth of the time
        if feature is None or not bool(torch.stack(feature.aminmax()).isfinite().all()):
            del self._files[digest]
            return None
        return feature

    def _keep(self, digest: str, feature: Tensor) -> None:
        """Hold features in memory, in place of the least recently used."""
        self.in_memory += _size(feature) - _size(self._memory.pop(digest, None))
        self._memory[digest] = feature
        while self.in_memory > self.memory:
            self.in_memory -= _size(self._memory.popitem(last=False)[1])


def _size(feature: Tensor | None) -> int:
    return 0 if feature is None else feature.numel() * feature.element_size()


def _open(path: Path):
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def _grids(path: Path) -> dict[str, Grid] | None:
    """Return the grids in the header of a file, by digest; None for a file that is not one of ours, or broken."""
    from safetensors import SafetensorError

    try:
        with _open(path) as file:
            grids = {digest: tuple(grid) for digest, grid in loads(file.metadata()["grids"]).items()}
            slices = {digest: file.get_slice(digest) for digest in file.keys()}  # noqa: SIM118 - not a dict
            shapes = {digest: part.get_shape() for digest, part in slices.items()}
            floats = all(part.get_dtype() in _FLOATS for part in slices.values())
            ((width,),) = {tuple(shape[1:]) for shape in shapes.values()}
            whole = all(len(grid) == 3 and all(type(n) is int and n > 0 for n in grid) for grid in grids.values())
            expected = {digest: [prod(grid) // _PATCHES, width] for digest, grid in grids.items()}
    except (OSError, SafetensorError, TypeError, KeyError, ValueError, AttributeError):
        return None
    return grids if floats and whole and shapes == expected else None
