"""Binary files that were made to harm: each is built for real and given to the function or command that would read it.

A file may be refused in one message or be read as the data it is. It is never executed, never makes a command hang, and
never allocates what it does not hold: such cases run in a child process with little memory.
"""

import contextlib
import gzip
import io
import json
import math
import os
import pickle
import shutil
import socket
import socketserver
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CHECKOUT, clean_environment, small_digits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from official import write_parquet
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lever_lm.config.schema import DataConfig
from lever_lm.data import load_dataset, open_image
from lever_lm.data.embeddings import cached_features, read_embeddings
from lever_lm.selectors.pointer.checkpoint import load_policy, v3_content
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.run_state import Journal
from lever_lm.training.select_checkpoint import read_history
from lever_lm.utils.errors import LeverError
from lever_lm.utils.paths import asset_path
from lever_lm.utils.pickle_scan import SHARED
from lever_lm.utils.safe_torch_load import load_torch

V3 = CHECKOUT / "tests/data" / "checkpoints" / "rce_epoch2_plain_L1.pt"
GIB = 1 << 30
MEMORY = 3 * GIB  # of address space, beyond what torch takes


def make(**kwargs) -> PointerSelector:
    torch.manual_seed(0)
    return PointerSelector(**{"d_model": 6, "hidden_dim": 8, **kwargs}).eval()


def content_of(**config) -> dict:
    return v3_content(make(), epoch=0, phase="rce", kl_beta=0.0, metrics={"val_loss": 1.0}, config=config)


class Executed:
    """Pickles to a shell command that would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, how=zipfile.ZIP_STORED) -> Path:
    """A zip as torch.save makes it, around any pickle."""
    with zipfile.ZipFile(path, "w", how) as made:
        made.writestr("archive/data.pkl", pickled)
        made.writestr("archive/byteorder", "little")
        for key, content in (storages or {}).items():
            made.writestr(f"archive/data/{key}", content)
        made.writestr("archive/version", "3\n")
    return path


def tensor_opcodes(size: tuple[int, ...], stride: tuple[int, ...], claimed: int, kind: str = "FloatStorage") -> bytes:
    """The pickle of a tensor over storage 0, whatever it claims."""

    def number(value: int) -> bytes:
        long = value.to_bytes(16, "little", signed=True)
        return b"\x8a\x10" + long

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    storage += number(claimed) + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + numbers(size) + numbers(stride)
    return rebuilt + b"\x89ccollections\nOrderedDict\n)RtR"


def limited(code: str, *arguments) -> subprocess.CompletedProcess:
    """Run code in a process that may have 60 seconds, and MEMORY more of address space than its imports took."""
    command = [sys.executable, "-c", _LIMIT + code, *map(str, arguments)]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60)


_LIMIT = f"""
import resource
import PIL.Image, lever_lm.selectors.pointer.checkpoint, lever_lm.data.embeddings
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + {MEMORY}
resource.setrlimit(resource.RLIMIT_AS, (most, most))
"""


LOADS = """
import resource, sys
from lever_lm.selectors.pointer.checkpoint import load_policy
from lever_lm.utils.errors import LeverError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        load_policy(path)
        print("loaded", path)
    except LeverError as error:
        print(f"refused {error}")
print("MiB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


# ---------------------------------------------------------------------- torch files: code


def in_place(kind: str, path: Path, trap: Path) -> None:
    """A file that executes when it is unpickled by a reader that would."""
    bad = Executed(trap)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(bad, protocol=2))
    elif kind == "newer pickle":
        path.write_bytes(pickle.dumps({"model_state_dict": bad}, protocol=5))
    elif kind == "legacy":
        torch.save({**content_of(), "extra": bad}, path, _use_new_zipfile_serialization=False)
    elif kind == "tar":
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as made:
            for name in ("storages", "tensors", "pickle"):
                content = pickle.dumps(bad, protocol=2)
                header = tarfile.TarInfo(name)
                header.size = len(content)
                made.addfile(header, io.BytesIO(content))
    elif kind == "opcodes":
        archive(
            path,
            b"\x80\x02cos\nsystem\n(X" + struct.pack("<I", len(f"touch {trap}")) + f"touch {trap}".encode() + b"tR.",
        )
    elif kind == "built":
        archive(path, b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}b.")
    else:
        content = content_of(dataset="digits")
        place = {"metrics": content["metrics"], "config": content["config"], "policy": content["config"]["policy"]}
        place[kind]["nested"] = [{"deep": (1, bad)}]
        torch.save(content, path)


@pytest.mark.parametrize(
    "kind", ["pickle", "newer pickle", "legacy", "tar", "opcodes", "built", "metrics", "config", "policy"]
)
def test_code_in_a_torch_file_is_never_executed(tmp_path, kind):
    path, trap = tmp_path / "evil.pt", tmp_path / "executed"
    in_place(kind, path, trap)
    with pytest.raises(LeverError, match=r"evil\.pt is not a checkpoint .*it was not executed$") as caught:
        load_policy(path)
    assert "\n" not in str(caught.value)
    assert not trap.exists()
    if kind not in ("tar", "built"):
        with open(path, "rb") as file:
            pickle.load(file) if "pickle" in kind else torch.load(file, weights_only=False)
        assert trap.exists(), "it would have"


def test_every_command_that_takes_a_checkpoint_refuses_one_with_code(tmp_path, lever):
    trap, path = tmp_path / "executed", tmp_path / "grpo_epoch1.pt"
    in_place("metrics", path, trap)
    for command in (
        ("infer", "--ckpt", path),
        ("convert", path),
        ("train", "--embeddings", path, "--rl-data", path),
        ("best-ckpt", tmp_path),
    ):
        done = lever(*command)
        assert done.status != 0
        assert len(done.err.strip().splitlines()) == 1, done.err
        assert "Traceback" not in done.err
        assert not trap.exists(), command


# ---------------------------------------------------------------------- torch files: size


def stored(path: Path, value: bytes) -> Path:
    """A checkpoint whose weights are what some opcodes make, with a storage of one number."""
    weights = b"}X\x10\x00\x00\x00model_state_dict}X\x11\x00\x00\x00query_proj.weight" + value + b"ss."
    return archive(path, b"\x80\x02" + weights, {"0": b"\0\0\x80?"})


def array_opcodes(shape: int) -> bytes:
    """A numpy array of one number that claims `shape`."""
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8\x89\x88tR"
    dtype += b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    bytes_ = b"c_codecs\nencode\n(X\x08\x00\x00\x00abcdefghX\x06\x00\x00\x00latin1tR"
    made = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85X\x01\x00\x00\x00btR"
    return made + b"(K\x01\x8a\x08" + shape.to_bytes(8, "little") + b"\x85" + dtype + b"\x89" + bytes_ + b"tb"


MISFITS = ("layers", "hidden", "narrow", "thin")  # files that can be read, and are no policy


def bombs(folder: Path) -> list[Path]:
    """Small files that ask for much."""
    many = 10**12
    laughs = (
        b"\x80\x02]K\x01a"
        + b"".join(b"q" + bytes([i]) + b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60))
        + b"."
    )
    files = [
        stored(folder / "repeated.pt", tensor_opcodes((many,), (0,), 1)),
        stored(folder / "twice.pt", tensor_opcodes((2,), (0,), 1)),
        stored(folder / "beyond.pt", tensor_opcodes((many,), (1,), 1)),
        stored(folder / "just_beyond.pt", tensor_opcodes((2,), (1,), 1)),
        stored(folder / "storage.pt", tensor_opcodes((1,), (1,), many)),
        stored(folder / "negative.pt", tensor_opcodes((1,), (-1,), 1)),
        stored(folder / "array.pt", array_opcodes(many)),
        stored(folder / "bytearray.pt", b"cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R"),
        stored(folder / "empty_tensor.pt", b"ctorch\nFloatTensor\nJ\x00\x00\x00\x7f\x85R"),
        stored(folder / "deep_tuple_key.pt", b"}N" + b"\x85" * 300_000 + b"Ns"),
        stored(folder / "deep_list.pt", b"]" * 100_000 + b"a" * 99_999),
        stored(folder / "self.pt", b"}q\x01X\x01\x00\x00\x00ah\x01s"),
        archive(folder / "laughs.pt", laughs),
        archive(folder / "zeros.pt", bytes(GIB >> 3), how=zipfile.ZIP_DEFLATED),
    ]
    content = content_of()
    content["config"]["policy"]["num_layers"] = 10**9
    torch.save(content, folder / "layers.pt")
    content = content_of()
    content["config"]["policy"] |= {"hidden_dim": 10**9, "d_model": 10**9}
    torch.save(content, folder / "hidden.pt")
    narrow = torch.zeros(100_000, 1)
    torch.save({"model_state_dict": {"query_proj.weight": narrow}}, folder / "narrow.pt")
    one = torch.zeros(256, 256)
    tied = {f"cross_attn_layers.{i}.in_proj_weight": one for i in range(3_000)}
    torch.save({"model_state_dict": {"query_proj.weight": one, **tied}}, folder / "tied.pt")
    wide = torch.zeros(1000, 1000)
    thin = {f"cross_attn_layers.{i}.in_proj_bias": torch.zeros(1) for i in range(300)}
    torch.save({"model_state_dict": {"query_proj.weight": wide, **thin}}, folder / "thin.pt")
    return [*files, *(folder / f"{name}.pt" for name in ("tied", *MISFITS))]


def test_files_that_claim_more_than_they_hold_are_refused_and_nothing_is_allocated(tmp_path):
    files = bombs(tmp_path)
    done = limited(LOADS, *files)
    assert done.returncode == 0, done.stderr[-2000:]
    *told, memory = done.stdout.splitlines()
    assert [line.split(" ")[0] for line in told] == ["refused"] * len(files), done.stdout
    assert [path.name for path, line in zip(files, told, strict=True) if str(path) not in line] == []
    unread = [path.stem for path, line in zip(files, told, strict=True) if "is not a checkpoint" in line]
    assert unread == [path.stem for path in files if path.stem not in MISFITS]
    assert all(len(line) < 500 for line in told)
    assert int(memory.split()[1]) < 300, done.stdout
    assert done.stderr == ""


def test_tied_weights_and_repeated_settings_are_no_bomb(tmp_path):
    shared = torch.arange(600.0).view(20, 30)
    content = {"a": shared, "b": shared, "c": shared.t(), "d": shared[3:5, ::2], "e": [{"x": "long text" * 9}] * SHARED}
    torch.save(content, tmp_path / "tied.pt")
    read = load_torch(tmp_path / "tied.pt")
    assert all(torch.equal(read[name], content[name]) for name in "abcd")
    assert read["e"] == content["e"]


def test_a_zip_that_claims_more_bytes_than_it_has_is_refused(tmp_path):
    path = tmp_path / "claims.pt"
    torch.save(content_of(), path)
    whole = bytearray(path.read_bytes())
    place = whole.index(b"PK\x01\x02")
    whole[place + 20 : place + 28] = struct.pack("<II", 0x7FFFFFFF, 0x7FFFFFFF)
    path.write_bytes(whole)
    with pytest.raises(LeverError, match=r"claims\.pt .*more bytes than it has"):
        load_policy(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_anywhere_is_refused(tmp_path, share):
    path = tmp_path / "cut.pt"
    whole = V3.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(LeverError, match=r"^[^\n]*cut\.pt is not a checkpoint[^\n]*$"):
        load_policy(path)


@pytest.mark.parametrize("read", [load_torch, load_policy, read_embeddings], ids=lambda f: f.__name__)
def test_pipes_devices_and_folders_are_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    for name in ("pipe.pt", "folder.pt", "zero.pt"):
        with pytest.raises(LeverError, match=rf"{name}: (it is no regular file|Is a directory)"):
            read(tmp_path / name)


# ---------------------------------------------------------------------- torch files: kinds

ODD_TENSORS = {
    "sparse": lambda: torch.eye(8).to_sparse(),
    "compressed": lambda: torch.eye(8).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.eye(8), 0.1, 0, torch.qint8),
    "meta": lambda: torch.empty(8, 8, device="meta"),
    "complex": lambda: torch.zeros(8, 8, dtype=torch.complex64),
    "integer": lambda: torch.zeros(8, 8, dtype=torch.int64),
    "boolean": lambda: torch.zeros(8, 8, dtype=torch.bool),
    "no tensor": lambda: [0.0] * 64,
}


@pytest.mark.filterwarnings("ignore")  # what torch says of these kinds
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_weights_of_another_kind_are_refused(tmp_path, kind):
    content = content_of()
    content["model_state_dict"]["cand_proj.weight"] = ODD_TENSORS[kind]()
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(LeverError, match=r"^[^\n]*odd\.pt[^\n]*$"):
        load_policy(tmp_path / "odd.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_read_as_ours(tmp_path, dtype):
    content = content_of()
    content["model_state_dict"] = {name: tensor.to(dtype) for name, tensor in content["model_state_dict"].items()}
    torch.save(content, tmp_path / "half.pt")
    weights = load_policy(tmp_path / "half.pt").state_dict()
    assert all(torch.equal(weights[name], tensor.float()) for name, tensor in content["model_state_dict"].items())


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 3},
        {"num_heads": 0},
        {"num_heads": True},
        {"dropout": math.nan},
        {"dropout": -1},
        {"temperature": 0.0},
        {"temperature": math.inf},
        {"stop": 1},
        {"scorer": ["dot"]},
        {"state_update": {"a": 1}},
        {3: 4},
        {"num_layers": 0},
    ],
    ids=str,
)
def test_a_shape_that_cannot_be_is_refused(tmp_path, change):
    content = content_of()
    content["config"]["policy"] |= change
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(LeverError, match=r"odd\.pt[^\n]*PointerSelector[^\n]*$"):
        load_policy(tmp_path / "odd.pt")


def test_of_a_strangers_metrics_numbers_are_left(tmp_path):
    metrics = {"val_loss": 1.5, 3: 4.0, "d": [[1]] * 2, "e": {"f": 1}, "g": torch.ones(3), "h": None}
    torch.save({**content_of(), "metrics": metrics}, tmp_path / "grpo_epoch1.pt")
    (row,) = read_history(RunFolder(tmp_path), None).rows
    assert row == {"val_loss": 1.5, "phase": "grpo", "epoch": 1}


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(min_size=1, max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=5) | st.integers(-5, 5), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PLAIN, st.sampled_from([torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool]))
def test_what_is_plain_is_read_as_torch_reads_it(tmp_path, plain, dtype):
    path = tmp_path / "plain.pt"
    tensor = torch.arange(12).view(3, 4).to(dtype)
    torch.save({"plain": plain, "tensor": tensor, "turned": tensor.t(), "array": np.ones((2, 3))}, path)
    mine = load_torch(path)
    with torch.serialization.safe_globals([np.ndarray, np.dtype, type(np.dtype("f8")), np.zeros(0).__reduce__()[0]]):
        theirs = torch.load(path, weights_only=True)
    assert (mine["plain"], mine["array"].tolist()) == (theirs["plain"], theirs["array"].tolist())
    assert type(mine["plain"]) is type(theirs["plain"])
    for name in ("tensor", "turned"):
        assert torch.equal(mine[name], theirs[name])
        assert (mine[name].dtype, mine[name].stride()) == (theirs[name].dtype, theirs[name].stride())


# ---------------------------------------------------------------------- state.pt

INPUTS = {"data": "d"}


def run_of(folder: Path, **change) -> Path:
    """A run of one epoch, its state changed: a dotted name → another value, or none for a deleted one."""
    policy = make()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    policy.query_proj.weight.sum().backward()
    optimizer.step()
    journal = Journal(RunFolder(folder), {"policy": policy.shape}, INPUTS, lambda text: None)
    extra = {"old": policy.state_dict(), "reference": policy.state_dict(), "beta": 0.1, "online": None}
    journal.commit({"phase": "grpo", "epoch": 1, "train_loss": 0.5, "beta": 0.1}, policy, optimizer, extra)
    state = load_torch(folder / "state.pt")
    for name, value in change.items():
        *outer, last = name.split("__")
        inner = state
        for key in outer:
            inner = inner[int(key) if key.isdecimal() else key]
        inner[int(last) if last.isdecimal() else last] = value
    torch.save(state, folder / "state.pt")
    return folder


BROKEN_STATES = {
    "rows": [None, [], [1], [{}], {"a": 1}, "text"],
    "rows__0__train_loss": [[1.0], math.nan, {"a": 1}, torch.ones(2)],
    "rows__0__epoch": ["1", 2.0, True],
    "rows__0__phase": ["sft", None, 3],
    "rows__0__warnings": [["a"], {"a": 1}],
    "epoch": [None, 7, "1"],
    "phase": [None, "rce", 1],
    "policy": [None, {}, {"a": torch.ones(1)}, [1], {"query_proj.weight": "x"}],
    "policy__query_proj.weight": [torch.ones(3, 3), torch.ones(8, 8, dtype=torch.int64), torch.full((8, 8), math.nan)],
    "optimizer": [None, {}, [1], {"state": {}, "param_groups": 3}, {"state": [], "param_groups": []}],
    "optimizer__param_groups__0__lr": ["fast", None, math.inf],
    "optimizer__param_groups__0__params": [[0], "abc", None],
    "optimizer__state": [{0: 1}, {99: {}}, {"a": {}}, {0: {"step": torch.ones(7)}}],
    "rng": [None, {}, {"cpu": torch.ones(3)}, {"cpu": torch.ones(3, dtype=torch.uint8)}, [1]],
    "extra": [None, [1], "x"],
    "extra__beta": ["x", math.nan, None],
    "extra__old": [{"a": torch.ones(1)}, [1], "x"],
    "extra__online": [[1], {"sequences": 1}, {"sequences": 1, "rewards": 2, "mask": 3}],
    "inputs": [None, [1], {"data": ["d"]}, "x"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BROKEN_STATES.items() for value in values],
    ids=lambda value: str(value)[:24].replace("\n", " "),
)
def test_a_state_that_is_broken_anywhere_is_refused_in_one_message(tmp_path, name, value):
    run = run_of(tmp_path / "run", **{name: value})
    policy = make()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    journal = Journal(RunFolder(run), {"policy": policy.shape}, INPUTS, lambda text: None)

    def go_on():
        journal.resume()
        journal.restore("grpo", policy, optimizer)

    with pytest.raises(LeverError, match=r"^[^\n]*--overwrite[^\n]*$"):
        go_on()


def test_the_state_of_another_policy_is_refused_and_that_of_the_same_is_taken(tmp_path):
    run = run_of(tmp_path / "run")
    for shape, fits in (({}, True), ({"hidden_dim": 12}, False), ({"num_layers": 2}, False)):
        policy = make(**shape)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
        journal = Journal(RunFolder(run), {"policy": policy.shape}, INPUTS, lambda text: None)
        journal.resume()
        if fits:
            assert journal.restore("grpo", policy, optimizer)["beta"] == 0.1
        else:
            with pytest.raises(LeverError, match=r"state\.pt is no state of this run \(policy holds .*another policy"):
                journal.restore("grpo", policy, optimizer)


# ---------------------------------------------------------------------- arrays and safetensors


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
    code = LOADS.replace(
        "from lever_lm.selectors.pointer.checkpoint import load_policy",
        "from lever_lm.data.embeddings import read_embeddings",
    )
    code = code.replace("load_policy(path)", "read_embeddings(__import__('pathlib').Path(path))")
    done = limited(code, *files)
    assert done.returncode == 0, done.stderr[-2000:]
    *told, memory = done.stdout.splitlines()
    assert [path.name for path, line in zip(files, told, strict=True) if not line.startswith("refused")] == []
    assert [path.name for path, line in zip(files, told, strict=True) if str(path) not in line] == []
    assert int(memory.split()[1]) < 100
    assert done.stderr == ""


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


BAD_BANKS = {
    "nested": ({}, "[" * 100_000),
    "a number": ({}, "3"),
    "rows": ({"a" * 16: torch.zeros(3, 5)}, json.dumps({"a" * 16: [1, 4, 4]})),
    "flat": ({"a" * 16: torch.zeros(4)}, json.dumps({"a" * 16: [1, 4, 4]})),
    "integers": ({"a" * 16: torch.zeros(4, 5, dtype=torch.int64)}, json.dumps({"a" * 16: [1, 4, 4]})),
    "widths": (
        {"a" * 16: torch.zeros(4, 5), "b" * 16: torch.zeros(4, 6)},
        json.dumps({"a" * 16: [1, 4, 4], "b" * 16: [1, 4, 4]}),
    ),
    "a huge grid": ({"a" * 16: torch.zeros(4, 5)}, json.dumps({"a" * 16: [10**9, 10**9, 10**9]})),
    "negative": ({"a" * 16: torch.zeros(4, 5)}, json.dumps({"a" * 16: [1, -4, -4]})),
    "infinite": ({"a" * 16: torch.zeros(4, 5)}, '{"aaaaaaaaaaaaaaaa": [1, 4, 1e999]}'),
}


@pytest.mark.parametrize("kind", BAD_BANKS)
def test_a_bank_file_that_is_not_what_it_says_is_thrown_out(tmp_path, kind):
    from lever_lm.lvlm.feature_cache import FeatureCache

    tensors, grids = BAD_BANKS[kind]
    good, bad = tmp_path / f"{'1' * 16}.safetensors", tmp_path / f"{'2' * 16}.safetensors"
    save_file({"c" * 16: torch.zeros(4, 5)}, good, metadata={"grids": json.dumps({"c" * 16: [1, 4, 4]})})
    save_file(tensors, bad, metadata={"grids": grids})
    bank = FeatureCache(tmp_path, memory=1 << 20, disk=1 << 20)
    assert len(bank) == 1
    assert (good.exists(), bad.exists()) == (True, False)


# ---------------------------------------------------------------------- images


def picture(**how) -> bytes:
    """An image file of 8 × 6 pixels."""
    file = io.BytesIO()
    mode = how.pop("mode", "RGB")
    Image.new("RGB", (8, 6), (200, 100, 50)).convert(mode).save(file, **{"format": "JPEG", **how})
    return file.getvalue()


def png(width: int, height: int, rows: bytes, *before: tuple[bytes, bytes]) -> bytes:
    """A grey PNG of any size and rows, with chunks before its pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    middle = b"".join(chunk(*pair) for pair in before)
    return b"\x89PNG\r\n\x1a\n" + head + middle + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def gif(width: int, height: int, frame: tuple[int, int]) -> bytes:
    """A GIF whose frame may be larger than its screen."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02D\x01\x00;"


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\n(TRAP) (w) file closefile showpage\n%%EOF\n"
SVG = b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='6'><image href='file:///etc/passwd'/></svg>"
BAD_IMAGES = {
    "eps": (EPS, "it is none of JPEG"),
    "svg": (SVG, "it is none of JPEG"),
    "pdf": (b"%PDF-1.4\n1 0 obj << >> endobj\n%%EOF\n", "it is none of JPEG"),
    "psd": (b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 6, 8, 8, 3) + bytes(40), "it is none of JPEG"),
    "ppm": (b"P6 8 6 255\n" + bytes(144), "it is none of JPEG"),
    "html": (b"<html><script>1</script></html>", "it is none of JPEG"),
    "empty": (b"", "it is none of JPEG"),
    "bomb": (png(12_000, 8_000, bytes(100)), "pixels"),
    "larger bomb": (png(65_000, 65_000, bytes(100)), "pixels"),
    "bomb of a frame": (gif(8, 6, (60_000, 60_000)), "pixels"),
    "line": (png(60_000, 1, bytes(60_001)), "ratio over 200"),
    "nothing": (png(0, 0, b""), ""),
    "no rows": (gif(0, 0, (0, 0)), ""),
    "text bomb": (png(8, 6, bytes(54), (b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26), 9))), "too large"),
    "profile bomb": (png(8, 6, bytes(54), (b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 26), 9))), "too large"),
    "truncated": (picture()[:200], ""),
    "tiff of directories": (b"II*\0\x08\0\0\0" + struct.pack("<H", 65535) + b"\xff" * 400, ""),
    "webp": (b"RIFF\x24\0\0\0WEBPVP8 " + b"\xff" * 40, ""),
    "bmp": (b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54, 40, 2**30, 2**30, 1, 24, 0) + bytes(24), "pixels"),
}


@pytest.fixture(scope="module")
def bad_images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, (content, _) in BAD_IMAGES.items():
        (folder / f"{name}.jpg").write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_hostile_image_is_refused_in_one_message(bad_images, kind):
    words = BAD_IMAGES[kind][1]
    with pytest.raises(LeverError, match=rf"cannot decode the image .*{kind}\.jpg: .*{words}") as caught:
        open_image(str(bad_images / f"{kind}.jpg"))
    told = str(caught.value)
    assert "\n" not in told
    assert ".." not in told.replace(str(bad_images), "")
    assert "--skip-bad-examples" in told


def test_the_largest_and_the_longest_image(tmp_path):
    """Of 89 megapixels and of sides 1 : 200; larger or longer ones are refused by their heads alone."""
    cases = {
        (9459, 9459): "truncated", (9460, 9460): "9460 by 9460 pixels, more than 89478485",
        (200, 1): None, (201, 1): "ratio over 200", (1, 200): None, (1, 201): "ratio over 200",
    }  # fmt: skip
    for (width, height), why in cases.items():
        path = tmp_path / f"{width}x{height}.png"
        path.write_bytes(png(width, height, bytes(min(500, (width + 1) * height))))
        if why is None:
            assert open_image(str(path)).size == (width, height)
        else:
            with pytest.raises(LeverError, match=why):
                open_image(str(path))


DECODES = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from lever_lm.data import open_image
from lever_lm.utils.errors import LeverError
def problem(path):
    try:
        open_image(path)
    except LeverError as error:
        return f"refused {error}"
    return "opened"
open_image(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ThreadPoolExecutor(8) as pool:
    for told in pool.map(problem, sys.argv[2:] * 3):
        print(told)
print("MiB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_nothing_of_a_decoder_reaches_the_screen_from_threads_either_and_nothing_is_allocated(bad_images, tmp_path):
    (tmp_path / "good.jpg").write_bytes(picture())
    files = sorted(bad_images.iterdir())
    done = limited(DECODES, tmp_path / "good.jpg", *files)
    assert (done.returncode, done.stderr) == (0, "")
    *told, memory = done.stdout.splitlines()
    assert sum(line.startswith("refused") for line in told) == len(told) == 3 * len(files)
    assert int(memory.split()[1]) < 400


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(100), b"<html><script>alert(1)</script>", SVG, EPS])
def test_a_polyglot_is_the_picture_that_it_begins_with(tmp_path, content):
    (tmp_path / "poly.jpg").write_bytes(picture() + content)
    assert open_image(str(tmp_path / "poly.jpg")).tobytes() == _opened(picture()).tobytes()


def _opened(content: bytes):
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


@pytest.mark.parametrize(
    ("form", "mode"),
    [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    + [("GIF", "P"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("JPEG", "CMYK")],
)
def test_every_mode_keeps_its_brightness(tmp_path, form, mode):
    path = tmp_path / "picture"
    Image.new("L", (8, 6), 255 if mode == "1" else 128).convert(mode).save(path, format=form)
    seen = np.asarray(open_image(str(path)))
    assert abs(float(seen.mean()) - (255 if mode == "1" else 128)) < 4


def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off(tmp_path):
    path = tmp_path / "depth.png"
    Image.fromarray(np.full((6, 8), 0x8000, dtype=np.uint16)).save(path)
    assert np.asarray(open_image(str(path))).mean() == 128


def test_of_an_animation_the_first_frame_is_shown_whatever_their_number(tmp_path):
    frames = [Image.new("P", (64, 48), i % 256) for i in range(500)]
    frames[0] = Image.new("RGB", (64, 48), (250, 0, 0))
    frames[0].save(tmp_path / "many.gif", save_all=True, append_images=frames[1:])
    assert open_image(str(tmp_path / "many.gif")).getpixel((3, 3)) == (250, 0, 0)


@pytest.mark.parametrize(
    "error", [struct.error("x"), IndexError("x"), zlib.error("x"), MemoryError(), RecursionError("x")]
)
def test_whatever_a_decoder_raises_is_an_error_that_names_the_image(tmp_path, monkeypatch, error):
    from PIL import ImageOps

    def fail(image):
        raise error

    (tmp_path / "picture.jpg").write_bytes(picture())
    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.raises(LeverError, match=r"cannot decode the image .*picture\.jpg"):
        open_image(str(tmp_path / "picture.jpg"))


def test_an_image_that_is_a_pipe_a_device_or_a_folder_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe", "zero", "folder"):
        with pytest.raises(LeverError, match=rf"{name}\.jpg: (it is no regular file|Is a directory)"):
            open_image(str(tmp_path / f"{name}.jpg"))


# ---------------------------------------------------------------------- images that a table names


class Server(BaseHTTPRequestHandler):
    """Serves what `files` says under a path: status, headers, body. Counts what it was asked."""

    def do_GET(self):
        self.asked.append(self.path)
        status, headers, body = self.files.get(self.path, (404, {}, b""))
        if callable(body):
            body = body(self.asked.count(self.path))
            status = 200 if body else 503
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """An address on this machine, and a handler to fill."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler = type("Own", (Server,), {"files": {}, "asked": []})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as serving:
        serving.daemon_threads = True
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{serving.server_address[1]}", handler
        serving.shutdown()
        thread.join()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a parquet copy whose training images are as given, and loads it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "copy"

    def write(images: list) -> Path:
        for split in ("train", "val"):
            entries = images if split == "train" else [{"bytes": picture(), "path": None}]
            rows = [
                {"question_id": i, "image": image, "question": f"what is {i} in {split}?", "answers": ["cat"] * 10}
                for i, image in enumerate(entries, 1)
            ]
            write_parquet(root / f"{split}.parquet", rows)
        return root

    def load(images: list, **how):
        root = write(images)
        return load_dataset(DataConfig("copy", str(root), how.pop("coco_path", str(root)), **how))

    load.root, load.write = root, write
    return load


def named(place: str) -> dict:
    return {"bytes": None, "path": place}


def test_a_path_is_taken_inside_the_folder_of_the_data_or_of_the_images(table, tmp_path):
    for folder in ("copy/pictures", "coco/train2014"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jpg").write_bytes(picture())
    places = ["pictures/a.jpg", str(table.root / "pictures/a.jpg"), "train2014/a.jpg", "pictures/../pictures/a.jpg"]
    held = {"bytes": picture(quality=30), "path": "gone.jpg"}
    data = table([*map(named, places), held], coco_path=str(tmp_path / "coco"))
    assert [open_image(example.image).size for example in data.train_examples] == [(8, 6)] * 5
    assert [row["image"].size for row in data.train] == [(8, 6)] * 5
    assert len({example.image_id for example in data.train_examples}) == 2, "told apart by content"
    strings = table(places, coco_path=str(tmp_path / "coco"))
    assert [e.image for e in strings.train_examples] == [e.image for e in data.train_examples[:4]]
    (table.root / "pictures/a.jpg").write_bytes(picture(quality=10))
    changed = table(places, coco_path=str(tmp_path / "coco"))
    assert changed.fingerprint != strings.fingerprint


OUTSIDE = ["/etc/passwd", "../secret.jpg", "link.jpg", "linked/secret.jpg", "gone.jpg", "pipe.jpg", "folder.jpg"]


@pytest.mark.parametrize("place", [*OUTSIDE, "a\0b.jpg", "x" * 5000, "circle.jpg"], ids=lambda p: repr(p)[:20])
def test_a_path_that_leads_elsewhere_is_refused_by_row_question_and_option(table, tmp_path, place):
    root = table.write([named("a.jpg")])
    (tmp_path / "secret.jpg").write_bytes(picture())
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "linked").symlink_to(tmp_path)
    (root / "circle.jpg").symlink_to(root / "circle.jpg")
    (root / "folder.jpg").mkdir()
    os.mkfifo(root / "pipe.jpg")
    for image in (named(place), {"bytes": b"", "path": place}):
        with pytest.raises(
            LeverError, match=r"train\.parquet, row 1, question 2: its image [^\n]*--skip-bad"
        ) as caught:
            table([{"bytes": picture(), "path": None}, image])
        assert len(str(caught.value)) < 700
    assert len(table([{"bytes": picture(), "path": None}, named(place)], skip_bad_examples=True).skipped) == 1


NEVER = [
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "ftp://127.0.0.1/a.jpg",
    "data:image/jpeg;base64,AAAA",
    "zip://a.jpg::http://127.0.0.1/a.zip",
    "hf://datasets/a/b/c.jpg",
    "s3://bucket/a.jpg",
    "http://",
    "http://[",
    "http:///a.jpg",
    "http://127.0.0.1:99999999/a.jpg",
    "gopher://127.0.0.1/",
]


@pytest.mark.parametrize("address", NEVER)
def test_an_address_of_another_scheme_is_never_followed(table, monkeypatch, address):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail(f"it was followed: {a}"))
    with pytest.raises(LeverError, match=r"train\.parquet, row 0, question 1: its image [^\n]*$"):
        table([named(address)], allow_remote=True)


def test_an_address_is_refused_unless_it_is_allowed_and_fetched_once_then(table, server, tmp_path, monkeypatch):
    address, handler = server
    handler.files["/a.jpg"] = (200, {}, picture())
    handler.files["/moved.jpg"] = (302, {"Location": "/a.jpg"}, b"")
    images = [named(f"{address}/a.jpg"), named(f"{address}/moved.jpg"), named(f"{address}/a.jpg")]
    with pytest.raises(LeverError, match=r"row 0, question 1: its image is at [^\n]*--allow-remote"):
        table(images)
    assert handler.asked == []
    for _ in range(2):
        data = table(images, allow_remote=True)
        assert [open_image(example.image).size for example in data.train_examples] == [(8, 6)] * 3
        assert sorted(handler.asked) == ["/a.jpg", "/a.jpg", "/moved.jpg"]
    kept = sorted((tmp_path / "cache" / "lever_lm_images").iterdir())
    assert len(kept) == 2
    assert all(path.read_bytes() == picture() for path in kept)


def test_a_failure_that_may_pass_is_repeated(table, server, monkeypatch):
    address, handler = server
    handler.files["/late.jpg"] = (200, {}, lambda times: picture() if times > 1 else b"")
    assert len(table([named(f"{address}/late.jpg")], allow_remote=True).train_examples) == 1
    assert handler.asked == ["/late.jpg"] * 2


WRONG_ANSWERS = {
    "absent": ((404, {}, b""), "answered 404"),
    "page": ((200, {"Content-Type": "image/jpeg"}, b"<html></html>"), "no image"),
    "eps": ((200, {}, EPS), "no image"),
    "bomb": ((200, {}, png(12_000, 8_000, bytes(100))), "no image.*pixels"),
    "file": ((302, {"Location": "file:///etc/passwd"}, b""), "redirected to file"),
    "circle": ((302, {"Location": "/circle"}, b""), "over and over"),
    "nowhere": ((302, {}, b""), "answered 302"),
    "large": ((200, {}, bytes(3000)), "larger than"),
    "packed": ((200, {"Content-Encoding": "gzip"}, gzip.compress(bytes(1 << 20))), "larger than|nothing came"),
}


@pytest.mark.parametrize("kind", WRONG_ANSWERS)
def test_what_comes_from_an_address_is_kept_if_it_is_an_image(table, server, tmp_path, monkeypatch, kind):
    from lever_lm.data import image_download as remote

    monkeypatch.setattr(remote, "MAX_BYTES", 2000)
    address, handler = server
    answer, words = WRONG_ANSWERS[kind]
    handler.files[f"/{kind}"] = answer
    with pytest.raises(LeverError, match=rf"row 0, question 1: its image '{address}/{kind}': [^\n]*({words})"):
        table([named(f"{address}/{kind}")], allow_remote=True)
    left = table(
        [named(f"{address}/{kind}"), {"bytes": picture(), "path": None}], allow_remote=True, skip_bad_examples=True
    )
    assert len(left.skipped) == len(left.train_examples) == 1
    folder = tmp_path / "cache" / "lever_lm_images"
    assert [path.name for path in folder.iterdir()] == []


def test_a_host_that_is_silent_is_not_asked_for_ever(table, monkeypatch):
    from lever_lm.data import image_download as remote

    tries = []

    async def nothing(client, address):
        tries.append(address)
        raise remote._MayPass("nothing came")

    monkeypatch.setattr(remote, "_tried", nothing)
    images = [named(f"http://127.0.0.1:9/{i}.jpg") for i in range(100)]
    data = table([*images, {"bytes": picture(), "path": None}], allow_remote=True, skip_bad_examples=True)
    assert len(data.skipped) == 100
    assert len(tries) < 5 + remote.CONNECTIONS


def test_a_slow_server_is_given_up(table, server, monkeypatch):
    from lever_lm.data import image_download as remote

    monkeypatch.setattr(remote, "TIMEOUT", 0.2)
    monkeypatch.setattr(remote, "_TRIES", 1)
    address, handler = server
    handler.files["/slow"] = (200, {}, lambda times: time.sleep(1) or picture())
    with pytest.raises(LeverError, match="did not come within"):
        table([named(f"{address}/slow")], allow_remote=True)


def test_the_option_reaches_the_loader_from_the_command_line(table, server, lever, monkeypatch):
    address, handler = server
    handler.files["/a.jpg"] = (200, {}, picture())
    root = table.write([named(f"{address}/a.jpg")] * 3)
    monkeypatch.setenv("OKVQA_PATH", str(root))
    command = ("rollout", "--dataset", "okvqa_local", "--set", "features.encoder=asset:tiny-clip", "--limit", "2")
    done = lever(*command)
    assert (done.status, handler.asked) == (1, [])
    assert "--allow-remote" in done.err
    lever(*command, "--allow-remote")
    assert handler.asked == ["/a.jpg"]


def test_an_address_in_an_official_file_is_ignored(tmp_path, server):
    address, handler = server
    folder = small_digits(tmp_path / "digits", train=3, val=3)
    for path in folder.glob("*questions.json"):
        content = json.loads(path.read_text())
        for question in content["questions"]:
            question |= {"image": f"{address}/a", "coco_url": f"{address}/b", "flickr_url": "file:///etc/passwd"}
        path.write_text(json.dumps(content))
    data = load_dataset(DataConfig("small", str(folder), str(folder), allow_remote=True))
    assert all(Path(e.image).parent.parent == folder for e in (*data.train_examples, *data.val_examples))
    assert handler.asked == []


# ---------------------------------------------------------------------- folders of models


@pytest.fixture(scope="module")
def pickled_clip(tmp_path_factory) -> Path:
    """The shipped CLIP with its weights in a pickle."""
    folder = tmp_path_factory.mktemp("models") / "clip"
    shutil.copytree(asset_path("asset:tiny-clip"), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def encode(folder: Path):
    from lever_lm.data.embeddings import ClipEncoder

    return ClipEncoder(str(folder), "cpu", 4)


def test_a_model_whose_weights_are_a_pickle_is_loaded_without_executing_any(pickled_clip, tmp_path):
    encode(pickled_clip)
    folder, trap = tmp_path / "evil", tmp_path / "executed"
    shutil.copytree(pickled_clip, folder)
    torch.save({**torch.load(folder / "pytorch_model.bin"), "extra": Executed(trap)}, folder / "pytorch_model.bin")
    with pytest.raises(LeverError, match=r"cannot load the CLIP encoder [^\n]*evil[^\n]*$"):
        encode(folder)
    assert not trap.exists()
    with open(folder / "pytorch_model.bin", "rb") as file:
        torch.load(file, weights_only=False)
    assert trap.exists(), "it would have"


@pytest.mark.parametrize("asset", ["tiny-clip", "tiny-qwen2.5-vl"])
def test_code_that_comes_with_a_model_is_not_imported(tmp_path, asset):
    from lever_lm.config.schema import LvlmConfig, PromptConfig
    from lever_lm.lvlm.backend import load_local

    folder, trap = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(asset_path(f"asset:{asset}"), folder)
    (folder / "own.py").write_text(f"open({str(trap)!r}, 'w')\nclass Own: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
    for file in folder.glob("*config.json"):
        content = json.loads(file.read_text())
        content["auto_map"] = dict.fromkeys(names, "own.Own")
        file.write_text(json.dumps(content))
    with contextlib.suppress(LeverError):  # to be refused is as good
        if asset == "tiny-clip":
            encode(folder)
        else:
            load_local(LvlmConfig(path=str(folder), dtype="float32"), PromptConfig(), "cpu")
    assert not trap.exists()
    assert "own" not in sys.modules


# ---------------------------------------------------------------------- two archives in one file


def zipped(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


GREEDY = b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x40\x85R."  # a GiB of zeros
HARMLESS = b"\x80\x02}."


@pytest.mark.parametrize("order", [0, 1])
def test_a_second_pickle_in_other_case_is_not_read_in_its_place(tmp_path, order):
    pair = [("x/data.pkl", HARMLESS), ("x/DATA.PKL", GREEDY)]
    path = tmp_path / "a.pt"
    path.write_bytes(zipped([*(pair[::-1] if order else pair), ("x/version", b"3\n"), ("x/byteorder", b"little")]))
    with pytest.raises(LeverError, match="two parts of it have one name"):
        load_torch(path)


def test_a_second_table_of_contents_is_not_read_in_its_place(tmp_path):
    rest = [("x/version", b"3\n"), ("x/byteorder", b"little")]
    greedy, harmless = (zipped([("x/data.pkl", content), *rest]) for content in (GREEDY, HARMLESS))
    path = tmp_path / "a.pt"
    path.write_bytes(greedy + harmless)  # zipfile reads the second, whose offsets are those of the first
    with pytest.raises(LeverError, match=r"two tables|not where it is said|it is damaged|cut short"):
        load_torch(path)
    path.write_bytes(harmless[:-2] + b"\x04\x00" + b"more")
    with pytest.raises(LeverError, match="two tables of contents"):
        load_torch(path)


def test_what_training_configs_hold_beside_plain_values_is_read(tmp_path):
    content = {"config": {"dtype": torch.float32, "device": torch.device("cpu")}, "tied": [torch.ones(9)] * 20}
    torch.save(content, tmp_path / "a.pt")
    found = load_torch(tmp_path / "a.pt")
    assert found["config"] == content["config"]
    assert len(found["tied"]) == 20


def test_a_state_that_would_take_the_place_of_a_dicts_methods_is_refused(tmp_path):
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R}X\x03\x00\x00\x00getK\x05sb."
    (tmp_path / "a.pt").write_bytes(zipped([("x/data.pkl", pickled), ("x/version", b"3\n")]))
    with pytest.raises(LeverError, match="it fills a dict"):
        load_torch(tmp_path / "a.pt")
