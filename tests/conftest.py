"""Shared by all tests: the fixtures of helpers.py, one thread, the same drawn examples on every machine."""

import gc
import os
import shutil
import signal
from pathlib import Path

import torch
from hypothesis import settings

pytest_plugins = ["helpers", "trials", "lvlm_helpers"]

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=100)
settings.load_profile("repeatable")


MEMORY = Path("/dev/shm")
ROOM = 4 << 30  # bytes that must be free there; the tests of a process have under 1 GB of files at a time


def pytest_configure(config):
    torch.set_num_threads(1)
    gc.set_threshold(100_000)  # as in a `lever` process
    # What a command writes is synced: on a disk that is milliseconds a file, and twenty for each batch of answers.
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    # A shell without job control starts what runs in its background deaf to Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that take longest, in this order: begun first, none of them is what the other processes wait for at the end.
# test_fuzz forks for each input, which costs less while the process is small.
_LONG = ("test_fuzz", "test_docs", "test_families", "test_distributed", "test_commands", "test_openai_server")
_LONG += ("test_selectors", "test_preflight", "test_their_files", "test_retriever", "test_end_to_end")
_LONG += ("test_seed_document", "test_crashes", "test_warmups", "test_online", "test_grpo", "test_qwen2_5_vl")
_LONG += ("test_tasks_end_to_end",)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else len(_LONG))


def pytest_collection_finish():
    gc.freeze()  # modules and tests: not to be looked through at each collection of garbage
