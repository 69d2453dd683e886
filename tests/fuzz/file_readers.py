"""Readers of binary files and of whole sources: checkpoints, embeddings, caches, policies that were shared, images,
datasets, the answers of a server over HTTP."""

import base64
import contextlib
import io
import json
import shutil
import socket
import sqlite3
import ssl
import threading
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from fuzz import formats
from fuzz.formats import harmful_torch, saved, spoil_safetensors, spoil_torch
from fuzz.harness import Target
from fuzz.mutations import TOKENS, lines_spoiler, noise, spoil_bytes, spoil_json, table
from fuzz.readers import DEEP, choices, dumped, examples, reader, to_file
from lever_lm.config.load import resolve
from lever_lm.config.schema import DataConfig, FeatureConfig, LvlmConfig, PromptConfig
from lever_lm.data import VqaData, image_digest, load_dataset, open_image
from lever_lm.data.embeddings import _stamp, cached_features, read_embeddings
from lever_lm.data.okvqa import SPLITS, annotations_file, questions_file
from lever_lm.data.table import view
from lever_lm.evaluation.export import export
from lever_lm.lvlm import CachedLvlm, build_prompt
from lever_lm.lvlm.answer_cache import AnswerCache
from lever_lm.lvlm.feature_cache import FeatureCache
from lever_lm.lvlm.openai_server import ServerLvlm
from lever_lm.lvlm.openai_servers import check_server
from lever_lm.selectors.fixed_set import FixedSet
from lever_lm.selectors.lever_lm import LeverLM
from lever_lm.selectors.pointer.checkpoint import load_policy, own_config, save_torch, to_v2, to_v3, v3_content
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.tasks import load_data
from lever_lm.training.find_checkpoint import locate
from lever_lm.training.from_checkpoint import config_beside
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.run_state import Journal
from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_torch_load import load_torch

# ---------------------------------------------------------------------- checkpoints


def _policy(**options) -> PointerSelector:
    torch.manual_seed(0)
    return PointerSelector(**{"d_model": 6, "hidden_dim": 8, **options}).eval()


def _v3(**options) -> dict:
    return _v3_of(_policy(**options))


def _v3_of(policy) -> dict:
    about = {"metrics": {"val_loss": 1.5, "kl": 0.04}, "config": {"encoder": "tiny@1"}}
    return v3_content(policy, epoch=2, phase="grpo", kl_beta=0.1, **about)


def _checkpoints() -> list[bytes]:
    ours = _v3()
    theirs = {key: value for key, value in ours.items() if key not in ("config", "format")}
    others = [saved(_v3_of(one)) for one in (LeverLM(6, 3, hidden_dim=8, num_layers=1, num_heads=2), FixedSet(3))]
    layers = saved(_v3(num_layers=2, state_update="gru"))
    return [saved(ours), saved(theirs), saved(to_v2(ours, "x")[0]), layers, *others]


@reader("checkpoint")
def checkpoint(folder: Path) -> Target:
    """A checkpoint, as `lever infer` loads it."""
    path = folder / "grpo_epoch3.pt"

    def read() -> None:
        policy = load_policy(path)
        own_config(load_torch(path))
        with torch.no_grad():
            if isinstance(policy, LeverLM):
                some = torch.ones(1, policy.vocabulary, dtype=torch.bool)
                policy.select(torch.ones(1, policy.d_model), torch.ones(policy.vocabulary, policy.d_model), 1, some)
            elif not isinstance(policy, FixedSet):
                policy.select(torch.ones(1, policy.d_model), torch.ones(1, 3, policy.d_model), 2)

    return Target(_checkpoints(), spoil_torch, to_file(path, read), harmful_torch())


@reader("convert")
def convert(folder: Path) -> Target:
    """A checkpoint, as `lever convert` reads it, in both directions."""
    path = folder / "grpo_epoch3.pt"

    def read() -> None:
        content, refused = load_torch(path), []
        for make in (lambda: to_v2(content, path, allow_truncate=True)[0], lambda: to_v3(content, path)):
            try:
                saved(make())
            except LeverError as error:  # one way may be open
                refused.append(error)
        if refused:
            raise refused[0]

    return Target(_checkpoints()[:3], spoil_torch, to_file(path, read), harmful_torch())


@reader("checkpoint-metrics")
def checkpoint_metrics(folder: Path) -> Target:
    """The checkpoints of a run without metrics.jsonl, as `lever best-ckpt` reads them."""
    run = RunFolder(folder / "run")
    run.path.mkdir()
    parse = to_file(run.checkpoint("grpo", 3), lambda: choices(run, None))
    return Target(_checkpoints()[:2], spoil_torch, parse, harmful_torch())


@reader("state")
def state(folder: Path) -> Target:
    """A run's state.pt, as `lever train` goes on from it."""
    run, policy, inputs = RunFolder(folder / "run"), _policy(), {"rollouts": "1234", "features": "5678"}
    run.path.mkdir()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    policy.log_prob(torch.randn(1, 6), torch.randn(1, 3, 6), torch.tensor([[[0, 1]]])).sum().backward()
    optimizer.step()
    row = {"phase": "rce", "epoch": 1, "train_loss": 1.0, "val_loss": 2.0, "temperature": 2.0, "warnings": {"x": "y"}}
    first = {"phase": "rce", "epoch": 1, "policy": policy.state_dict(), "optimizer": optimizer.state_dict()}
    first |= {"rows": [row], "rng": {"cpu": torch.get_rng_state()}, "extra": {}, "inputs": inputs}
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    online = {"sequences": torch.zeros(2, 3, 2).long(), "rewards": torch.zeros(2, 3), "mask": torch.ones(2, 3) > 0}
    later = [row, {"phase": "grpo", "epoch": 1, "ppo_loss": 0.5, "kl": 0.1, "beta": 0.1}]
    second = {**first, "phase": "grpo", "rows": later}
    second["extra"] = {"beta": 0.1, "old": weights, "reference": weights, "online": online}

    def read() -> None:
        for path in run.path.iterdir():
            if path != run.state:
                path.unlink()
        journal = Journal(run, {"policy": policy.shape}, inputs, lambda text: None)
        journal.resume()
        for phase in ("rce", "grpo"):
            journal.done(phase)
            fresh = _policy()
            journal.restore(phase, fresh, torch.optim.AdamW(fresh.parameters(), lr=1e-3))

    return Target([saved(first), saved(second)], spoil_torch, to_file(run.state, read), harmful_torch())


# ---------------------------------------------------------------------- embeddings and caches


def _embeddings(path: Path, seeds: list[bytes], spoil, known: list[bytes]) -> Target:
    return Target(seeds, spoil, to_file(path, lambda: read_embeddings(path)), known)


@reader("embeddings.pt")
def embeddings_pt(folder: Path) -> Target:
    """`--embeddings FILE.pt`."""
    matrix = torch.randn(5, 3)
    seeds = [saved(matrix), saved({"x": matrix.half()}), saved(matrix.numpy()), saved({"x": matrix.double().numpy()})]
    return _embeddings(folder / "e.pt", seeds, spoil_torch, harmful_torch())


@reader("embeddings.npy")
def embeddings_npy(folder: Path) -> Target:
    """`--embeddings FILE.npy`."""
    matrix = np.random.default_rng(0).standard_normal((5, 3))
    seeds = [formats.npy(a) for a in (matrix, matrix.astype(np.float16), np.asfortranarray(matrix.astype(">f4")))]
    return _embeddings(folder / "e.npy", seeds, formats.spoil_npy, formats.harmful_npy(matrix))


@reader("embeddings.safetensors")
def embeddings_safetensors(folder: Path) -> Target:
    """`--embeddings FILE.safetensors`."""
    matrix = torch.randn(5, 3)
    known = [save({"x": matrix, "y": matrix + 1}), formats.safetensors(b'{"a":{}}'), b"\xff" * 8, b""]
    seeds = [save({"x": matrix}), save({"x": matrix.half()}, {"made": "by us"})]
    known.append(formats.safetensors(b"{" * 50_000))
    return _embeddings(folder / "e.safetensors", seeds, spoil_safetensors, known)


@reader("features")
def features(folder: Path) -> Target:
    """The cache of features, of a dataset and encoder that have not changed."""
    made, encoder, path = examples(5), folder / "encoder", folder / "f.safetensors"
    encoder.mkdir()
    data, config = VqaData("x", made[:3], made[3:], "f"), FeatureConfig(str(encoder))

    def read() -> None:
        if (found := cached_features(data, config, path)) is not None:
            found.queries("train", config), found.queries("val", config), found.icds(config)

    sizes = {"train": 3, "val": 2}
    tensors = {f"{split}_{part}": torch.eye(4)[:n] for split, n in sizes.items() for part in ("image", "text")}
    header = {split: json.dumps(_stamp(data, config, split)) for split in sizes}
    return Target([save(tensors, {**header, "encoder": config.encoder})], spoil_safetensors, to_file(path, read))


@reader("bank")
def bank(folder: Path) -> Target:
    """A file of the cache of image features."""
    images, path = [str(folder / name) for name in ("a.jpg", "b.jpg")], folder / "bank" / f"{'0' * 16}.safetensors"
    path.parent.mkdir()
    for image in images:
        Path(image).write_bytes(image.encode())

    def read() -> None:
        found = FeatureCache(path.parent, memory=1 << 20, disk=1 << 30)
        found.missing(images)
        for image in images:
            if not found.missing([image]):
                grid, feature = found.grid(image), found.get(image, "cpu")
                assert feature is None or len(feature) * 4 == grid[0] * grid[1] * grid[2], "a feature of another grid"

    tensors = {image_digest(image): torch.randn(4, 8, dtype=torch.bfloat16) for image in images}
    seed = save(tensors, {"grids": json.dumps(dict.fromkeys(tensors, (1, 4, 4)))})
    return Target([seed], spoil_safetensors, to_file(path, read))


_SQL = table("""DROP TABLE answers¦DELETE FROM answers¦ALTER TABLE answers RENAME TO other¦CREATE VIEW v AS SELECT 1¦
ALTER TABLE answers ADD COLUMN x TEXT¦PRAGMA user_version=9¦PRAGMA application_id=7¦PRAGMA journal_mode=WAL¦
CREATE TRIGGER t BEFORE INSERT ON answers BEGIN SELECT RAISE(ABORT, 'no\x1b[31m'); END¦
CREATE INDEX i ON answers(value)¦DROP TABLE answers; CREATE VIEW answers AS SELECT 'a' AS key, 'b' AS value¦
DROP TABLE answers; CREATE TABLE answers (key INT, value BLOB)¦DROP TABLE answers; CREATE TABLE answers (key TEXT)¦
DROP TABLE answers; CREATE TABLE answers (value TEXT, key TEXT)¦DROP TABLE answers; CREATE VIEW answers AS WITH
RECURSIVE c(key, value) AS (SELECT 1, 2 UNION ALL SELECT key + 1, 2 FROM c) SELECT * FROM c""")


@reader("answers")
def answers(folder: Path) -> Target:
    """The cache of answers, with those to a prompt in it; spoilt by another schema or other values."""
    image, path = folder / "a.jpg", folder / "answers.sqlite"
    image.write_bytes(b"an image")
    (query,) = examples(1, str(image))
    prompt = build_prompt([query], query, PromptConfig())
    model = SimpleNamespace(  # answers what the cache lacks
        ask=lambda prompts, batches, answers=None, **_: (
            (batch, ["no" if answers is None else -1.0] * len(batch)) for batch in batches
        ),
        batches=lambda prompts, answers=None: [list(range(len(prompts)))],
    )

    def lvlm(cache: AnswerCache) -> CachedLvlm:
        return CachedLvlm(lambda prompts: model, "fingerprint", cache, lambda items, what, total: items)

    cache = AnswerCache(path)
    made = lvlm(cache)
    keys = [made._key("answer", prompt), made._key("log_prob:yes", prompt), made._speed_key]
    cache.put(dict(zip(keys, ("yes", "-0.5", "12.5"), strict=True)))
    cache.close()

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
        (spoilt := folder / "spoilt.sqlite").write_bytes(content)
        db = sqlite3.connect(spoilt)
        if rng.random() < 0.3:
            db.executescript(rng.choice(_SQL))
        else:
            value = rng.choice((None, 3, 1.5, b"\xff\xfe", noise(rng), float("inf"), "nan", "1e999", *TOKENS))
            mark = "CAST(? AS TEXT)" if isinstance(value, bytes) and rng.random() < 0.5 else "?"  # text, but no UTF-8
            db.execute(f"UPDATE answers SET value = {mark} WHERE key = ?", (value, rng.choice(keys)))
        db.commit()
        db.close()
        return spoilt.read_bytes()

    known = [b"", b"SQLite format 3\0", b"SQLite format 3\0" + b"\xff" * 4096]
    return Target([path.read_bytes()], spoil, to_file(path, read), known)


# ---------------------------------------------------------------------- a policy that was shared


def _shared(folder: Path, name: str, spoil, known: list[bytes]) -> Target:
    """Return the target of one file of a policy as `lever export` writes it, used as `--ckpt DIR` does."""
    run, settings = RunFolder(folder), resolve({"dataset": "digits", "lvlm": "tiny_qwen2.5_vl"}, None, [], {})[0]
    run.open(settings)
    config = {"encoder": "tiny-clip@0", "features": "query_img_text_icd_img_text", "dataset": "digits", "seed": 0}
    policy = _policy(d_model=4, hidden_dim=4, state_update="gru", stop=True)
    content = v3_content(policy, epoch=0, phase="grpo", kl_beta=0.1, metrics={}, config=config)
    save_torch(run.checkpoint("grpo", 1), content)
    export(run.checkpoint("grpo", 1), "why", folder / "shared")
    path = folder / "shared" / name

    def use() -> None:
        found, _, values = locate(path.parent)
        load_policy(found)
        config_beside(values, path.parent, None, None, [], own=False)

    return Target([path.read_bytes()], spoil, to_file(path, use), known)


@reader("exported-config")
def exported_config(folder: Path) -> Target:
    """The config.json of a shared policy."""
    known = [b"{}", b"[]", DEEP, b'{"format":"lever_lm/policy"}', b" " * (2 << 20)]
    return _shared(folder, "config.json", spoil_json, known)


@reader("exported-weights")
def exported_weights(folder: Path) -> Target:
    """The model.safetensors of a shared policy."""
    return _shared(folder, "model.safetensors", spoil_safetensors, [b"", b"\xff" * 8])


# ---------------------------------------------------------------------- images and datasets


@reader("images", memory=768 << 20)
def images(folder: Path) -> Target:
    """An image file of any format."""
    path, seeds = folder / "image.jpg", []
    parse = to_file(path, lambda: open_image(str(path)))
    for content in formats.pictures():
        try:
            parse(content)
        except LeverError:  # a format that is not taken
            continue
        seeds.append(content)
    return Target(seeds, formats.spoil_image, parse, formats.harmful_images())


@reader("official")
def official(folder: Path) -> Target:
    """The official files: those of the training split spoilt, questions and annotations parted by a NUL."""
    ids = [{"question_id": i, "image_id": i} for i in range(3)]
    given = [{"answer": text, "raw_answer": text, "answer_id": n} for n, text in enumerate(("cat", "dog"), 1)]
    questions = dumped({"questions": [{**each, "question": "What is it?"} for each in ids]})
    annotations = dumped({"annotations": [{**each, "answers": given} for each in ids]})
    for split, name in SPLITS.items():
        (folder / name).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8)).save(folder / name / f"COCO_{name}_{i:012d}.jpg")
        # A question is of one split.
        questions_file(folder, split).write_bytes(questions.replace(b"What", b"Which" if split == "val" else b"What"))
        annotations_file(folder, split).write_bytes(annotations)

    def parse(content: bytes) -> None:
        for file, part in zip((questions_file, annotations_file), (*content.split(b"\0", 1), b""), strict=False):
            file(folder, "train").write_bytes(part)
        load_dataset(DataConfig("x", str(folder), str(folder), skip_bad_examples=True))
        for example in load_dataset(DataConfig("x", str(folder), str(folder))).train_examples:
            " ".join([example.question, *example.answers]).encode()

    def spoil(rng: Random, content: bytes) -> bytes:
        parts, i = content.split(b"\0"), rng.randrange(2)
        parts[i] = spoil_json(rng, parts[i])
        return b"\0".join(parts)

    known = [DEEP + b"\0" + annotations, questions + b"\0" + b'{"annotations":' * 50_000]
    return Target([questions + b"\0" + annotations], spoil, parse, known)


_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
_CELLS = [None, -1, 2**62, 2**63, 1.5, float("nan"), b"\xff", True, [], [None], [""], [[]], {}, {"path": "../x"}]
_CELLS += [{"bytes": None, "path": "/etc/passwd"}, {"bytes": b"", "path": ""}, {"bytes": b"GIF89a", "path": "x"}]
_CELLS += [{"bytes": None, "path": "http://127.0.0.1:9/x.png"}, [{"answer": None}], [{"answer": "a", "raw_answer": 1}]]
_CELLS += ["7", "٣", "9" * 30, "a" * 100_000, *TOKENS, [{"x": 1}], ["a"] * 3000]


@reader("parquet", loads=True)
def parquet(folder: Path) -> Target:
    """A folder of parquet files, the training split's spoilt."""
    import datasets
    import pyarrow as pa
    from pyarrow import parquet as pq

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    cache = datasets.config.HF_DATASETS_CACHE = folder / "cache"
    datasets.config.HF_MODULES_CACHE = str(folder / "modules")
    image = {"bytes": base64.b64decode(_PIXEL), "path": None}
    rows = [{"question_id": i, "image": image, "question": "What?", "answers": ["cat"]} for i in range(3)]
    columns = ("question_id", "image", "question", "answers", "image_id", "raw_answers")

    def written(rows: list[dict], compression: str = "snappy") -> bytes:
        pq.write_table(pa.Table.from_pylist(rows), file := io.BytesIO(), compression=compression)
        return file.getvalue()

    train = folder / "data" / "train.parquet"
    train.parent.mkdir()
    train.with_name("val.parquet").write_bytes(written([{**row, "question": "Which?"} for row in rows]))

    def parse(content: bytes) -> None:
        train.write_bytes(content)
        try:
            for example in load_dataset(DataConfig("x", str(train.parent), str(train.parent))).train_examples:
                open_image(example.image)
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    def spoil(rng: Random, content: bytes) -> bytes:
        name, value = rng.choice((*columns, rng.choice(TOKENS))), rng.choice(_CELLS)
        touched = rng.choice((1, 3))
        made = [{**row, name: value} if i < touched else row for i, row in enumerate(rows)]
        if rng.random() < 0.2:
            made = [{k: v for k, v in row.items() if k != name} for row in made]
        try:
            return written(made[: rng.choice((0, 1, 3, 3, 3))], rng.choice(("none", "snappy", "gzip", "zstd")))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, UnicodeError, OverflowError):
            return spoil_bytes(rng, content)  # of kinds that no column holds together

    second = written([{**row, "answers": [{"answer": "cat"}], "image_id": 5} for row in rows], "none")
    return Target([written(rows), second], spoil, parse)


def _table(folder: Path, name: str, seeds: list[bytes], spoil, known: list[bytes], **config) -> Target:
    """Return the target of a table of the user's own, read as its task asks it, and looked at as by `lever doctor`."""
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    file = folder / name
    where = DataConfig("x", coco_path=str(folder), file=str(file), **config)

    def parse(content: bytes) -> None:
        file.write_bytes(content)
        with contextlib.suppress(LeverError):  # what is odd is for loading to refuse
            " ".join(view(where).odd).encode()
        load_data(replace(where, skip_bad_examples=True))
        for example in load_data(where).train_examples:
            " ".join([example.question, example.answer, *example.options]).encode()

    return Target(seeds, spoil, parse, known)


@reader("table_csv")
def table_csv(folder: Path) -> Target:
    """A CSV of the user's own, of multiple choice."""
    rows = [f'{i}.png,"Which, then?",{"ab"[i % 2]},a|b,{i}' for i in range(4)]
    seed = "\n".join(["image,question,answer,options,id", *rows]).encode()
    known = [
        b"",
        b"image,answer",
        b"\xff\xfe" + seed,
        seed.replace(b"\n", b"\r"),
        seed.replace(b",", b";"),
        b'"' * 99_999,
    ]
    words = ["image", "answer", "options", '"', '""', "a|b|a", "|", "C", "0.png", "../0.png", ",", ",,,"]
    return _table(folder, "t.csv", [seed], lines_spoiler(words), known, task="choice")


@reader("table_jsonl")
def table_jsonl(folder: Path) -> Target:
    """JSON lines of the user's own, of numbers."""
    rows = [
        {"image": f"{i}.png", "question": "How many?", "answer": i, "id": f"row {i}", "split": "train"}
        for i in range(4)
    ]
    rows[3]["split"] = "val"
    seed = b"\n".join(map(dumped, rows))

    def spoil(rng: Random, content: bytes) -> bytes:
        lines = content.split(b"\n")
        place = rng.randrange(len(lines))
        lines[place] = spoil_json(rng, lines[place])
        return b"\n".join(lines)

    known = [DEEP, b"[]", b"{}", seed + b"\n" + b"{" * 99_999, seed.replace(b"val", b"test")]
    return _table(folder, "t.jsonl", [seed], spoil, known, task="number")


# ---------------------------------------------------------------------- a server

_HEADS = table("""HTTP/1.1¦HTTP/9.9¦200¦302¦-1¦Transfer-Encoding: chunked¦Content-Encoding: gzip¦Content-Encoding: br¦
Content-Length: 99999999999999999999¦Content-Length: -1¦Set-Cookie: a=b¦Connection: upgrade¦Location: file:///etc/passwd""")
_STATUSES = (100, 101, 204, 301, 304, 307, 400, 401, 404, 408, 413, 422, 429, 500, 503, 599, 999)
_FIELDS = [b"", b"Location: http://127.0.0.1:9/\x1b[31m", b"Location: " + b"x" * 20_000, b"Content-Type: \xff"]
_WAITS = (b"0", b"99999999999999999999", b"-1", b"Wed, 99 Nov 2099 99:99:99 GMT", b"\xd9\xa3", b"nan")
_FIELDS += [b"Retry-After: " + wait for wait in (*_WAITS, b"Mon, 01 Jan 0001 00:00:00 +2359")]


def _response(body: bytes, status: int = 200, field: bytes = b"") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n".encode()
    return head + (field + b"\r\n" if field else b"") + b"\r\n" + body


class _Replies:
    """A server on the loopback that sends `content` whatever is asked, and closes."""

    def __init__(self):
        self.content, self._socket = b"", socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self._socket.accept()
            with client:
                try:
                    client.settimeout(10)
                    with client.makefile("rb") as asked:
                        lines = list(iter(asked.readline, b"\r\n"))
                        asked.read(
                            sum(int(at[15:]) for at in map(bytes.lower, lines) if at.startswith(b"content-length:"))
                        )
                    client.sendall(self.content)
                except OSError:
                    pass  # the client has gone


@reader("server")
def server(folder: Path) -> Target:
    """What comes back from a server, byte for byte: to the question for its models, to a chat, to one with scores;
    the first byte of an input says to which."""
    ssl.SSLContext.load_verify_locations = lambda *_: None  # a client for each case would read all certificates
    replies, image = _Replies(), folder / "x.png"
    Image.new("RGB", (56, 56)).save(image)
    prompt = build_prompt([], examples(1, str(image))[0], PromptConfig())
    config = LvlmConfig(path="m", server=f"http://127.0.0.1:{replies.port}/v1", retries=0, timeout=20.0)
    models = [{"id": "m", "object": "model", "owned_by": "vllm", "max_model_len": 4096}]
    choice = {"index": 0, "message": {"role": "assistant", "content": "cat"}, "finish_reason": "stop"}
    chat = {"choices": [choice], "usage": {"prompt_tokens": 30, "completion_tokens": 2}}
    places = [None, *({"7": {"logprob": -0.5, "decoded_token": token}} for token in ("assistant", "\n", "c", "at"))]
    said = [{"object": "list", "data": models}, chat, {**chat, "prompt_logprobs": places}]
    seeds = [b"%c" % (n + 1) + _response(dumped(body)) for n, body in enumerate(said)]
    replies.content = seeds[0][1:]
    lvlm = ServerLvlm(config, PromptConfig())
    lvlm._messages(prompt)  # the image is encoded once

    def parse(content: bytes) -> None:
        replies.content = content[1:]
        if content[:1] == b"\1":
            check_server(config)
        elif content[:1] == b"\2":
            lvlm.generate([prompt])
        else:
            lvlm.answer_log_prob([prompt], ["cat"])

    def spoil(rng: Random, content: bytes) -> bytes:
        head, _, body = content.partition(b"\r\n\r\n")
        change = rng.randrange(4)
        if change == 0:
            head = lines_spoiler(_HEADS)(rng, head.replace(b"\r\n", b"\n")).replace(b"\n", b"\r\n")
            return head + b"\r\n\r\n" + body
        if change == 1:
            refusals = (noise(rng), dumped({"error": {"message": rng.choice(TOKENS)}}), b'{"detail":' + body + b"}")
            return content[:1] + _response(rng.choice(refusals), rng.choice(_STATUSES), rng.choice(_FIELDS))
        return content[:1] + _response(spoil_json(rng, body))

    known = [b"%c" % n + _response(DEEP) for n in (1, 2, 3)] + [b"\2" + _response(b"x" * 40_000_000), b"\2"]
    known += [b"\2" + _response(b"{}", 429, field) for field in _FIELDS] + [b"\2HTTP/1.1 200 OK\r\n\r\n"]
    return Target(seeds, spoil, parse, known)
