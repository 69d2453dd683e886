"""From image files to the patches that a Qwen vision tower reads: decoded and resized ahead of it, on other cores."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from lever_lm.config.schema import LvlmConfig
from lever_lm.data import Image, open_image
from lever_lm.lvlm.images import fitted
from lever_lm.utils.errors import LeverError

CHUNK = 16  # images that go through the vision tower together
_AHEAD = 2  # chunks of each process that are made before they are asked for


def patches(images: Sequence[Image], image_processor, config: LvlmConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the patches (ΣP, C) of all images one after another, and their grids (n, 3) in patches: time, height,
    width. Raises LeverError naming an image that cannot be read or shown."""
    factor = image_processor.patch_size * image_processor.merge_size
    resized = [fitted(open_image(image), config, factor) for image in images]
    made = image_processor(images=resized, return_tensors="pt")
    return made["pixel_values"].to(dtype), made["image_grid_thw"]


def _made(chunk: list[Image], work: tuple):
    """Return the `patches` of a chunk, or the LeverError that one of its images raised: the loader would raise it with
    the worker's traceback as its text."""
    try:
        return patches(chunk, *work)
    except LeverError as error:
        return error


def chunked(images: Sequence[Image]) -> list[list[Image]]:
    """Return the images in order, CHUNK at a time."""
    return [list(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]


def chunked_patches(
    images: Sequence[Image], image_processor, config: LvlmConfig, dtype: torch.dtype, *, workers: int, pin: bool
) -> Iterator[tuple[list[Image], Tensor, Tensor]]:
    """Return an iterator of (images, patches, grids), one chunk after another. With workers, chunks are made in as many
    processes from now on. pin: the patches lie where a GPU can fetch them by itself."""
    chunks, make = chunked(images), partial(_made, work=(image_processor, config, dtype))
    workers = min(workers, len(chunks))
    if workers <= 0:
        return _whole(chunks, map(make, chunks), pin)
    done = _in_processes(make, chunks, workers)
    next(done)  # until the processes are at work
    return _whole(chunks, done, pin)


def _whole(chunks: Sequence[list[Image]], done: Iterator, pin: bool) -> Iterator[tuple[list[Image], Tensor, Tensor]]:
    for chunk, made in zip(chunks, done, strict=True):
        if isinstance(made, LeverError):
            raise made
        pixels, grids = made
        yield chunk, pixels.pin_memory() if pin else pixels, grids


def _in_processes(make: Callable, chunks: Sequence[list[Image]], workers: int) -> Iterator:
    """Yield None once the processes are at work, and then make(chunk) of each in order, some chunks ahead. Raises
    LeverError where a process dies."""
    context = torch.multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool, rest = ProcessPoolExecutor(workers, context, _as_worker), iter(chunks)
    try:
        ahead = deque(pool.submit(make, chunk) for chunk in islice(rest, _AHEAD * workers))
        yield None
        while ahead:
            made = ahead.popleft().result()
            ahead.extend(pool.submit(make, chunk) for chunk in islice(rest, 1))
            yield made
    except BrokenProcessPool as error:  # the memory that it shares with this process is often too small
        raise LeverError(
            "a process that decodes images died: more shared memory (docker run --shm-size=8g), or --set lvlm.workers=0"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _as_worker() -> None:
    """Use one core, leave Ctrl-C to the process that started this one, and end when that does, even if killed."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
