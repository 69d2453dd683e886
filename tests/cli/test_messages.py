"""The messages of errors, read from the sources: the options and config keys that they name are there."""

import ast
import re
from pathlib import Path

import lever_lm

ROOT = Path(lever_lm.__file__).parent
ERRORS = {"LeverError", "UsageError", "_fail"}


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


def test_flags_that_a_message_names_exist():
    import typer.main

    from lever_lm.cli.commands import app

    assert len(MESSAGES) > 150
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
