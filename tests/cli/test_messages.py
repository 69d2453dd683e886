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
COMMANDS = "demo|train|rollout|best-ckpt|convert|infer|pick|export|report|status|doctor|config"
# What a message must not match.
WRONG = {
    # A, `code`, --flag, {placeholder}; names of ours and of formats keep their capitals
    "begins in lower case or with a name": r"^(?![a-z{`'\-]|[A-Z]{2,})",
    "ends without a full stop": r"[.!?:;,\s]$",
    "is one line with single spaces": r"\n(?!  )|\t|(?<!\n)  ",
    "neither begs nor shouts": r"(?i:please|sorry|oops|!(?!=)|\berror:|warning:|\binvalid\b)",
    "has values in single quotes": r"[\"“‘]",
    "has commands in backticks": rf"(?<![`\w./-])lever ({COMMANDS})\b",
    "closes its backticks": r"^[^`]*`(?:[^`]*`[^`]*`)*[^`]*$",
    **{f"says {ours}": rf"(?<![\w.`-])({others})\b" for ours, others in WORDS.items()},
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
    """(where, name of the error, text) of every message that a user may read as an error."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if isinstance(node, ast.Call) and node.args:
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                text = template(node.args[0])
                if text is not None and (name in ERRORS or (name == "stop" and text.count(" ") > 1)):
                    yield f"{path.relative_to(ROOT)}, line {node.lineno}", name, text


MESSAGES = list(messages())


def offenders(wrong) -> str:
    return "\n".join(f"{where}: {text}" for where, _, text in MESSAGES if wrong(text))


@pytest.mark.parametrize("rule", WRONG)
def test_every_message(rule):
    assert len(MESSAGES) > 150
    assert not offenders(re.compile(WRONG[rule]).search), rule


def test_flags_that_a_message_names_exist():
    import typer.main

    from lever_lm.cli.commands import app

    known = {"--nproc-per-node", "--shm-size", "--repo-type", "--max-model-len"}  # of torchrun, docker, hf and vllm
    queue = [typer.main.get_command(app)]
    for command in queue:
        queue += getattr(command, "commands", {}).values()
        known |= {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    assert {"--set", "--overwrite", "--no-resume", "--tracker"} <= known
    assert not offenders(lambda text: set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - known)


def test_keys_that_a_message_names_exist():
    from lever_lm.config.schema import all_keys

    keys = set(all_keys())
    sections = {key.split(".")[0] for key in keys if "." in key}
    named = re.compile(rf"(?<![\w./-])(?:{'|'.join(sections)})\.[a-z_]+")
    files = (".json", ".jsonl", ".yaml", ".log", ".pt")
    assert not offenders(lambda text: {k for k in named.findall(text) if not k.endswith(files)} - keys)


def test_a_usage_error_says_what_was_expected():
    said = re.compile(r"--[a-z]|expected|must|one of|exceeds|takes|\w\.\w|unset|[}`]$")
    wrong = [f"{where}: {text}" for where, name, text in MESSAGES if name == "UsageError" and not said.search(text)]
    assert not wrong, "\n".join(wrong)
