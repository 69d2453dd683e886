"""Readers of settings and of text: configs, options, rollouts, choices, what lies in a run's folder, what is shown."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from random import Random

import torch
import yaml
from PIL import Image

from fuzz.harness import CANARY, STEERS, Reader, Target
from fuzz.mutations import TOKENS, encoded, lines_spoiler, spoil_json, spoil_json_lines, table
from lever_lm.cli.options import finite, parse_shots
from lever_lm.cli.status import run_status
from lever_lm.config.load import ENVIRONMENT, environment_values, resolve
from lever_lm.config.schema import Config, to_dict
from lever_lm.config.values import build, merge
from lever_lm.data import Example, StoredImage, VqaData
from lever_lm.evaluation.choices_file import read_icds
from lever_lm.evaluation.findings_files import DIAGNOSIS
from lever_lm.evaluation.report import phrasing
from lever_lm.evaluation.report.curves import training_curves
from lever_lm.evaluation.report.page import _curve_chart, write_report
from lever_lm.evaluation.results import _write_metrics
from lever_lm.training.batches import to_tensors
from lever_lm.training.environment import differences, environment, listed, own_files, read_environment, record
from lever_lm.training.find_checkpoint import find_checkpoint
from lever_lm.training.rollouts import file_format
from lever_lm.training.rollouts.generate import check_rows
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.select_checkpoint import STRATEGIES, choose, read_best, read_history
from lever_lm.utils.console import Screen
from lever_lm.utils.hub import fetch_model, missing_files
from lever_lm.utils.locks import InUse, alone
from lever_lm.utils.terminal import one_line, printable, shown

DATA = Path(__file__).parents[1] / "data"
READERS: dict[str, Reader] = {}
DEEP = b"[" * 100_000


def reader(name: str, **limits) -> Callable:
    """Put a function that makes a target in a folder into READERS."""

    def put(begin: Callable[[Path], Target]) -> Callable[[Path], Target]:
        READERS[name] = Reader(name, begin, **limits)
        return begin

    return put


def to_file(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """Return a parse that writes the input to a file first."""

    def parse(content: bytes):
        path.write_bytes(content)
        return read()

    return parse


def dumped(content) -> bytes:
    """Return a value as JSON."""
    return json.dumps(content).encode()


def lines_of(rows: list) -> bytes:
    """Return values as JSON lines."""
    return b"".join(dumped(row) + b"\n" for row in rows)


def examples(count: int, image: object = "x.jpg", first: int = 0) -> tuple[Example, ...]:
    """Return examples with ids that count."""
    return tuple(Example(i, i, "<b>what</b>?", ("yes",), ("yes",), image) for i in range(first, first + count))


def _argument(content: bytes) -> str:
    """Return bytes as Python hands on an argument or a variable."""
    return os.fsdecode(content.replace(b"\0", b""))


# ---------------------------------------------------------------------- settings

_YAML = table("""&a¦<<: *a¦!!python/object/apply:os.system¦!!python/name:os.system¦!!binary¦!!set¦!x¦? [a]: b¦---¦...¦
%YAML 99.0¦|¦>-¦{¦}¦[¦]¦- - - -¦2001-99-99¦12:30:45¦1:1:1:1:1¦0b11¦0o7¦.inf¦.nan¦yes¦off¦=¦~¦\t¦grpo¦seed¦
policy.hidden_dim¦*a""")
_YAML_KNOWN = [f"seed: !!python/object/apply:os.system ['touch {CANARY}']\n".encode(), b"seed: 2001-02-30\n", DEEP]
_YAML_KNOWN += [b"{a: " * 5000, b"- " * 100_000, b"? " * 3000, b"x: " + b"9" * 200_000 + b"\n", b"a: &a [*a]\n"]
_YAML_KNOWN += [
    b"x: " + b"1:" * 50_000 + b"1\n",
    b"x" * 300_000,
    b"#" * 200_000,
    b"? {a: 1}\n: 2\n",
    b"seed: 1\nseed: 2\n",
]
_YAML_KNOWN += [b"%TAG ! tag:x,2000:\n--- !y\n", "\ufeffseed: 1".encode("utf-16")]
_YAML_KNOWN += [b"!!python/object/new:type {args: [z, !!python/tuple [], {}]}\n"]
_LAUGHS = b"".join(b"%c: &%c [%s]\n" % (i, i, b"*%c," % (i - 1) * 8) for i in b"bcd")
_YAML_KNOWN.append(b"a: &a [x,x,x,x,x,x,x,x,x]\n" + _LAUGHS)


@reader("config")
def config_file(folder: Path) -> Target:
    """`--config FILE`."""
    grpo = {"epochs": 3, "lr": "1e-4", "top_k": [4, 2], "kl_beta": 0.05, "advantage": "rank"}
    settings = {"seed": 3, "device": "cpu", "grpo": grpo, "policy": {"hidden_dim": 16, "stop": True}}
    settings |= {
        "lvlm": {"server": "http://127.0.0.1:8000/v1", "timeout": 2.5},
        "rollout": {"temperatures": [1.0, 1.3]},
    }
    others = [{"seed": 1, "data": {"okvqa_path": "/data", "file_prefix": "v2_"}}, {"prompt": {"style": "dialogue"}}]
    seeds = [yaml.safe_dump(part, sort_keys=False).encode() for part in (settings, *others)]
    path = folder / "config.yaml"

    def read() -> None:
        config, *_ = resolve({"dataset": "digits"}, path, [], {})
        assert "/" not in config.data.name, "a name that leads into another folder"

    return Target(seeds, lines_spoiler(_YAML), to_file(path, read), _YAML_KNOWN)


@reader("set")
def set_options(folder: Path) -> Target:
    """`--set KEY=VALUE`."""
    seeds = [
        b"grpo.kl_beta=0.05",
        b"grpo.top_k=[4, 2]",
        b"rollout.temperatures=1.0",
        b"policy={hidden_dim: 8}",
        b"seed=1",
    ]
    known = [b"seed=" + content for content in _YAML_KNOWN]
    known += [b"a." * 20_000 + b"=1", b"=1", b"seed", b".=1", b"grpo.=1"]
    words = [*_YAML, "grpo.lr=", ".", "=", "data", "lvlm.server"]
    return Target(seeds, lines_spoiler(words), lambda c: resolve({}, None, [_argument(c)], {}), known)


@reader("environment")
def variables(folder: Path) -> Target:
    """Environment variables: NAME=VALUE on each line."""

    def parse(content: bytes) -> None:
        pairs = (line.partition("=") for line in _argument(content).split("\n"))
        values, environ = {"data": {"okvqa_path": "/data"}}, {name: text for name, _, text in pairs}
        for name, found in environment_values(values, environ, {})[0].items():
            values = merge(values, found)
            assert not STEERS & set(map(ord, printable(environ[name])))
        build(values)

    sound = {int: "3", float: "0.5", str: "hard"}
    seeds = [f"{name}={sound.get(kind, 'true')}".encode() for name, (_, kind) in ENVIRONMENT.items()]
    return Target([b"\n".join(seeds), *seeds], lines_spoiler([*ENVIRONMENT, "1e-4", "TRUE", "off", "1_0"]), parse)


@reader("run-config")
def run_config(folder: Path) -> Target:
    """The config.yaml of a run folder, against the config of the command."""
    run, config = RunFolder(folder / "run"), Config()
    run.path.mkdir()

    def read() -> None:
        assert run.lvlm() is None or isinstance(run.lvlm(), str)
        assert all(len(line) < 400 and "\n" not in line for line in run.differences(config))
        run.check(config)

    kept = {
        key: value for key, value in to_dict(config).items() if key in ("seed", "device", "lvlm", "infer", "reward")
    }
    same = [yaml.safe_dump(part, sort_keys=False).encode() for part in ({}, kept, {"infer": {"num_queries": 4}})]
    return Target(same, lines_spoiler(_YAML), to_file(run.config, read), _YAML_KNOWN)


@reader("shots")
def shots(folder: Path) -> Target:
    """`--shots TEXT`."""
    known = [b"1-9999," * 1000 + b"1", b"0", b"", b",", b"-", b"1-", b"9999-1", "٣".encode(), b"1" * 100_000]
    spoil, seeds = lines_spoiler(["1", "2-3", ",", "-"]), [b"5", b"1,2,4", b"1-5", b"1-9999"]
    return Target(seeds, spoil, lambda c: parse_shots(_argument(c)), known)


# ---------------------------------------------------------------------- rollouts and choices


def _rollouts(old: bool) -> bytes:
    """Return three groups of Lever-Plus's in our layout, or in the old one."""
    content = json.loads((DATA / "rl_data" / "small_edge_cases.json").read_text())
    kept: dict = {"_meta": {"fingerprint": "f", "version": 1}}
    for key in [key for key in content if key.isdigit()][:3]:
        pool, tried = content[key]["candidate_pool_ids"][:40], content[key]["pointer_candidates"][:3]
        kept[key] = {**content[key], "candidate_pool_ids": pool, "pointer_candidates": tried}
        for t in tried:
            t |= {"pointer": [0, 1], "pointer_global": pool[:2], "eval_failed": False, "vqa_eval_mode": "vqaEval"}
            if old:
                t["pointer"] = t.pop("pointer_global")
        if old:
            del kept[key]["candidate_pool_ids"]
    return dumped(kept)


@reader("rollouts")
def rollouts(folder: Path) -> Target:
    """A rollout file in either layout, read as `lever train --rl-data` does."""
    path, matrix = folder / "rollouts.json", torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    train = examples(300, first=100_000)

    def read() -> None:
        file_format.made_of(path)
        check_rows(path, train)
        groups = file_format.load_groups(path)
        file_format.load_groups(path, reward_mode="hard_plus_gtprob_plus_rel", require_positive=True)
        file_format.split_ids([int(key) for key in file_format.read_rollouts(path) if file_format.is_query(key)])
        to_tensors(groups, matrix, matrix)
        for group in groups:
            assert all(abs(reward) <= 5 for reward in group.rewards)
            assert all(0 <= place < len(group.pool) for sequence in group.sequences for place in sequence)
        assert len({group.query_id for group in groups}) == len(groups)
        file_format.group_report(path)

    known = [DEEP, b'{"1":' * 100_000, b'{"1":{},"01":{}}', b'{"1":{"pointer_candidates":[]}}', b'{"1":1e999}']
    return Target([_rollouts(False), _rollouts(True)], spoil_json, to_file(path, read), [*known, b'{"%d":{}}' % 9**18])


@reader("icds")
def icds(folder: Path) -> Target:
    """`--icds FILE` in its three layouts."""
    path, both = folder / "icds.json", (examples(2, first=1), examples(10, first=10))
    queries, train = (
        [replace(one, image=StoredImage(f"image {one.image_id}", 1, None)) for one in part] for part in both
    )
    by_id = {"1": [10, 11], "2": [12, 13, 14]}
    rows = [{"question_id": int(query), "icds": chosen} for query, chosen in by_id.items()]

    def spoil(rng: Random, content: bytes) -> bytes:
        return spoil_json_lines(rng, content) if content == lines_of(rows) else spoil_json(rng, content)

    def read() -> None:
        for chosen in read_icds(path, queries, train, 2):
            assert all(0 <= row < len(train) for row in chosen)

    known = [DEEP, b"\n" * 200_000, b"[]", b"{}", b'{"1":[10,11],"01":[12,13],"2":[10,11]}', lines_of(rows) * 2]
    return Target([dumped(by_id), dumped(rows), lines_of(rows)], spoil, to_file(path, read), known)


# ---------------------------------------------------------------------- the folder of a run


def _run(folder: Path) -> RunFolder:
    run = RunFolder(folder / "run")
    run.path.mkdir()
    return run


def _metrics() -> bytes:
    row = {"epoch": 1, "phase": "grpo", "train_loss": 1.5, "ppo_loss": -0.5, "kl": 0.04, "val_reward": 0.5}
    first = {"epoch": 1, "phase": "rce", "train_loss": 2.0, "val_loss": 1.0}
    return lines_of([first, *({**row, "epoch": epoch, "val_loss": 1 / epoch} for epoch in (1, 2, 3))])


def choices(run: RunFolder | None, log: Path | None) -> None:
    """Do what `lever best-ckpt --show-all` does but for writing."""
    history = read_history(run, log)
    for strategy in STRATEGIES:
        json.dumps(finite(choose(history, strategy, run)), allow_nan=False)


@reader("metrics")
def metrics_file(folder: Path) -> Target:
    """A run's metrics.jsonl, as `lever best-ckpt`, `lever status` and the report read it."""
    run = _run(folder)

    def read() -> None:
        json.dumps(finite(run_status(run)), allow_nan=False)
        choices(run, None)
        rows = run.rows()
        for curves in training_curves([("x", rows)]).values():
            for metric, series in curves.items():
                _curve_chart("", metric, series)
        for tell in (phrasing.strategies, phrasing.health, phrasing.groups, phrasing.warnings_of):
            tell(rows)

    known = [b'{"epoch":' * 100_000, b"\n" * 100_000, b'{"epoch":1,"phase":"rce"}\n' * 5000, b"x" * (2 << 20)]
    known.append(b'{"epoch":1e400,"phase":"rce"}\n')
    return Target([_metrics()], spoil_json_lines, to_file(run.metrics, read), known)


@reader("log")
def log_file(folder: Path) -> Target:
    """A training log, ours or the lineage's: `--log FILE`."""
    path, title = folder / "train.log", "阶段3：GRPO训练"
    text = (DATA / "best_checkpoint" / "normal_50.log").read_text().split("\n")
    start = next(i for i, line in enumerate(text) if title in line)
    table = encoded("\n".join(text[max(0, start - 1) : start + 8]) + "\n")
    known = [table + b" " * 2_000_000 + b"\n", table + b"1 " * 1_000_000 + b"\n", table * 2000]
    known += [table + b"9" * 500_000 + b"\n", encoded(title) * 200_000]
    spoil = lines_spoiler([title, "阶段2：RCE预热", "Epoch", "nan", "inf", "-1e5", "1."])
    return Target([table, table * 2], spoil, to_file(path, lambda: choices(None, path)), known)


@reader("best")
def best_file(folder: Path) -> Target:
    """A run's best.json, as `lever infer` and `lever convert` read it."""
    run = _run(folder)
    run.metrics.write_bytes(_metrics())
    run.checkpoint("grpo", 3).write_bytes(b"")

    def read() -> None:
        read_best(run)
        found, *_ = find_checkpoint(run, None, {})
        assert found.is_file()
        assert found.resolve().parent == run.path.resolve(), "a file of another folder"

    for name in ("x", "y"):
        (folder / name).touch()
    seed = {"strategy": "val_loss", "epoch": 3, "phase": "grpo", "checkpoint": "x/grpo_epoch3.pt", "rows": 2}
    seed["exists"] = True
    known = [DEEP, b"{}", b'{"checkpoint":"\\u0000","strategy":"x"}', b'{"checkpoint":"/","strategy":"x"}']
    changes = [{"checkpoint": name} for name in ("../../x", "../x", "run/..", "a" * 300, "a" * 5000)]
    changes += [{"strategy": "a" * 500_000}, {"strategy": ["val_loss"]}, {"rows": 10**400}]
    known += [dumped({**seed, **change}) for change in changes]
    return Target([dumped(seed)], spoil_json, to_file(run.best, read), known)


@reader("environment-file")
def environment_file(folder: Path) -> Target:
    """A run's env.json, as a resumed and a repeated run read it."""
    run, here = _run(folder), environment(Config(device="cpu"), {"rollouts": "1"}, {"data": "2"}, {})
    (folder / "rl.json").write_text("{}")

    def read() -> None:
        listed(differences(read_environment(run), here))
        own_files(run)
        record(run, here, lambda text: None)

    seed = {**here, "sources": {"rl_data": str(folder / "rl.json")}}
    seeds = [dumped(seed), dumped({**seed, "torch": "1", "resumed_with": [seed]})]
    return Target(seeds, spoil_json, to_file(run.environment, read), [DEEP, b"{}", b"[]", b""])


class _Inference:
    """A run with an inference, and the data they are of."""

    def __init__(self, folder: Path):
        Image.new("RGB", (4, 4)).save(image := folder / "x.png")
        self.run, self.folder, shown = _run(folder), folder / "inference", examples(6, str(image))
        self.folder.mkdir()
        self.data = VqaData("x", shown[:4], shown[4:], "f")
        self.run.metrics.write_bytes(_metrics())
        row = {"answer": "yes", "question": "what?", "accuracy": 1.0, "references": ["yes"], "icds": [0, 1]}
        row |= {"probabilities": [0.5, 0.25], "considered": [[0, 0.5], [2, 0.125]]}
        self.samples = lines_of([{"question_id": i, "image_id": i, **row} for i in (4, 5)])
        self.samples_file = self.folder / "samples_grpo_2shot.jsonl"
        self.samples_file.write_bytes(self.samples)
        self.result = {"method": "grpo", "shots": 2, "accuracy": 0.5, "ci": [0.25, 0.75], "raw_accuracy": 0.5, "n": 2}
        self.result["normalized_accuracy"] = 0.5
        test = {
            "method": "grpo",
            "against": "random",
            "shots": 2,
            "difference": 0.1,
            "low": 0.0,
            "high": 0.2,
            "p": 0.04,
        }
        cost = {"train_calls": None, "query_calls": 1, "seconds": 0.5, "chooses_from": "<b>what"}
        arena = [{**self.result, **cost}, {**self.result, **cost, **test, "method": "rce", "p_holm": 0.08}]
        facts = {"tests": [test], "arena": arena, "checkpoint": "x.pt", "setting": "s"}
        self.results = dumped({"results": [self.result], **facts})
        self.results_file = self.folder / "metrics.json"
        self.results_file.write_bytes(self.results)

    def report(self) -> None:
        page = write_report(self.run, self.folder, self.data).read_text(encoding="utf-8")
        assert not re.search("<script>|<b>what", page), "text is markup in the report"
        assert not STEERS & set(map(ord, page)), "text steers in the report"


@reader("results")
def results_file(folder: Path) -> Target:
    """An inference's metrics.json, as the next inference and the report read it."""
    made = _Inference(folder)

    def read() -> None:
        kept = Path(shutil.copy(made.results_file, folder / "kept.json"))
        written = _write_metrics(kept, [{**made.result, "shots": 4}], {"setting": "s"}, str)
        json.dumps(written, allow_nan=False)
        assert written["results"][-1]["shots"] == 4
        made.report()

    known = [DEEP, b"{}", b'{"results":[]}', b'{"results":{}}']
    return Target([made.results], spoil_json, to_file(made.results_file, read), known)


@reader("diagnosis")
def diagnosis_file(folder: Path) -> Target:
    """An inference's diagnosis.json, as the report reads it."""
    made = _Inference(folder)
    test = {"difference": 0.1, "low": 0.0, "high": 0.2, "p": 0.04}
    rows = [{"key": "picks", "label": "<b>what", "value": 0.5, "says": "<b>what", "interval": [0.25, 0.75]}]
    rows.append({**rows[0], "key": "zero_shot", "test": test, "parts": {"rate": 0.5}})
    methods = {"grpo": rows, "<b>what": rows}
    seed = {"n": 2, "shots": 2, "checkpoint": "x.pt", "policies": {"grpo": "0" * 16}, "methods": methods}
    known = [DEEP, b"{}", dumped({**seed, "methods": {f"m{i}": rows for i in range(5000)}})]
    return Target([dumped(seed)], spoil_json, to_file(made.folder / DIAGNOSIS, made.report), known)


@reader("samples")
def samples_file(folder: Path) -> Target:
    """An inference's samples, as the report reads them."""
    made = _Inference(folder)
    known = [DEEP, b"\n" * 100_000, b"x" * (3 << 20), made.samples * 500]
    return Target([made.samples], spoil_json_lines, to_file(made.samples_file, made.report), known)


@reader("index")
def index_file(folder: Path) -> Target:
    """A model's index of weights."""
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (folder / name).write_text("{}")
    (folder / "a.safetensors").write_bytes(b"")

    def read() -> None:
        missing = missing_files(folder)
        assert all(isinstance(name, str) and name.isprintable() for name in missing)
        assert sum(map(len, missing)) < 10_000
        fetch_model(str(folder), "lvlm.path")

    seed = {"metadata": {"total_size": 8}, "weight_map": {"lm.weight": "a.safetensors", "v.weight": "a.safetensors"}}
    maps = ({"a": "../../etc/passwd"}, {"a": "\0"}, ["a"], {"a": "b" * 5000})
    known = [DEEP, *(dumped({"weight_map": names}) for names in maps)]
    return Target([dumped(seed)], spoil_json, to_file(folder / "model.safetensors.index.json", read), known)


@reader("lock")
def lock_file(folder: Path) -> Target:
    """A lock file that an ended process left behind, and one that another process holds."""
    left, held = folder / "left.lock", folder / "held.lock"
    (ours, theirs), (told, tells) = os.pipe(), os.pipe()
    if not os.fork():  # the holder, until this process is gone
        os.close(theirs)
        fcntl.lockf(os.open(held, os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)
        os.write(tells, b"1")
        os.read(ours, 1)
        os._exit(0)
    os.close(ours)
    os.read(told, 1)

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
    known = [dumped(seed), b"", b"[" * 4096, b'{"pid":1' + b"0" * 4000 + b"}", b'{"pid":true,"host":""}']
    known.append(dumped({**seed, "host": "h" * 4000}))
    return Target([b""], lambda rng, content: spoil_json(rng, dumped(seed)), parse, known)


# ---------------------------------------------------------------------- what is shown


@reader("terminal")
def terminal(folder: Path) -> Target:
    """Any text, on its way to the screen."""
    screen, seen = Screen(), StringIO()
    screen.out.file = seen

    def parse(content: bytes) -> None:
        try:
            decoded = content.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            decoded = content.decode("utf-8", "replace")
        for text in (decoded, _argument(content)):
            for made in (printable(text), one_line(text), shown(text)):
                assert not STEERS & set(map(ord, made)), ascii(made)[:100]
                made.encode()
            assert "\n" not in one_line(text)
            seen.seek(0)
            seen.truncate()
            screen.say(text)
            screen.table(text[:50], ["a", text[:50]], [[text[:50], "1"]])
            assert not STEERS & set(map(ord, seen.getvalue())), ascii(seen.getvalue())[:100]

    seeds = [encoded(" ".join(TOKENS[:12])), b"plain text", "naïve 文字 🎲".encode()]
    return Target(seeds, lines_spoiler([]), parse, [b"x" * 1_000_000, encoded("\x1b[2J" * 10_000)])
