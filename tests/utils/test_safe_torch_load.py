"""Torch files that were made to harm: each is built for real and given to the function or command that would read it.

A file is refused in one message or read as the data it is. It is never executed, never makes a command hang, and never
allocates what it does not hold: such cases run in a process with little memory.
"""

import io
import math
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CHECKOUT
from hostile import Executed, read_in_little_memory, small_policy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lever_lm.data.embeddings import read_embeddings
from lever_lm.selectors.pointer.checkpoint import load_policy, v3_content
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.select_checkpoint import read_history
from lever_lm.utils.errors import LeverError
from lever_lm.utils.pickle_scan import SHARED
from lever_lm.utils.safe_torch_load import load_torch

V3 = CHECKOUT / "tests/data" / "checkpoints" / "rce_epoch2_plain_L1.pt"


def content_of(**config) -> dict:
    return v3_content(small_policy(), epoch=0, phase="rce", kl_beta=0.0, metrics={"val_loss": 1.0}, config=config)


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
        command = f"touch {trap}".encode()
        archive(path, b"\x80\x02cos\nsystem\n(X" + struct.pack("<I", len(command)) + command + b"tR.")
    elif kind == "built":
        archive(path, b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}b.")
    else:
        content = content_of(dataset="digits")
        place = {"metrics": content["metrics"], "config": content["config"], "policy": content["config"]["policy"]}
        place[kind]["nested"] = [{"deep": (1, bad)}]
        torch.save(content, path)


def test_a_pickle_that_names_a_second_protocol_is_refused_before_torch_warns_of_it(tmp_path):
    archive(tmp_path / "two.pt", b"\x80\x02\x80\x05}.")
    with pytest.raises(LeverError, match="protocol 2"):
        load_torch(tmp_path / "two.pt")


@pytest.mark.parametrize(
    "kind",
    ["pickle", "newer pickle", "legacy", "tar", "opcodes", "built", "metrics", "config", "policy"],
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
    twice = (b"q%c](h%ch%ce" % (i, i, i) for i in range(60))
    laughs = b"\x80\x02]K\x01a" + b"".join(twice) + b"."
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
        archive(folder / "zeros.pt", bytes(1 << 27), how=zipfile.ZIP_DEFLATED),
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
    told, memory = read_in_little_memory(load_policy, files)
    assert [line.split(" ")[0] for line in told] == ["refused"] * len(files)
    assert [path.name for path, line in zip(files, told, strict=True) if str(path) not in line] == []
    unread = [path.stem for path, line in zip(files, told, strict=True) if "is not a checkpoint" in line]
    assert unread == [path.stem for path in files if path.stem not in MISFITS]
    assert all(len(line) < 500 for line in told)
    assert memory < 300


def test_tied_weights_and_repeated_settings_are_no_bomb(tmp_path):
    shared = torch.arange(600.0).view(20, 30)
    content = {"a": shared, "b": shared, "c": shared.t(), "d": shared[3:5, ::2], "e": [{"x": "long text" * 9}] * SHARED}
    content |= {"config": {"dtype": torch.float32, "device": torch.device("cpu")}, "tied": [torch.ones(9)] * 20}
    torch.save(content, tmp_path / "tied.pt")
    read = load_torch(tmp_path / "tied.pt")
    assert all(torch.equal(read[name], content[name]) for name in "abcd")
    assert (read["e"], read["config"], len(read["tied"])) == (content["e"], content["config"], 20)


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
        *({"num_heads": count} for count in (3, 0, True)),
        *({"dropout": share} for share in (math.nan, -1)),
        *({"temperature": value} for value in (0.0, math.inf)),
        *({"stop": 1}, {"scorer": ["dot"]}, {"state_update": {"a": 1}}, {3: 4}, {"num_layers": 0}),
    ],
    ids=str,
)
def test_a_shape_that_cannot_be_is_refused(tmp_path, change):
    content = content_of()
    content["config"]["policy"] |= change
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(LeverError, match=r"odd\.pt[^\n]*PointerSelector[^\n]*$"):
        load_policy(tmp_path / "odd.pt")


def test_of_a_checkpoints_metrics_only_numbers_are_left(tmp_path):
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


# ---------------------------------------------------------------------- two archives in one file


GREEDY = b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x40\x85R."  # a GiB of zeros
HARMLESS = b"\x80\x02}."


@pytest.mark.parametrize("order", [0, 1])
def test_a_second_pickle_in_other_case_is_not_read_in_its_place(tmp_path, order):
    pair = [("x/data.pkl", HARMLESS), ("x/DATA.PKL", GREEDY)]
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as made:
        for name, content in [*(pair[::-1] if order else pair), ("x/version", b"3\n"), ("x/byteorder", b"little")]:
            made.writestr(name, content)
    with pytest.raises(LeverError, match="two parts of it have one name"):
        load_torch(tmp_path / "a.pt")


def test_a_second_table_of_contents_is_not_read_in_its_place(tmp_path):
    path = tmp_path / "a.pt"
    greedy, harmless = (archive(path, content).read_bytes() for content in (GREEDY, HARMLESS))
    path.write_bytes(greedy + harmless)  # zipfile reads the second, whose offsets are those of the first
    with pytest.raises(LeverError, match=r"two tables|not where it is said|it is damaged|cut short"):
        load_torch(path)
    path.write_bytes(harmless[:-2] + b"\x04\x00" + b"more")
    with pytest.raises(LeverError, match="two tables of contents"):
        load_torch(path)


def test_a_state_that_would_take_the_place_of_a_dicts_methods_is_refused(tmp_path):
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R}X\x03\x00\x00\x00getK\x05sb."
    with pytest.raises(LeverError, match="it fills a dict"):
        load_torch(archive(tmp_path / "a.pt", pickled))
