"""Parsers of whole sources: a dataset in the official files or in parquet, and a server's answers over HTTP."""

import base64
import io
import json
import shutil
import ssl
import threading
from pathlib import Path
from random import Random

from fuzzing.harness import Parser, Target
from fuzzing.mutations import TOKENS, lines_spoiler, noise, spoil_bytes, spoil_json

# ---------------------------------------------------------------------- datasets


def _example(i: int) -> tuple[dict, dict]:
    question = {"question_id": i, "image_id": i, "question": "What is it?"}
    entries = [{"answer": text, "raw_answer": text, "answer_id": n} for n, text in enumerate(("cat", "dog"), 1)]
    return question, {"question_id": i, "image_id": i, "answers": entries}


def official(folder: Path) -> Target:
    """The official files: those of the training split spoilt, questions and annotations parted by a NUL."""
    from PIL import Image

    from lever_lm.config.schema import DataConfig
    from lever_lm.data import load_dataset
    from lever_lm.data.okvqa import SPLITS, annotations_file, questions_file

    pairs = [_example(i) for i in range(3)]
    contents = [
        json.dumps({"questions": [question for question, _ in pairs]}).encode(),
        json.dumps({"annotations": [annotation for _, annotation in pairs]}).encode(),
    ]
    for split, name in SPLITS.items():
        (folder / name).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8)).save(folder / name / f"COCO_{name}_{i:012d}.jpg")
        # A question is of one split.
        questions_file(folder, split).write_bytes(contents[0].replace(b"What", b"Which" if split == "val" else b"What"))
        annotations_file(folder, split).write_bytes(contents[1])
    strict = DataConfig("x", str(folder), str(folder))
    lenient = DataConfig("x", str(folder), str(folder), skip_bad_examples=True)

    def parse(content: bytes) -> None:
        questions, _, annotations = content.partition(b"\0")
        questions_file(folder, "train").write_bytes(questions)
        annotations_file(folder, "train").write_bytes(annotations)
        load_dataset(lenient)
        load_dataset(strict)

    def spoil(rng: Random, content: bytes) -> bytes:
        parts = content.split(b"\0")
        i = rng.randrange(2)
        parts[i] = spoil_json(rng, parts[i])
        return b"\0".join(parts)

    known = [b"[" * 100_000 + b"\0" + contents[1], contents[0] + b"\0" + b'{"annotations":' * 50_000]
    return Target([b"\0".join(contents)], spoil, parse, known)


_IMAGE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
)


def parquet(folder: Path) -> Target:
    """A folder of parquet files, the training split's spoilt."""
    import datasets
    import pyarrow as pa
    from pyarrow import parquet as pq

    from lever_lm.config.schema import DataConfig
    from lever_lm.data import load_dataset, open_image

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    cache = folder / "cache"
    datasets.config.HF_DATASETS_CACHE = cache
    datasets.config.HF_MODULES_CACHE = str(folder / "modules")
    rows = [
        {"question_id": i, "image": {"bytes": _IMAGE, "path": None}, "question": "What?", "answers": ["cat"]}
        for i in range(3)
    ]

    def written(rows: list[dict], schema=None, **options) -> bytes:
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema), file, **options)
        return file.getvalue()

    seeds = [
        written(rows),
        written([{**row, "answers": [{"answer": "cat"}], "image_id": 5} for row in rows], compression="none"),
    ]
    (folder / "data").mkdir()
    (folder / "data" / "val.parquet").write_bytes(written([{**row, "question": "Which?"} for row in rows]))
    train, config = folder / "data" / "train.parquet", DataConfig("x", str(folder / "data"), str(folder / "data"))

    def parse(content: bytes) -> None:
        train.write_bytes(content)
        try:
            for example in load_dataset(config).train_examples:
                open_image(example.image)
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    def spoil(rng: Random, content: bytes) -> bytes:
        made = [dict(row) for row in rows]
        name = rng.choice(
            ("question_id", "image", "question", "answers", "image_id", "raw_answers", rng.choice(TOKENS))
        )
        value = rng.choice(_CELLS)
        for row in made if rng.random() < 0.5 else made[:1]:
            row[name] = value
        if rng.random() < 0.2:
            made = [{k: v for k, v in row.items() if k != name} for row in made]
        try:
            return written(
                made[: rng.choice((0, 1, 3, 3, 3))], compression=rng.choice(("none", "snappy", "gzip", "zstd"))
            )
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, UnicodeError, OverflowError):
            return spoil_bytes(rng, content)  # of kinds that no column holds together

    return Target(seeds, spoil, parse)


_CELLS = [
    None,
    -1,
    2**62,
    2**63,
    1.5,
    float("nan"),
    b"\xff",
    True,
    [],
    [None],
    [""],
    [[]],
    {},
    {"bytes": None, "path": "/etc/passwd"},
]
_CELLS += [
    {"bytes": b"", "path": ""},
    {"bytes": b"GIF89a", "path": "x"},
    {"bytes": None, "path": "http://127.0.0.1:9/x.png"},
    {"path": "../x"},
]
_CELLS += [
    "/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:9/x",
    [{"answer": None}],
    [{"answer": "a", "raw_answer": 1}],
    [{"x": 1}],
]
_CELLS += ["7", "٣", "9" * 30, "a" * 100_000, "<script>", "\x1b[31m", "\0", *TOKENS[:20], ["a"] * 3000]

# ---------------------------------------------------------------------- servers


def server(folder: Path) -> Target:
    """What comes back from a server, byte for byte: to the question for its models, to a chat, to one with scores."""
    from PIL import Image

    from lever_lm.config.schema import LvlmConfig, PromptConfig
    from lever_lm.data import Example
    from lever_lm.lvlm import build_prompt
    from lever_lm.lvlm.openai_server import ServerLvlm
    from lever_lm.lvlm.openai_servers import check_server

    ssl.SSLContext.load_verify_locations = lambda *_: None  # a client for each case would read all certificates
    image, replies = folder / "x.png", _Replies()
    Image.new("RGB", (56, 56)).save(image)
    query = Example(1, 1, "What?", ("cat",), ("cat",), str(image))
    prompt = build_prompt([], query, PromptConfig())
    config = LvlmConfig(path="m", server=f"http://127.0.0.1:{replies.port}/v1", retries=0, timeout=20.0)
    listed = {"id": "m", "object": "model", "owned_by": "vllm", "max_model_len": 4096}
    card = _response(json.dumps({"object": "list", "data": [listed]}).encode())
    choice = {"index": 0, "message": {"role": "assistant", "content": "cat"}, "finish_reason": "stop"}
    text = {"choices": [choice], "usage": {"prompt_tokens": 30, "completion_tokens": 2}}
    places = [None, *({"7": {"logprob": -0.5, "decoded_token": token}} for token in ("assistant", "\n", "c", "at"))]
    scored = _response(json.dumps({**text, "prompt_logprobs": places}).encode())
    chat = _response(json.dumps(text).encode())
    replies.content = card
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
            status = rng.choice((100, 101, 204, 301, 304, 307, 400, 401, 404, 408, 413, 422, 429, 500, 503, 599, 999))
            said = rng.choice(
                (
                    noise(rng),
                    json.dumps({"error": {"message": rng.choice(TOKENS)}}).encode(),
                    b'{"detail":' + body + b"}",
                )
            )
            more = rng.choice(_FIELDS)
            return content[:1] + _response(said, status, more)
        return content[:1] + _response(spoil_json(rng, body))

    deep = _response(b"[" * 100_000)
    known = [
        b"\1" + deep,
        b"\2" + deep,
        b"\3" + deep,
        b"\2" + _response(b"x" * 40_000_000),
        b"\2",
        b"\2HTTP/1.1 200 OK\r\n\r\n",
    ]
    known += [b"\2" + _response(b"{}", 429, field) for field in _FIELDS]
    return Target([b"\1" + card, b"\2" + chat, b"\3" + scored], spoil, parse, known)


_HEADS = [
    "HTTP/1.1",
    "HTTP/9.9",
    "200",
    "302",
    "-1",
    "Transfer-Encoding: chunked",
    "Content-Encoding: gzip",
    "Content-Encoding: br",
]
_HEADS += [
    "Content-Length: 99999999999999999999",
    "Content-Length: -1",
    "Set-Cookie: a=b",
    "Connection: upgrade",
    "Location: file:///etc/passwd",
]
_FIELDS = [
    b"",
    b"Retry-After: 0",
    b"Retry-After: 99999999999999999999",
    b"Retry-After: -1",
    b"Retry-After: Wed, 99 Nov 2099 99:99:99 GMT",
]
_FIELDS += [
    b"Retry-After: \xd9\xa3",
    b"Location: http://127.0.0.1:9/\x1b[31m",
    b"Location: " + b"x" * 20_000,
    b"Content-Type: \xff",
    b"Retry-After: nan",
]
_FIELDS += [f"X-{i}: y".encode() for i in range(3)] + [b"Retry-After: Mon, 01 Jan 0001 00:00:00 +2359"]


def _response(body: bytes, status: int = 200, field: bytes = b"") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n".encode()
    return head + (field + b"\r\n" if field else b"") + b"\r\n" + body


class _Replies:
    """A server on the loopback that sends `content` to whoever asks, and closes."""

    def __init__(self):
        import socket

        self.content = b""
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self._socket.accept()
            with client:
                try:
                    client.settimeout(10)
                    self._answer(client)
                except OSError:
                    pass  # whoever asked has gone

    def _answer(self, client) -> None:
        asked = b""
        while b"\r\n\r\n" not in asked and (part := client.recv(65_536)):
            asked += part
        head, _, body = asked.partition(b"\r\n\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0
        )
        while len(body) < length and (part := client.recv(65_536)):
            body += part
        client.sendall(self.content)


PARSERS = [
    Parser("official", official),
    Parser("parquet", parquet, loads=True),
    Parser("server", server),
]
