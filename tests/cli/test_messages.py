"""One voice: the messages of errors, read from the sources: what is wrong, where, and the command that mends it.

A message is one line after `lever: `: it begins in lower case or with a name, ends without a full stop, and says the
same thing by the same word everywhere.
"""

import ast
import re
from pathlib import Path

import pytest

import lever_lm

ROOT = Path(lever_lm.__file__).parent
ERRORS = {"LeverError", "UsageError", "Unfinished", "_fail"}
# Our word ← others for the same.
WORDS = {
    "config": r"configuration|settings? file",
    "folder": r"run director(y|ies)|output director(y|ies)",
    "checkpoint": r"ckpt(?!`)(?! ?PATH)",
    "ICD": r"demonstrations?|in-context examples?|exemplars?",
    "evaluation": r"test split|val split|validation split",
    "dataset": r"data set",
    "LVLM": r"lvlms?\b(?!\.)|VLM",
    "GPU": r"gpu|CUDA device",
    "epoch": r"epoche",
    "cannot": r"can't|could not|couldn't|unable to|failed to",
    "is not": r"isn't|doesn't|don't|won't|aren't",
    "file name": r"filename",
}


def template(node) -> str | None:
    """The literal text of a message with `{}` for what is filled in; None where nothing of it is literal."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left) or "{}") + (template(node.right) or "{}")
    return None


def messages():
    """(where, text) of every message that a user may read as an error."""
    for path in sorted(ROOT.rglob("*.py")):
        if "assets" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            text = template(node.args[0])
            if text is not None and (name in ERRORS or (name == "stop" and text.count(" ") > 1)):
                yield f"{path.relative_to(ROOT)}, line {node.lineno}", text


MESSAGES = list(messages())


def offenders(wrong) -> str:
    return "\n".join(f"{where}: {text}" for where, text in MESSAGES if wrong(text))


def test_there_are_messages_to_look_at():
    assert len(MESSAGES) > 150


def test_a_message_begins_in_lower_case_or_with_a_name():
    # A, `code`, --flag, {placeholder}; names of ours and of formats keep their capitals
    assert not offenders(lambda text: not re.match(r"[a-z{`'\-]|[A-Z]{2,}", text))


def test_a_message_ends_without_a_full_stop():
    assert not offenders(lambda text: re.search(r"[.!?:;,\s]$", text))


def test_a_message_is_one_line_with_single_spaces():
    assert not offenders(lambda text: re.search(r"\n(?!  )|\t|(?<!\n)  ", text) is not None)


@pytest.mark.parametrize("word", [r"please", r"sorry", r"oops", r"!(?!=)", r"\berror:", r"warning:", r"\binvalid\b"])
def test_a_message_neither_begs_nor_shouts(word):
    assert not offenders(lambda text: re.search(word, text, re.IGNORECASE))


def test_values_stand_in_single_quotes_and_commands_in_backticks():
    assert not offenders(lambda text: '"' in text or "“" in text or "‘" in text)
    commands = "demo|train|rollout|best-ckpt|convert|infer|pick|export|report|status|doctor|config"
    bare = re.compile(rf"(?<![`\w./-])lever ({commands})\b")
    assert not offenders(bare.search)
    assert not offenders(lambda text: text.count("`") % 2)


@pytest.mark.parametrize("ours", WORDS)
def test_the_same_thing_has_the_same_word(ours):
    others = re.compile(rf"(?<![\w.`-])({WORDS[ours]})\b")
    assert not offenders(others.search), f"say {ours}"


def flags_of(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


def test_flags_that_a_message_names_exist():
    import typer.main

    from lever_lm.cli.commands import app

    known = {"--nproc-per-node", "--shm-size", "--repo-type", "--max-model-len"}  # of torchrun, docker, hf and vllm
    queue = [typer.main.get_command(app)]
    for command in queue:
        queue += getattr(command, "commands", {}).values()
        known |= {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    assert {"--set", "--overwrite", "--no-resume", "--tracker"} <= known
    assert not offenders(lambda text: flags_of(text) - known)


def test_keys_that_a_message_names_exist():
    from lever_lm.config.schema import all_keys

    keys = set(all_keys())
    sections = {key.split(".")[0] for key in keys if "." in key}
    named = re.compile(rf"(?<![\w./-])(?:{'|'.join(sections)})\.[a-z_]+")
    files = (".json", ".jsonl", ".yaml", ".log", ".pt")
    assert not offenders(lambda text: {k for k in named.findall(text) if not k.endswith(files)} - keys)


def test_a_usage_error_says_what_was_expected():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UsageError" and node.args:
                text = template(node.args[0])
                if text and not re.search(r"--[a-z]|expected|must|one of|exceeds|takes|\w\.\w|unset|[}`]$", text):
                    wrong.append(f"{path.name}, line {node.lineno}: {text}")
    assert not wrong, "\n".join(wrong)
