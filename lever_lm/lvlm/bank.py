"""What the vision tower made of each image, made once: in memory up to one bound, on disk up to another.

An image of 640 × 480 is 391 tokens of 2,048 numbers in the 3B model: 1.6 MB, and 22 GB for all of OK-VQA. On disk they
lie in safetensors files that are mapped, not read; what one command made, the next one and other processes find.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from lever_lm.data import Image, image_digest
from lever_lm.errors import LeverError
from lever_lm.runs import write_tensors

GIB = 1 << 30
_OPEN_FILES = 128
Grid = tuple[int, int, int]  # patches in time, height, width


class VisionBank:
    """Features (T, H) of images, by their content. `memory` and `disk` are bounds in bytes; without a folder, or with
    a bound of 0, nothing is written."""

    def __init__(self, folder: Path | None, *, memory: int, disk: int):
        self.folder = folder if disk > 0 else None
        self.bounds = {"memory": memory, "disk": disk}
        self._grids: dict[str, Grid] = {}
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self.in_memory = 0  # bytes
        self._files: dict[str, Path] = {}
        self._sizes: dict[Path, int] = {}
        self._open = lru_cache(_OPEN_FILES)(_open)
        self._writer, self._writing = ThreadPoolExecutor(1, "vision-bank"), Future()
        self._writing.set_result(None)
        self.find_written()

    def __len__(self) -> int:
        """How many images have been seen."""
        return len(self._grids)

    def find_written(self) -> None:
        """Learn of files that are new in the folder: of an earlier command, or of another process."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._sizes:
                continue
            grids = _grids(path, self._open(path))
            self._sizes[path] = path.stat().st_size
            for digest, grid in grids.items():
                self._files[digest], self._grids[digest] = path, tuple(grid)

    def missing(self, images: Sequence[Image]) -> list[Image]:
        """The distinct images that have never been seen."""
        return [image for image in dict.fromkeys(images) if image_digest(image) not in self._grids]

    def grid(self, image: Image) -> Grid:
        """The patches of an image that has been seen."""
        return self._grids[image_digest(image)]

    def add(self, images: Sequence[Image], features: Sequence[Tensor], grids: Sequence[Grid]) -> None:
        """Remember images, and write them to one file while the folder has room: behind the caller's back, one file at
        a time. Raises LeverError where the file before this one could not be written."""
        self.flush()
        digests = [image_digest(image) for image in images]
        self._grids |= dict(zip(digests, grids, strict=True))
        size = sum(map(_size, features))
        if self.folder is not None and sum(self._sizes.values()) + size <= self.bounds["disk"]:
            path = self.folder / f"{digests[0]}.safetensors"
            header = {"grids": json.dumps(dict(zip(digests, grids, strict=True)))}
            tensors = dict(zip(digests, features, strict=True))
            self._sizes[path] = size
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
        """The features of an image on a device, None where neither memory nor disk had room for them."""
        digest = image_digest(image)
        if digest in self._memory:
            self._memory.move_to_end(digest)
            return self._memory[digest]
        if digest not in self._files:
            return None
        feature = self._open(self._files[digest]).get_tensor(digest).to(device)
        self._keep(digest, feature)
        return feature

    def _keep(self, digest: str, feature: Tensor) -> None:
        """Hold features in memory, in place of those that were not asked for the longest."""
        self.in_memory += _size(feature) - _size(self._memory.pop(digest, None))
        self._memory[digest] = feature
        while self.in_memory > self.bounds["memory"]:
            self.in_memory -= _size(self._memory.popitem(last=False)[1])


def _size(feature: Tensor | None) -> int:
    return 0 if feature is None else feature.numel() * feature.element_size()


def _open(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise LeverError(
            f"cannot read the image features {path}: {error}; delete the file, it is made again"
        ) from error


def _grids(path: Path, file) -> dict[str, list[int]]:
    """The header's grids by digest."""
    try:
        return json.loads(file.metadata()["grids"])
    except (TypeError, KeyError, ValueError) as error:
        raise LeverError(f"{path} holds no image features of ours: move it out of the cache folder") from error
