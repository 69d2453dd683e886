"""Files of embeddings that a user brings: every format, other content, hostile files; and damaged feature caches."""

import json
import math
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import Executed, read_in_little_memory
from safetensors import safe_open
from safetensors.torch import save_file

from lever_lm.data.embeddings import cached_features, read_embeddings
from lever_lm.utils.errors import LeverError

MATRIX = np.random.default_rng(0).standard_normal((5, 3))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "kind", ["tensor.pt", "tensor.pth", "array.pt", "dict.pt", "array_dict.pth", "array.npy", "one.safetensors"]
)
def test_embeddings_are_read_from_every_format_as_float32(tmp_path, kind, dtype):
    tensor, array, path = torch.tensor(MATRIX).to(getattr(torch, dtype)), MATRIX.astype(dtype), tmp_path / kind
    if kind == "one.safetensors":
        save_file({"embeddings": tensor}, path)
    elif kind == "array.npy":
        np.save(path, array)
    else:
        content = {"tensor": tensor, "array": array, "dict": {"x": tensor}, "array_dict": {"x": array}}[path.stem]
        torch.save(content, path)
    read = read_embeddings(path)
    assert read.dtype == torch.float32
    assert torch.equal(read, tensor.float())


def test_bfloat16_strided_and_parameter_tensors_are_read(tmp_path):
    tensor = torch.tensor(MATRIX, dtype=torch.bfloat16)
    torch.save(torch.nn.Parameter(tensor).t(), tmp_path / "a.pt")
    assert torch.equal(read_embeddings(tmp_path / "a.pt"), tensor.t().float())
    np.save(tmp_path / "b.npy", np.asfortranarray(MATRIX).astype(">f4"))
    torch.testing.assert_close(read_embeddings(tmp_path / "b.npy"), torch.tensor(MATRIX, dtype=torch.float32))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.ones(4), "expected \\(N, D\\) floats"),
        (torch.ones(2, 3, dtype=torch.int32), "expected \\(N, D\\) floats"),
        (np.ones((2, 2, 2), dtype=np.float32), "expected \\(N, D\\) floats"),
        ({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, "2 tensors, expected one"),
        ({}, "0 tensors, expected one"),
        ({"a": "text"}, "holds a str"),
        ({"a": {"b": torch.ones(2, 3)}}, "holds a dict"),
        ([torch.ones(2, 3)], "found a list"),
        ("text", "found a str"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_torch_files_of_something_else_are_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "wrong.pt")
    with pytest.raises(LeverError, match=rf"wrong\.pt.*{words}"):
        read_embeddings(tmp_path / "wrong.pt")


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".safetensors"])
def test_cut_and_missing_files_folders_and_two_tensors_are_refused(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    {
        ".pt": torch.save,
        ".npy": lambda a, p: np.save(p, a),
        ".safetensors": lambda a, p: save_file({"x": torch.tensor(a)}, p),
    }[suffix](MATRIX, path)
    whole = path.read_bytes()
    for keep in (0, 1, 60, -5):
        path.write_bytes(whole[:keep])
        with pytest.raises(LeverError, match=r"cut\."):
            read_embeddings(path)
    (tmp_path / f"folder{suffix}").mkdir()
    for name in ("folder", "missing"):
        with pytest.raises(LeverError, match=rf"{name}\{suffix}"):
            read_embeddings(tmp_path / f"{name}{suffix}")
    if suffix == ".safetensors":
        save_file({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, path)
        with pytest.raises(LeverError, match="2 tensors"):
            read_embeddings(path)


@pytest.mark.parametrize("kind", ["pickle.pt", "inside.pt", "objects.npy", "pickle.npy", "pickle.safetensors"])
def test_code_in_a_file_of_embeddings_is_not_executed(tmp_path, kind):
    path, trap = tmp_path / kind, tmp_path / "executed"
    if kind == "inside.pt":
        torch.save({"x": Executed(trap)}, path)
    elif kind == "objects.npy":
        np.save(path, np.array([[Executed(trap)]], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Executed(trap)))
    with pytest.raises(LeverError, match=kind):
        read_embeddings(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Executed(trap)))
    assert trap.exists(), "it would have"


# ---------------------------------------------------------------------- hostile files


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
    files.append(tmp_path / "long.npy")
    files[-1].write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{}")
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
