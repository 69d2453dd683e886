"""Copies of the shipped model with a part of its processor spoilt, and what has to be said of each."""

import json
import shutil
from pathlib import Path

from lever_lm.utils.paths import asset_path

TINY = "asset:tiny-qwen2.5-vl"


def copied(folder: Path) -> Path:
    """Copy the shipped model to a folder that is not there yet."""
    shutil.copytree(asset_path(TINY), folder)
    return folder


def put(folder: Path, name: str, text: str) -> Path:
    """Write one of its files anew. Returns the folder."""
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def edited(folder: Path, name: str, **values) -> Path:
    """Set keys of one of its JSON files. Returns the folder."""
    return put(folder, name, json.dumps({**json.loads((folder / name).read_text(encoding="utf-8")), **values}))


def without(name: str):
    """A function that takes a file from a folder and returns the folder."""

    def spoil(folder: Path) -> Path:
        (folder / name).unlink()
        return folder

    return spoil


# What is done to a copy, and words of what is said of it.
SPOILT = {
    "no template": (without("chat_template.jinja"), ["chat_template.jinja"]),
    "a template without images": (
        lambda folder: put(folder, "chat_template.jinja", "{{ messages[0]['content'][1]['text'] }}"),
        ["0 image tokens of one image"],
    ),
    "a template that fails": (
        lambda folder: put(folder, "chat_template.jinja", "{{ raise_exception('not so') }}"),
        ["not so"],
    ),
    "no image processor": (without("processor_config.json"), ["lacks preprocessor_config.json"]),
    "no tokenizer": (without("tokenizer.json"), ["lacks tokenizer.json"]),
    "an unknown class": (
        lambda folder: edited(folder, "processor_config.json", processor_class="NoSuchProcessor"),
        ["transformers", "processor_config.json"],
    ),
}
