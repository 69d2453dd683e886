"""Files of embeddings that were made to harm, and feature caches that are not what they say."""

import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch
from hostile import read_in_little_memory
from safetensors import safe_open
from safetensors.torch import save_file

from lever_lm.data.embeddings import cached_features, read_embeddings


def npy(path: Path, header: str, content: bytes = bytes(48)) -> Path:
    """A .npy file with a header of one's own."""
    text = header.encode().ljust(118) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content)
    return path


def safetensors(path: Path, header: dict | str, content: bytes = bytes(48)) -> Path:
    """A safetensors file with a header of one's own."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


def entry(shape, start: int = 0, end: int = 48, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def matrices(folder: Path) -> list[Path]:
    """Files of embeddings that are none."""

    def array(name: str, shape: str, descr: str = "'<f4'") -> Path:
        return npy(folder / f"{name}.npy", f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}")

    def tensors(name: str, header, content: bytes = bytes(48)) -> Path:
        return safetensors(folder / f"{name}.safetensors", header, content)

    return [
        array("huge", "(1000000000000, 768)"),
        array("large", "(100000000, 768)"),
        array("overflow", "(4611686018427387904, 4)"),
        array("negative", "(-3, 4)"),
        array("floats", "(3.0, 4)"),
        array("objects", "(3, 2)", "'|O'"),
        array("fields", "(3, 2)", "[('a', '<f4'), ('b', '<f4')]"),
        array("text", "(3, 4)", "'<U1'"),
        array("code", "__import__('os').getcwd()"),
        npy(folder / "nested.npy", "[" * 100),
        tensors("huge", {"x": entry([10**12, 768])}),
        tensors("beyond", {"x": entry([12, 12], 0, 576)}),
        tensors("negative", {"x": entry([-3, 4])}),
        tensors("overlap", {"x": entry([3, 4]), "y": entry([3, 4])}),
        tensors("gap", {"x": entry([2, 4], 16, 48)}),
        tensors("kind", {"x": entry([3, 4], dtype="C64")}),
        tensors("nested", '{"x":' * 100_000),
        tensors("no_object", "[1]"),
        safetensors(folder / "long.safetensors", "{}" + " " * 10),
    ]


def test_embeddings_that_claim_more_than_they_hold_are_refused_and_nothing_is_allocated(tmp_path):
    files = matrices(tmp_path)
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    told, memory = read_in_little_memory(read_embeddings, files)
    assert [path.name for path, line in zip(files, told, strict=True) if not line.startswith("refused")] == []
    assert [path.name for path, line in zip(files, told, strict=True) if str(path) not in line] == []
    assert memory < 100


def damaged(tensors: dict, kind: str) -> dict:
    """A features cache of which a part is not what it was."""
    name = "train_text"
    rows = tensors[name]
    replaced = {
        "rows": rows[:-1],
        "width": rows[:, :-1],
        "precision": rows.double(),
        "integers": rows.long(),
        "not finite": torch.where(rows == rows.max(), math.nan, rows),
        "flat": rows.flatten(),
    }
    if kind == "missing":
        return {key: tensor for key, tensor in tensors.items() if key != name}
    if kind == "width of a split":
        return {key: tensor[:, :-1] if key.startswith("train") else tensor for key, tensor in tensors.items()}
    return {**tensors, name: replaced[kind]}


@pytest.mark.parametrize(
    "kind", ["rows", "width", "precision", "integers", "not finite", "flat", "missing", "width of a split"]
)
def test_a_features_cache_with_the_right_stamp_and_wrong_content_is_made_again(
    digits, digits_config, features_file, tmp_path, kind
):
    path = tmp_path / "features.safetensors"
    with safe_open(features_file, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=header)
    assert cached_features(digits, digits_config.features, path) is not None
    broken = {name: tensor.contiguous() for name, tensor in damaged(tensors, kind).items()}
    save_file(broken, path, metadata=header)
    assert cached_features(digits, digits_config.features, path) is None


@pytest.mark.parametrize("header", ['{"x":' * 100_000, "[1]", "{}", '{"__metadata__":{"train":"' + "[" * 9999 + '"}}'])
def test_a_features_cache_of_a_hostile_header_is_none(digits, digits_config, tmp_path, header):
    path = safetensors(tmp_path / "features.safetensors", header, b"")
    assert cached_features(digits, digits_config.features, path) is None
    path.unlink()
    os.mkfifo(path)
    assert cached_features(digits, digits_config.features, path) is None
