"""Parsers of text: settings, rollouts, choices, metrics, logs, JSON beside models, lock files, what is shown."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import yaml

import lever_lm.evaluation.report.page  # noqa: F401 - and with it nearly all, before a worker is forked
from fuzzing.harness import CANARY, STEERS, Parser, Target
from fuzzing.mutations import TOKENS, encoded, lines_spoiler, spoil_json
from lever_lm.config.schema import Config, to_dict

DATA = Path(__file__).parents[2] / "tests" / "data"
_DEEP = 100_000


def to_file(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """A parse that writes the input to a file first."""

    def parse(content: bytes):
        path.write_bytes(content)
        return read()

    return parse


def argument(content: bytes) -> str:
    """Bytes as Python hands on an argument or a variable."""
    return os.fsdecode(content.replace(b"\0", b""))


# ---------------------------------------------------------------------- settings

_YAML_WORDS = [
    "&a",
    "*a",
    "<<: *a",
    "!!python/object/apply:os.system",
    "!!python/name:os.system",
    "!!binary",
    "!!set",
    "!x",
]
_YAML_WORDS += [
    "? [a]: b",
    "%YAML 99.0",
    "---",
    "...",
    "|",
    ">-",
    "{",
    "}",
    "[",
    "]",
    "- - - -",
    "2001-99-99",
    "12:30:45",
]
_YAML_WORDS += [
    "1:1:1:1:1",
    "0b11",
    "0o7",
    ".inf",
    ".nan",
    "yes",
    "off",
    "=",
    "~",
    "\t",
    "grpo",
    "policy.hidden_dim",
    "seed",
]
_YAML_KNOWN = [
    b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c,*c]\n",
    b"a: &a [*a]\n",
    b"seed: !!python/object/apply:os.system ['touch " + CANARY.encode() + b"']\n",
    b"!!python/object/new:type {args: [z, !!python/tuple [], {}]}\n",
    b"[" * _DEEP,
    b"{a: " * 5000,
    b"- " * _DEEP,
    b"? " * 3000,
    b"x: " + b"9" * 200_000 + b"\n",
    b"x: " + b"1:" * 50_000 + b"1\n",
    b"x" * 300_000,
    b"%TAG ! tag:x,2000:\n--- !y\n",
    "\ufeffseed: 1".encode("utf-16"),
    b"seed: 1\nseed: 2\n",
    b"seed: 2001-02-30\n",
    b"? {a: 1}\n: 2\n",
    b"#" * 200_000,
]
SETTINGS = {
    "seed": 3,
    "device": "cpu",
    "grpo": {"epochs": 3, "lr": "1e-4", "top_k": [4, 2], "kl_beta": 0.05, "advantage": "rank"},
    "rce": {"epochs": 2},
    "policy": {"hidden_dim": 16, "stop": True},
    "lvlm": {"server": "http://127.0.0.1:8000/v1", "timeout": 2.5},
    "rollout": {"temperatures": [1.0, 1.3]},
}


def _yaml_seeds() -> list[bytes]:
    parts = [
        SETTINGS,
        {"seed": 1, "data": {"okvqa_path": "/data", "file_prefix": "v2_"}},
        {"prompt": {"style": "dialogue"}},
    ]
    return [yaml.safe_dump(part, sort_keys=False).encode() for part in parts]


def config_file(folder: Path) -> Target:
    """`--config FILE`."""
    from lever_lm.config.load import resolve

    path = folder / "config.yaml"
    parse = to_file(path, lambda: resolve({"dataset": "digits"}, path, [], {}))
    return Target(_yaml_seeds(), lines_spoiler(_YAML_WORDS), parse, _YAML_KNOWN)


def set_options(folder: Path) -> Target:
    """`--set KEY=VALUE`."""
    from lever_lm.config.load import resolve

    seeds = [
        b"grpo.kl_beta=0.05",
        b"grpo.top_k=[4, 2]",
        b"rollout.temperatures=1.0",
        b"policy={hidden_dim: 8}",
        b"seed=1",
    ]
    known = [b"seed=" + content for content in _YAML_KNOWN] + [
        b"a." * 20_000 + b"=1",
        b"=1",
        b"seed",
        b".=1",
        b"grpo.=1",
    ]
    words = [*_YAML_WORDS, "grpo.lr=", ".", "=", "data", "lvlm.server"]
    return Target(seeds, lines_spoiler(words), lambda c: resolve({}, None, [argument(c)], {}), known)


def variables(folder: Path) -> Target:
    """Environment variables: NAME=VALUE on each line."""
    from lever_lm.config.load import ENVIRONMENT, environment_values
    from lever_lm.config.values import build, merge
    from lever_lm.utils.terminal import printable

    def parse(content: bytes) -> None:
        pairs = (line.partition("=") for line in argument(content).split("\n"))
        values = {"data": {"okvqa_path": "/data"}}
        environ = {name: text for name, _, text in pairs}
        for name, found in environment_values(values, environ, {}).items():
            values = merge(values, found)
            assert not STEERS & set(map(ord, printable(environ[name])))
        build(values)

    examples = {int: "3", float: "0.5", str: "hard"}
    seeds = [f"{name}={examples.get(kind, 'true')}".encode() for name, (_, kind) in ENVIRONMENT.items()]
    return Target([b"\n".join(seeds), *seeds], lines_spoiler([*ENVIRONMENT, "1e-4", "TRUE", "off", "1_0"]), parse)


def run_config(folder: Path) -> Target:
    """The config.yaml of a run folder, against the config of the command."""
    from lever_lm.training.run_dir import RunFolder

    run, config = RunFolder(folder / "run"), Config()
    run.path.mkdir()

    def read() -> None:
        run.lvlm()
        run.differences(config)
        run.check(config)

    full = {
        key: value for key, value in to_dict(config).items() if key in ("seed", "device", "lvlm", "infer", "reward")
    }
    same = [yaml.safe_dump(part, sort_keys=False).encode() for part in ({}, full, {"infer": {"num_queries": 4}})]
    return Target(same, lines_spoiler(_YAML_WORDS), to_file(run.config, read), _YAML_KNOWN)


def shots(folder: Path) -> Target:
    """`--shots TEXT`."""
    from lever_lm.cli.options import parse_shots

    known = [b"1-9999," * 1000 + b"1", b"0", b"", b",", b"-", b"1-", b"9999-1", "٣".encode(), b"1" * 100_000]
    return Target(
        [b"5", b"1,2,4", b"1-5", b"1-9999"],
        lines_spoiler(["1", "2-3", ",", "-"]),
        lambda c: parse_shots(argument(c)),
        known,
    )


# ---------------------------------------------------------------------- rollouts and choices


def _rollout_seed(old: bool) -> bytes:
    content = json.loads((DATA / "rl_data" / "small_edge_cases.json").read_text())
    keys = [key for key in content if key.isdigit()][:3]
    kept: dict = {"_meta": {"fingerprint": "f", "version": 1}}
    for key in keys:
        entry = content[key]
        pool = entry["candidate_pool_ids"][:40]
        kept[key] = {**entry, "candidate_pool_ids": pool, "pointer_candidates": entry["pointer_candidates"][:3]}
        for t in kept[key]["pointer_candidates"]:
            t |= {"pointer": [0, 1], "pointer_global": pool[:2], "eval_failed": False, "vqa_eval_mode": "vqaEval"}
            if old:
                t |= {"pointer": pool[:2]}
                t.pop("pointer_global")
        if old:
            kept[key].pop("candidate_pool_ids")
    return json.dumps(kept).encode()


def rollouts(folder: Path) -> Target:
    """A rollout file in either layout, read as `lever train --rl-data` does."""
    import torch

    from lever_lm.data import Example
    from lever_lm.training.batches import to_tensors
    from lever_lm.training.rollouts.file_format import (
        group_report,
        is_query,
        load_groups,
        made_elsewhere,
        read_rollouts,
        split_ids,
    )
    from lever_lm.training.rollouts.generate import check_rows

    path, matrix = folder / "rollouts.json", torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    train = [Example(100_000 + i, i, "what?", ("yes",), ("yes",), "x.jpg") for i in range(300)]

    def read() -> None:
        made_elsewhere(path)
        check_rows(path, train)
        groups = load_groups(path)
        load_groups(path, reward_mode="hard_plus_gtprob_plus_rel", require_positive=True)
        split_ids([int(key) for key in read_rollouts(path) if is_query(key)])
        to_tensors(groups, matrix, matrix)
        group_report(path)

    known = [
        b"[" * _DEEP,
        b'{"1":' * _DEEP,
        b'{"1":{},"01":{}}',
        b'{"1":{"pointer_candidates":[]}}',
        b'{"1":1e999}',
        b'{"' + b"9" * 18 + b'":{}}',
    ]
    return Target([_rollout_seed(False), _rollout_seed(True)], spoil_json, to_file(path, read), known)


def icds(folder: Path) -> Target:
    """`--icds FILE` in its three layouts."""
    from lever_lm.data import Example, StoredImage
    from lever_lm.evaluation.choices_file import read_icds

    def example(i: int) -> Example:
        return Example(i, i, "what?", ("yes",), ("yes",), StoredImage(f"image {i}", i, None))

    path, queries, train = folder / "icds.json", [example(1), example(2)], [example(i) for i in range(10, 20)]
    parse = to_file(path, lambda: read_icds(path, queries, train, 2))
    by_id = {"1": [10, 11], "2": [12, 13, 14]}
    rows = [{"question_id": int(query), "icds": chosen} for query, chosen in by_id.items()]
    whole = [json.dumps(by_id).encode(), json.dumps(rows).encode()]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()

    def spoil(rng, content: bytes) -> bytes:
        return (
            lines_spoiler(["question_id", "icds", "{}", "[]"])(rng, content)
            if content == lines
            else spoil_json(rng, content)
        )

    known = [b"[" * _DEEP, b"\n" * 200_000, b"[]", b"{}", b'{"1":[10,11],"01":[12,13],"2":[10,11]}', lines * 2]
    return Target([*whole, lines], spoil, parse, known)


# ---------------------------------------------------------------------- what is shown


def terminal(folder: Path) -> Target:
    """Text of anybody's, on its way to the screen."""
    from io import StringIO

    from lever_lm.utils.console import Screen
    from lever_lm.utils.terminal import one_line, printable, shown

    screen, seen = Screen(), StringIO()
    screen.out.file = seen

    def parse(content: bytes) -> None:
        for text in (content.decode("utf-8", "surrogatepass" if content[:1] > b"m" else "replace"), argument(content)):
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
    return Target(seeds, lines_spoiler([]), _only_text(parse), [b"x" * 1_000_000, encoded("\x1b[2J" * 10_000)])


def _only_text(parse: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def checked(content: bytes) -> None:
        try:
            parse(content)
        except UnicodeDecodeError:  # no text at all
            parse(content.decode("utf-8", "replace").encode("utf-8", "replace"))

    return checked


PARSERS = [
    Parser("config", config_file),
    Parser("set", set_options),
    Parser("environment", variables),
    Parser("run-config", run_config),
    Parser("shots", shots),
    Parser("rollouts", rollouts),
    Parser("icds", icds),
    Parser("terminal", terminal),
]
