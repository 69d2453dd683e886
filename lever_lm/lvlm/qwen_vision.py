"""Images through the vision tower of a Qwen, each of them once.

T tokens of an image, W numbers of each: the hidden size of the language model, and as many again for each layer of the
tower that is shown to it as well.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lever_lm.config.schema import LvlmConfig
from lever_lm.data import Image
from lever_lm.lvlm.feature_cache import GIB, FeatureCache
from lever_lm.lvlm.preprocess import chunked, chunked_patches, patches
from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError
from lever_lm.utils.progress import Track, Work
from lever_lm.utils.transformers_compat import first_line

_WORKERS = 8


class Vision:
    """The vision side of a Qwen, with its feature cache in `folder`. Images are shown within the config's budget
    of pixels. Until `give_tower` it can `expect` images alone. Raises LeverError naming an image that cannot be decoded
    or does not fit into memory."""

    def __init__(
        self,
        image_processor,
        config: LvlmConfig,
        folder: Path | None,
        track: Track,
        shards: Shards,
        device: torch.device,
        dtype: torch.dtype,
    ):
        import qwen_vl_utils  # noqa: F401 - once, and not in every process that decodes images

        self.image_processor, self.config, self.device, self.dtype = image_processor, config, device, dtype
        self.track, self.shards = track, shards
        disk = int(config.bank_disk * GIB)
        self.cache = FeatureCache(folder, memory=0, disk=disk, processes=shards.world)
        self._begun: tuple[list[Image], Iterator] | None = None

    def expect(self, images: Sequence[Image]) -> None:
        """Begin to decode, in processes of their own, what `see_together` of these images will encode first."""
        if self._workers > 0 and (mine := self._share(images)):
            self._begun = mine, self._decoded(mine)

    def give_tower(self, model) -> None:
        """Encode by a model, in what memory it has left."""
        self.model, self.cache.memory = model, self._memory()

    def tokens(self, image: Image) -> int:
        """Return T of an image that has been seen."""
        return math.prod(self.cache.grid(image)) // self.image_processor.merge_size**2

    def features(self, images: Sequence[Image]) -> list[Tensor]:
        """Return (T, W) of each image: from the cache, or made again where the cache has no whole features of it."""
        found = {image: self.cache.get(image, self.device) for image in dict.fromkeys(images)}
        gone = [image for image, f in found.items() if f is None or len(f) != self.tokens(image)]
        for chunk in chunked(gone):
            pixels, grids = patches(chunk, self.image_processor, self.config, self.dtype)
            found |= dict(zip(chunk, self._kept(chunk, self._tower(chunk, pixels, grids), grids), strict=True))
        return [found[image] for image in images]

    def see_together(self, images: Sequence[Image]) -> None:
        """Encode what is new, each process its share in whole chunks, which the others then find on disk. Where nothing
        may be written there, each process encodes all. A call of the whole job."""
        self.shards.wait()
        self.cache.find_written()
        self._encode(self._share(images))
        self.shards.wait()
        self.cache.find_written()
        self.see(images)

    def see(self, images: Sequence[Image]) -> None:
        """Encode what is new into the cache."""
        self._encode(self.cache.missing(images))

    def _share(self, images: Sequence[Image]) -> list[Image]:
        return [image for chunk in self.shards.share(chunked(self.cache.missing(images))) for image in chunk]

    @property
    def _workers(self) -> int:
        cores = (os.cpu_count() or 1) // self.shards.neighbours
        if self.config.workers < 0:
            return min(_WORKERS, max(1, cores - 1)) if self.device.type == "cuda" else 0
        return min(self.config.workers, cores)

    def _decoded(self, images: Sequence[Image]) -> Iterator:
        on_gpu = self.device.type == "cuda"
        return chunked_patches(images, self.image_processor, self.config, self.dtype, workers=self._workers, pin=on_gpu)

    @torch.inference_mode()
    def _encode(self, images: Sequence[Image]) -> None:
        begun, self._begun = self._begun, None
        if not images:
            return
        chunks = begun[1] if begun and begun[0] == images else self._decoded(images)
        del begun  # others that were expected are dropped
        before = None  # looked at and kept while the tower has the next
        try:
            what = f"vision: {len(images)} images"
            if self.shards.world > 1:
                what += f"; the share of rank {self.shards.rank} of {self.shards.world}"
            followed = Work(chunks, "images", lambda item: len(item[0]))
            for chunk, pixels, grids in self.track(followed, what, len(images)):
                before, done = (chunk, self._tower(chunk, pixels, grids), grids), before
                if done:
                    self._kept(*done)
        finally:
            if before:
                self._kept(*before)
            self.cache.flush()

    def _kept(self, images: Sequence[Image], features: list[Tensor], grids: Tensor) -> list[Tensor]:
        """Return the features of images, which the cache is given as well."""
        if not torch.stack([feature.isfinite().all() for feature in features]).all():
            broken = next(image for image, f in zip(images, features, strict=True) if not f.isfinite().all())
            raise LeverError(
                f"the image {broken}: the vision tower of {self.config.path} gives it NaN or infinite features: set "
                "lvlm.dtype=float32 or bfloat16, or its weights may be broken (lvlm.path)"
            )
        self.cache.add(images, features, list(map(tuple, grids.tolist())))
        return features

    def _tower(self, images: Sequence[Image], pixels: Tensor, grids: Tensor) -> list[Tensor]:
        """Return the features of images from their patches (ΣP, C) and grids (n, 3), in halves where they do not fit
        into memory."""
        try:
            output = self.model.get_image_features(pixels.to(self.device, non_blocking=True), grids.to(self.device))
        except torch.OutOfMemoryError as error:
            if len(images) == 1:
                raise LeverError(
                    f"the image {images[0]} of {len(pixels)} patches does not fit into the memory of "
                    f"{self.device}: a smaller lvlm.max_pixels or lvlm.bank_memory ({first_line(error)})"
                ) from error
            output = None
        if output is None:  # only here has the error let go of its tensors
            half = len(images) // 2
            middle = int(grids[:half].prod(-1).sum())
            first = self._tower(images[:half], pixels[:middle], grids[:half])
            return first + self._tower(images[half:], pixels[middle:], grids[half:])
        lengths = [len(feature) for feature in output.pooler_output]
        deeper = getattr(output, "deepstack_features", None) or ()
        # In 5.17 a deeper layer is one tensor of all images.
        layers = [layer.split(lengths) if isinstance(layer, Tensor) else layer for layer in deeper]
        features = [torch.cat(of_image, -1) for of_image in zip(output.pooler_output, *layers, strict=True)]
        expected = (grids.prod(-1) // self.image_processor.merge_size**2).tolist()
        if [len(feature) for feature in features] != expected:
            raise LeverError(
                f"the image {images[0]} and those after it: the vision tower gave {[len(f) for f in features]} tokens, "
                f"the grids promise {expected}"
            )
        return features

    def _memory(self) -> int:
        """Return the bytes of the device that the cache may take: as set, or a quarter of what is free."""
        if self.config.bank_memory > 0:
            return int(self.config.bank_memory * GIB)
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0] // 4
        return 4 * GIB
