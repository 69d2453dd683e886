"""Parsers of what lies in folders of runs and models: metrics, logs, best.json, env.json, results, locks, an index."""

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

from fuzzing.harness import STEERS, Parser, Target
from fuzzing.mutations import lines_spoiler, spoil_json
from fuzzing.texts import DATA, to_file

_DEEP = 100_000

_ROW = {
    "epoch": 1,
    "phase": "grpo",
    "train_loss": 1.5,
    "val_loss": 1.25,
    "ppo_loss": -0.5,
    "kl": 0.04,
    "val_reward": 0.5,
}


def _metrics() -> bytes:
    rows = [{"epoch": 1, "phase": "rce", "train_loss": 2.0, "val_loss": 1.0}]
    rows += [{**_ROW, "epoch": epoch, "val_loss": 1 / epoch} for epoch in (1, 2, 3)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _spoil_rows(rng, content: bytes) -> bytes:
    """Some line of JSON lines spoilt as JSON, or the lines as lines."""
    lines = content.split(b"\n")
    if rng.random() < 0.3 or len(lines) < 2:
        return lines_spoiler(["epoch", "phase", "rce", "{}"])(rng, content)
    i = rng.randrange(len(lines) - 1)
    lines[i] = spoil_json(rng, lines[i])
    return b"\n".join(lines)


def choices(run, log: Path | None) -> None:
    """What `lever best-ckpt --show-all` does but for writing."""
    from lever_lm.cli.options import finite
    from lever_lm.training.select_checkpoint import STRATEGIES, choose, read_history

    history = read_history(run, log)
    for strategy in STRATEGIES:
        json.dumps(finite(choose(history, strategy, run)), allow_nan=False)


def metrics_file(folder: Path) -> Target:
    """A run's metrics.jsonl, as `lever best-ckpt`, `lever status` and the report read it."""
    from lever_lm.cli.options import finite
    from lever_lm.cli.status import run_status
    from lever_lm.evaluation.report import phrasing as words
    from lever_lm.evaluation.report.curves import training_curves
    from lever_lm.evaluation.report.page import _curve_chart
    from lever_lm.training.run_dir import RunFolder

    run = RunFolder(folder / "run")
    run.path.mkdir()

    def read() -> None:
        json.dumps(finite(run_status(run)), allow_nan=False)
        choices(run, None)
        rows = run.rows()
        for curve in training_curves([("x", rows)]):
            _curve_chart("x", curve)
        for tell in (words.strategies, words.health, words.of_groups, words.warnings_of):
            tell(rows)

    known = [
        b'{"epoch":' * _DEEP,
        b"\n" * 100_000,
        b'{"epoch":1,"phase":"rce"}\n' * 5000,
        b"x" * (2 << 20),
        b'{"epoch":1e400,"phase":"rce"}\n',
    ]
    return Target([_metrics()], _spoil_rows, to_file(run.metrics, read), known)


def log_file(folder: Path) -> Target:
    """A training log, ours or the lineage's: `--log FILE`."""
    path = folder / "train.log"
    text = (DATA / "best_checkpoint" / "normal_50.log").read_text().split("\n")
    start = next(i for i, line in enumerate(text) if "阶段3：GRPO训练" in line)
    table = "\n".join(text[max(0, start - 1) : start + 8]) + "\n"
    words = ["阶段3：GRPO训练", "阶段2：RCE预热", "Epoch", "nan", "inf", "-1e5", "1."]
    known = [
        table.encode() + b" " * 2_000_000 + b"\n",
        table.encode() + b"1 " * 1_000_000 + b"\n",
        table.encode() * 2000,
        (table + "9" * 500_000 + "\n").encode(),
        "阶段3：GRPO训练".encode() * 200_000,
    ]
    return Target(
        [table.encode(), (table * 2).encode()], lines_spoiler(words), to_file(path, lambda: choices(None, path)), known
    )


def best_file(folder: Path) -> Target:
    """A run's best.json, as `lever infer` and `lever convert` read it."""
    from lever_lm.training.find_checkpoint import find_checkpoint
    from lever_lm.training.run_dir import RunFolder
    from lever_lm.training.select_checkpoint import kept_choice, read_best

    run = RunFolder(folder / "run")
    run.path.mkdir()
    run.metrics.write_bytes(_metrics())
    run.checkpoint("grpo", 3).write_bytes(b"")

    def read() -> None:
        kept_choice(run)
        read_best(run)
        find_checkpoint(run, None, {})

    seed = {
        "strategy": "val_loss",
        "epoch": 3,
        "phase": "grpo",
        "checkpoint": "x/grpo_epoch3.pt",
        "rows": 2,
        "exists": True,
    }
    known = [b"[" * _DEEP, b"{}", b'{"checkpoint":"\\u0000","strategy":"x"}', b'{"checkpoint":"/","strategy":"x"}']
    known += [
        json.dumps({**seed, "checkpoint": "a" * 5000}).encode(),
        json.dumps({**seed, "strategy": "a" * 500_000}).encode(),
    ]
    return Target([json.dumps(seed).encode()], spoil_json, to_file(run.best, read), known)


def index_file(folder: Path) -> Target:
    """A model's index of weights."""
    from lever_lm.utils.hub import fetch_model, missing_files

    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (folder / name).write_text("{}")
    (folder / "a.safetensors").write_bytes(b"")

    def read() -> None:
        missing_files(folder)
        fetch_model(str(folder), "lvlm.path")

    seed = {"metadata": {"total_size": 8}, "weight_map": {"lm.weight": "a.safetensors", "v.weight": "a.safetensors"}}
    known = [
        b"[" * _DEEP,
        b'{"weight_map":{"a":"../../etc/passwd"}}',
        b'{"weight_map":{"a":"\\u0000"}}',
        b'{"weight_map":["a"]}',
    ]
    known += [json.dumps({"weight_map": {"a": "b" * 5000}}).encode()]
    return Target(
        [json.dumps(seed).encode()], spoil_json, to_file(folder / "model.safetensors.index.json", read), known
    )


def lock_file(folder: Path) -> Target:
    """A lock that somebody left behind, or has."""
    import fcntl

    from lever_lm.utils.locks import InUse, alone

    left, held = folder / "left.lock", folder / "held.lock"
    held.touch()
    ours, theirs = os.pipe()
    if not os.fork():  # who has it, until this process is gone
        os.close(theirs)
        handle = os.open(held, os.O_RDWR)
        fcntl.lockf(handle, fcntl.LOCK_EX)
        os.read(ours, 1)
        os._exit(0)
    os.close(ours)
    while _takes(held):
        pass

    def parse(content: bytes) -> None:
        left.write_bytes(content)
        with alone(left, "it", "wait") as left_by:
            if left_by is not None:
                f"process {left_by['pid']} on {left_by['host']} ended in the midst of it"
        held.write_bytes(content)
        try:
            with alone(held, "it", "wait"):
                raise AssertionError("a lock that another process has was given")
        except InUse:
            if content:
                raise

    seed = {"pid": 12, "host": "somewhere", "command": "train"}
    known = [
        b"",
        b"[" * 4096,
        b'{"pid":1' + b"0" * 4000 + b"}",
        b'{"pid":true,"host":""}',
        json.dumps({**seed, "host": "h" * 4000}).encode(),
    ]
    return Target([b""], partial(_spoil_lock, json.dumps(seed).encode()), parse, [json.dumps(seed).encode(), *known])


def _spoil_lock(seed: bytes, rng, content: bytes) -> bytes:
    return spoil_json(rng, seed)


def _takes(path: Path) -> bool:
    """Whether nobody has the lock; it is let go at once."""
    import fcntl

    with open(path, "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False


def environment_file(folder: Path) -> Target:
    """A run's env.json, as a resumed and a repeated run read it."""
    from lever_lm.config.schema import Config
    from lever_lm.training.environment import differences, environment, listed, own_files, read_environment, record
    from lever_lm.training.run_dir import RunFolder

    run, here = RunFolder(folder / "run"), environment(Config(device="cpu"), {"rollouts": "1"}, {"data": "2"}, {})
    run.path.mkdir()
    (folder / "rl.json").write_text("{}")

    def read() -> None:
        listed(differences(read_environment(run), here))
        own_files(run)
        record(run, here, lambda text: None)

    seed = {**here, "sources": {"rl_data": str(folder / "rl.json")}}
    again = {**seed, "torch": "1", "resumed_with": [seed]}
    seeds = [json.dumps(content).encode() for content in (seed, again)]
    return Target(seeds, spoil_json, to_file(run.environment, read), [b"[" * _DEEP, b"{}", b"[]", b""])


_RESULT = {"method": "grpo", "shots": 2, "accuracy": 0.5, "ci": [0.25, 0.75], "raw_accuracy": 0.5, "n": 2}


def _inference(folder: Path):
    """A run, its inference folder and the data they are of."""
    from PIL import Image

    from lever_lm.data import Example, VqaData
    from lever_lm.training.run_dir import RunFolder

    image = folder / "x.png"
    Image.new("RGB", (4, 4)).save(image)
    examples = [Example(i, i, "<b>what</b>?", ("yes",), ("yes",), str(image)) for i in range(6)]
    run, inference = RunFolder(folder / "run"), folder / "inference"
    run.path.mkdir()
    inference.mkdir()
    run.metrics.write_bytes(_metrics())
    rows = [
        {
            "question_id": i,
            "answer": "yes",
            "question": "what?",
            "image_id": i,
            "accuracy": 1.0,
            "references": ["yes"],
            "icds": [0, 1],
            "probabilities": [0.5, 0.25],
            "considered": [[0, 0.5], [2, 0.125]],
        }
        for i in (4, 5)
    ]
    samples = "".join(json.dumps(row) + "\n" for row in rows).encode()
    test = {"method": "grpo", "against": "random", "shots": 2, "difference": 0.1, "low": 0.0, "high": 0.2, "p": 0.04}
    content = {"results": [_RESULT], "tests": [test], "checkpoint": "x.pt", "setting": "s"}
    return (
        run,
        inference,
        VqaData("x", tuple(examples[:4]), tuple(examples[4:]), "f"),
        samples,
        json.dumps(content).encode(),
    )


def _report(run, inference: Path, data) -> None:
    from lever_lm.evaluation.report.page import write_report

    page = write_report(run, inference, data).read_text(encoding="utf-8")
    assert not re.search("<script>|<b>what", page), "text is markup in the report"
    assert not STEERS & set(map(ord, page)), "text steers in the report"


def results_file(folder: Path) -> Target:
    """An inference's metrics.json, as the next inference and the report read it."""
    from lever_lm.evaluation.results import _write_metrics

    run, inference, data, samples, content = _inference(folder)
    (inference / "samples_grpo_2shot.jsonl").write_bytes(samples)
    path = inference / "metrics.json"

    def read() -> None:
        kept = Path(shutil.copy(path, folder / "kept.json"))
        json.dumps(_write_metrics(kept, [{**_RESULT, "shots": 4}], {"setting": "s"}), allow_nan=False)
        _report(run, inference, data)

    return Target(
        [content], spoil_json, to_file(path, read), [b"[" * _DEEP, b"{}", b'{"results":[]}', b'{"results":{}}']
    )


def samples_file(folder: Path) -> Target:
    """An inference's samples, as the report reads them."""
    run, inference, data, samples, content = _inference(folder)
    (inference / "metrics.json").write_bytes(content)
    parse = to_file(inference / "samples_grpo_2shot.jsonl", lambda: _report(run, inference, data))
    return Target([samples], _spoil_rows, parse, [b"[" * _DEEP, b"\n" * 100_000, b"x" * (3 << 20), samples * 500])


PARSERS = [
    Parser("metrics", metrics_file),
    Parser("log", log_file),
    Parser("best", best_file),
    Parser("environment-file", environment_file),
    Parser("results", results_file),
    Parser("samples", samples_file),
    Parser("index", index_file),
    Parser("lock", lock_file),
]
