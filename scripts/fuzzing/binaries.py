"""Parsers of other binary files: arrays, safetensors, the caches of features and answers."""

import io
import json
import sqlite3
import struct
from pathlib import Path
from random import Random

import numpy as np
import torch
from fuzzing.harness import Parser, Target
from fuzzing.mutations import TOKENS, noise, spoil_bytes, spoil_json
from fuzzing.texts import to_file
from fuzzing.torchfiles import Payload
from safetensors.torch import save

from lever_lm.data.embeddings import read_embeddings

# ---------------------------------------------------------------------- arrays and safetensors


def npy(folder: Path) -> Target:
    """`--embeddings FILE.npy`."""
    path, matrix = folder / "e.npy", np.random.default_rng(0).standard_normal((5, 3))
    arrays = [matrix, matrix.astype(np.float16), np.asfortranarray(matrix.astype(">f4"))]
    known = [
        _array(a)
        for a in (
            np.array([Payload()], dtype=object),
            np.zeros((2, 2), "V9"),
            np.zeros(3),
            np.array("x"),
            np.zeros((0, 3)),
        )
    ]
    known += [_array(matrix, header) for header in _HEADERS]
    return Target([_array(a) for a in arrays], _spoil_npy, to_file(path, lambda: read_embeddings(path)), known)


def _array(array: np.ndarray, header: str | None = None) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    content = file.getvalue()
    if header is None:
        return content
    start = 10 + int.from_bytes(content[8:10], "little")
    return b"\x93NUMPY\x02\0" + struct.pack("<I", len(header.encode())) + header.encode() + content[start:]


_SHAPES = [
    "(5, 3)",
    "(-1, 3)",
    "(2**62, 4)",
    "(99999999999, 9999999999)",
    "(5,)",
    "()",
    "(0, 0)",
    "(5, 3, 0)",
    "(1.5, 2)",
    "[5, 3]",
    "(5, True)",
]
_KINDS = [
    "'<f8'",
    "'|O'",
    "'<U9'",
    "'V1000000000'",
    "'>f4'",
    "[('a', '<f8')]",
    "'<f2'",
    "'<M8[s]'",
    "'x'",
    "None",
    "'<c16'",
    "'<f16'",
]
_HEADERS = [f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}\n" for shape in _SHAPES]
_HEADERS += [f"{{'descr': {kind}, 'fortran_order': True, 'shape': (5, 3)}}\n" for kind in _KINDS]
_HEADERS += ["[" * 5000, "(" * 90_000, "__import__('os')", "{}" * 9, "{'descr': '<f8'}", "-" * 50_000 + "1", "1" * 9000]


def _spoil_npy(rng: Random, content: bytes) -> bytes:
    shape, kind = rng.choice(_SHAPES), rng.choice(("'<f8'", *_KINDS))
    order = rng.choice(("False", "True", "1", "None"))
    header = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}}}\n"
    if rng.random() < 0.3:
        header = spoil_bytes(rng, header.encode()).decode("latin1")
    start = 10 + int.from_bytes(content[8:10], "little")
    size = len(header.encode()) if rng.random() < 0.9 else rng.choice((0, 2**32 - 1, 70_000))
    version = rng.choice((b"\x02\0", b"\x03\0", b"\x09\0"))
    return b"\x93NUMPY" + version + struct.pack("<I", size) + header.encode() + content[start:]


def _split(content: bytes) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return content[8 : 8 + size], content[8 + size :]


def _join(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


_DTYPES = ["F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "U64", "F32", "X", ""]


def spoil_safetensors(rng: Random, content: bytes) -> bytes:
    """Other names, kinds, shapes, places and metadata in the header, other lengths, other numbers."""
    header, data = _split(content)
    change = rng.randrange(6)
    if change < 2:
        return _join(spoil_json(rng, header), data)
    fields = json.loads(header)
    names = [name for name in fields if name != "__metadata__"]
    tensor = fields[rng.choice(names)]
    if change == 2:
        tensor[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(
            (*_DTYPES, [], [1], [0, 0], [2**63, 2], [len(data), 0], [0, len(data)], [1, 3, 1], [-1], None)
        )
    elif change == 3:
        fields.setdefault("__metadata__", {})[rng.choice(("grids", "fingerprint", "train", rng.choice(TOKENS)))] = (
            rng.choice(TOKENS)
        )
    elif change == 4:
        data = (
            np.random.default_rng(rng.randrange(99))
            .choice(np.array([0, 0x7F, 0xFF, 0x80, 0xC0], np.uint8), len(data))
            .tobytes()
        )
    else:
        made = _join(json.dumps(fields).encode(), data)
        return rng.choice((0, 1, len(header), 2**62, 100_000_001, len(content))).to_bytes(8, "little") + made[8:]
    return _join(json.dumps(fields).encode(), data)


def safetensors(folder: Path) -> Target:
    """`--embeddings FILE.safetensors`."""
    path, matrix = folder / "e.safetensors", torch.randn(5, 3)
    seeds = [save({"x": matrix}), save({"x": matrix.half()}, {"made": "by us"})]
    known = [
        save({"x": matrix, "y": matrix + 1}),
        b'\x08\0\0\0\0\0\0\0{"a":{}}',
        b"\xff" * 8,
        b"",
        _join(b"{" * 50_000, b""),
    ]
    return Target(seeds, spoil_safetensors, to_file(path, lambda: read_embeddings(path)), known)


# ---------------------------------------------------------------------- caches


def features(folder: Path) -> Target:
    """The cache of features, of a dataset and encoder that have not changed."""
    from lever_lm.config.schema import FeatureConfig
    from lever_lm.data import Example, VqaData
    from lever_lm.data.embeddings import _stamp, cached_features

    examples = tuple(Example(i, i, "what?", ("yes",), ("yes",), "x.jpg") for i in range(5))
    data, config, path = (
        VqaData("x", examples[:3], examples[3:], "f"),
        FeatureConfig("asset:tiny-clip"),
        folder / "f.safetensors",
    )
    encoder = folder / "encoder"
    encoder.mkdir()
    config = FeatureConfig(str(encoder))

    def read() -> None:
        found = cached_features(data, config, path)
        if found is not None:
            found.queries("train", config), found.queries("val", config), found.icds(config)

    tensors = {
        f"{split}_{part}": torch.eye(4)[:n] for split, n in (("train", 3), ("val", 2)) for part in ("image", "text")
    }
    header = {split: json.dumps(_stamp(data, config, split)) for split in ("train", "val")}
    return Target([save(tensors, {**header, "encoder": config.encoder})], spoil_safetensors, to_file(path, read))


def bank(folder: Path) -> Target:
    """A file of the vision bank."""
    from lever_lm.data import image_digest
    from lever_lm.lvlm.feature_cache import FeatureCache

    images = [str(folder / name) for name in ("a.jpg", "b.jpg")]
    for image in images:
        Path(image).write_bytes(image.encode())
    tensors = {image_digest(image): torch.randn(4, 8, dtype=torch.bfloat16) for image in images}
    header = {"grids": json.dumps(dict.fromkeys(tensors, (1, 4, 4)))}
    path = folder / "bank" / f"{'0' * 16}.safetensors"
    path.parent.mkdir()

    def read() -> None:
        found = FeatureCache(path.parent, memory=1 << 20, disk=1 << 30)
        found.missing(images)
        for image in images:
            if not found.missing([image]):
                grid, feature = found.grid(image), found.get(image, "cpu")
                assert feature is None or len(feature) * 4 == grid[0] * grid[1] * grid[2], "a feature of another grid"

    return Target([save(tensors, header)], spoil_safetensors, to_file(path, read))


def answers(folder: Path) -> Target:
    """The cache of answers, with those to two prompts in it."""
    from lever_lm.config.schema import PromptConfig
    from lever_lm.data import Example
    from lever_lm.lvlm import CachedLvlm, build_prompt
    from lever_lm.lvlm.answer_cache import AnswerCache
    from lever_lm.utils.distributed import Shards

    image, path = folder / "a.jpg", folder / "answers.sqlite"
    image.write_bytes(b"an image")
    query = Example(1, 1, "what?", ("yes",), ("yes",), str(image))
    prompt = build_prompt([query], query, PromptConfig())

    def asked(what: str):
        raise AssertionError("not the seed")

    def lvlm(cache: AnswerCache) -> CachedLvlm:
        return CachedLvlm(_Nobody, "fingerprint", cache, lambda items, what, total: items)

    cache = AnswerCache(path)
    made = lvlm(cache)
    keys = [made._key("answer", prompt), made._key("log_prob:yes", prompt), made._speed_key]
    cache.put(dict(zip(keys, ("yes", "-0.5", "12.5"), strict=True)))
    cache.close()
    seed = path.read_bytes()

    def read() -> None:
        for left in folder.glob("answers.*-*"):
            left.unlink()
        cache = AnswerCache(path, Shards())
        try:
            known = lvlm(cache)
            known.unknown([prompt])
            known.speed  # noqa: B018 - reads and parses it
            known.answer([prompt])
            known.answer_log_prob([prompt], ["yes"])
        finally:
            cache.close()

    def spoil(rng: Random, content: bytes) -> bytes:
        return _spoil_answers(rng, content, keys, folder / "spoilt.sqlite")

    return Target(
        [seed], spoil, to_file(path, read), [b"", b"SQLite format 3\0", b"SQLite format 3\0" + b"\xff" * 4096]
    )


class _Nobody:
    """A model that answers whatever is asked, so that what the cache lacks is put into it."""

    def generate(self, prompts):
        return ["no"] * len(prompts)

    def answer_log_prob(self, prompts, answers, *, end=False):
        return [-1.0] * len(prompts)

    def batches(self, prompts, answers=None):
        return [list(range(len(prompts)))]


_SQL = [
    "DROP TABLE answers",
    "DELETE FROM answers",
    "ALTER TABLE answers RENAME TO other",
    "ALTER TABLE answers ADD COLUMN x TEXT",
]
_SQL += [
    "CREATE TRIGGER t BEFORE INSERT ON answers BEGIN SELECT RAISE(ABORT, 'no\x1b[31m'); END",
    "PRAGMA user_version=9",
]
_SQL += [
    "CREATE VIEW v AS SELECT 1",
    "PRAGMA application_id=7",
    "PRAGMA journal_mode=WAL",
    "CREATE INDEX i ON answers(value)",
]
_SQL += [
    "DROP TABLE answers; CREATE VIEW answers AS SELECT 'a' AS key, 'b' AS value",
    "DROP TABLE answers; CREATE TABLE answers (key INT, value BLOB)",
    "DROP TABLE answers; CREATE TABLE answers (key TEXT)",
    "DROP TABLE answers; CREATE TABLE answers (value TEXT, key TEXT)",
    "DROP TABLE answers; CREATE VIEW answers AS WITH RECURSIVE c(key, value) AS "
    "(SELECT 1, 2 UNION ALL SELECT key + 1, 2 FROM c) SELECT * FROM c",  # without end
]


def _spoil_answers(rng: Random, content: bytes, keys: list[str], path: Path) -> bytes:
    """A cache with another schema, or another value of another kind."""
    path.write_bytes(content)
    db = sqlite3.connect(path)
    if rng.random() < 0.3:
        db.executescript(rng.choice(_SQL))
    else:
        value = rng.choice((None, 3, 1.5, b"\xff\xfe", noise(rng), float("inf"), "nan", "1e999", *TOKENS))
        text = isinstance(value, bytes) and rng.random() < 0.5  # text that is no UTF-8
        mark = "CAST(? AS TEXT)" if text else "?"
        db.execute(f"UPDATE answers SET value = {mark} WHERE key = ?", (value, rng.choice(keys)))
    db.commit()
    db.close()
    return path.read_bytes()


# ---------------------------------------------------------------------- a policy that was shared


def _exported(folder: Path) -> Path:
    """A folder as `lever export` writes it."""
    from lever_lm.config.load import resolve
    from lever_lm.evaluation.export import export
    from lever_lm.selectors.pointer.checkpoint import save_torch, v3_content
    from lever_lm.selectors.pointer.model import PointerSelector
    from lever_lm.training.run_dir import RunFolder

    run, settings = RunFolder(folder), resolve({"dataset": "digits", "lvlm": "tiny_qwen2.5_vl"}, None, [], {})[0]
    run.open(settings)
    torch.manual_seed(0)
    policy = PointerSelector(d_model=4, hidden_dim=4, state_update="gru", stop=True)
    config = {"encoder": "tiny-clip@0", "features": "query_img_text_icd_img_text", "dataset": "digits", "seed": 0}
    content = v3_content(policy, epoch=0, phase="grpo", kl_beta=0.1, metrics={}, config=config)
    save_torch(run.checkpoint("grpo", 1), content)
    export(run.checkpoint("grpo", 1), "why", folder / "shared")
    return folder / "shared"


def _use(folder: Path) -> None:
    """What `--ckpt DIR` does with a shared policy before any data is read."""
    from lever_lm.selectors.pointer.checkpoint import load_policy
    from lever_lm.training.find_checkpoint import locate
    from lever_lm.training.from_checkpoint import config_beside

    path, _, values = locate(folder)
    load_policy(path)
    config_beside(values, folder, None, None, [], own=False)


def exported_config(folder: Path) -> Target:
    """The config.json of a shared policy."""
    path = _exported(folder) / "config.json"
    seeds = [path.read_bytes()]
    known = [b"{}", b"[]", b"[" * 100_000, b'{"format":"lever_lm/policy"}', b" " * (2 << 20)]
    return Target(seeds, spoil_json, to_file(path, lambda: _use(path.parent)), known)


def exported_weights(folder: Path) -> Target:
    """The model.safetensors of a shared policy."""
    path = _exported(folder) / "model.safetensors"
    seeds = [path.read_bytes()]
    return Target(seeds, spoil_safetensors, to_file(path, lambda: _use(path.parent)), [b"", b"\xff" * 8])


PARSERS = [
    Parser("embeddings.npy", npy),
    Parser("embeddings.safetensors", safetensors),
    Parser("features", features),
    Parser("bank", bank),
    Parser("answers", answers),
    Parser("exported-config", exported_config),
    Parser("exported-weights", exported_weights),
]
