"""env.json: what a run was made with, and whether another run that was made with the same came out the same."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from lever_lm import __version__
from lever_lm.config.schema import Config
from lever_lm.training.metrics import TIMES
from lever_lm.training.run_dir import RunFolder, differing, in_words
from lever_lm.utils.atomic_io import write_json
from lever_lm.utils.errors import LeverError
from lever_lm.utils.paths import PACKAGE
from lever_lm.utils.safe_parse import FILE_LIMIT, read_object
from lever_lm.utils.terminal import shown

PACKAGES = ("torch", "transformers", "datasets", "numpy", "safetensors", "tokenizers", "qwen-vl-utils", "pillow")
_NOT_COMPARED = ("sources", "command", "last_command", "resumed_with")
_LONGEST = 10_000  # characters of a command
_NAMED = 8  # differences that are listed, of each kind


def environment(config: Config, inputs: dict[str, str], made_of: dict[str, str], sources: dict[str, str]) -> dict:
    """Return the content of env.json: versions, revision, platform, device and threads; `inputs`, the digests of what
    is trained on; `made_of`, the fingerprints of data and models these came from; `sources`, the user's own files."""
    import torch  # here and below: `lever status` has no time for it

    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    device = torch.device(config.device) if config.device not in ("auto", "cpu") else None
    cpu = f"cpu, {platform.machine()}, {os.cpu_count()} cores"
    return {
        "lever_lm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": cpu if on_cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "packages": versions(),
        "git_revision": _git_revision(),
        "seed": config.seed,
        "inputs": inputs,
        "fingerprints": made_of,
        "sources": sources,
        "command": command_line(),
    }


def command_line() -> str:
    """Return the command that this process is, as it may be typed again; empty where it is another program's."""
    name = Path(sys.argv[0]).name
    return shlex.join(["lever", *sys.argv[1:]]) if name in ("lever", "__main__.py") else ""


def typed_again(command) -> str:
    """Return what an env.json has as its `command`, as a command to be typed; empty where it is none of `lever`.
    Nothing in it is more than words to a shell, wherever the file comes from."""
    try:
        words = shlex.split(command) if isinstance(command, str) and len(command) <= _LONGEST else []
    except ValueError:  # a quotation without end
        return ""
    return shlex.join(words) if words[:1] == ["lever"] else ""


def versions() -> dict[str, str | None]:
    """Return the version of each package that results can hang on, None for one that is not installed."""
    found = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _git_revision() -> str | None:
    """Return the revision of the checkout that the package runs from, marked where files in it were changed; None when
    installed."""
    if not (PACKAGE.parent / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(PACKAGE.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    revision = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        revision = git("rev-parse", "HEAD")
        revision += " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return revision


# ---------------------------------------------------------------------- what was different


def record(run: RunFolder, here: dict, say: Callable[[str], None]) -> None:
    """Write env.json when a run begins. When it goes on elsewhere or with other versions, say so and add what it goes
    on with to `resumed_with`: the first entry stays what the run was begun with. `last_command` is the one that it
    goes on with, where that is another one."""
    there = read_environment(run)
    earlier = there.get("resumed_with")
    earlier = earlier if isinstance(earlier, list) and all(isinstance(one, dict) for one in earlier) else []
    now = dict(there) or here
    if here["command"] != now.get("last_command", now.get("command")):
        now["last_command"] = here["command"]
    if changed := differences(earlier[-1] if earlier else now, here):
        say(f"going on with another environment than before: {listed(changed)}")
        now["resumed_with"] = [*earlier, here]
    if now != there:
        write_json(run.environment, now)


def read_environment(run: RunFolder, limit: int = FILE_LIMIT) -> dict:
    """Read a run's env.json; {} where there is none that can be read, or one of more than `limit` bytes."""
    return read_object(run.environment, limit)


def recorded(run: RunFolder, section: str) -> dict:
    """Return a section of a run's env.json, as `sources` or `fingerprints`; {} where there is none."""
    found = read_environment(run).get(section)
    return found if isinstance(found, dict) else {}


def differences(there: dict, here: dict) -> list[str]:
    """Return what differs between two contents of env.json, as `key: there, here`. An entry that an older one lacks is
    not known to differ; where files lay and what was typed make no difference."""
    found = differing(there, here)
    return in_words(one for one in found if one[1] is not None and one[0][0] not in _NOT_COMPARED)


def listed(changed: list[str]) -> str:
    """Return differences on one line."""
    more = f"; and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
    return "; ".join(changed[:_NAMED]) + more


# ---------------------------------------------------------------------- a run made again


def own_files(original: RunFolder) -> dict[str, Path]:
    """Return the user's own files that a run was trained on: `rl_data`, `embeddings`. Raises LeverError naming the
    option where one is not there any more."""
    found = {}
    for name, text in recorded(original, "sources").items():
        if name in ("rl_data", "embeddings") and isinstance(text, str):
            if not os.path.isfile(text):
                option = f"--{name.replace('_', '-')} FILE"
                raise LeverError(f"{original.path} was trained on {shown(text, 200)}, which is not there: {option}")
            found[name] = Path(text)
    return found


def config_of(original: RunFolder) -> dict:
    """Return the config of a run that is to be made again, as nested values. Raises LeverError where there is none."""
    if not original.config.is_file():
        raise LeverError(f"{original.path} is no run folder: it holds no {original.config.name} (--from-run)")
    return original.values()


def compare(original: RunFolder, repeated: RunFolder, config: Config) -> dict:
    """Return what differs between a run and its repetition: `config`, `environment`, lists of differences; `epochs`
    that both have, and whether rows and weights of these are `identical`, else the `first_difference`."""
    first, epochs = _first_difference(original, repeated)
    return {
        "of": str(original.path),
        "config": original.differences(config),
        "environment": differences(read_environment(original), read_environment(repeated)),
        "epochs": epochs,
        "identical": first is None and epochs > 0,
        "first_difference": first,
    }


def _first_difference(original: RunFolder, repeated: RunFolder) -> tuple[str | None, int]:
    """Return the first epoch that came out differently, as a sentence, and how many epochs both runs have."""
    there, here = ({(row["phase"], row["epoch"]): row for row in run.rows()} for run in (original, repeated))
    common = [key for key in here if key in there]
    for phase, epoch in common:
        old, new = there[phase, epoch], here[phase, epoch]
        names = [name for name in new if name in old and name not in TIMES and old[name] != new[name]]
        found = [f"{name} is {shown(old[name])} there, {shown(new[name])} here" for name in names]
        paths = [run.checkpoint(phase, epoch) for run in (original, repeated)]
        if not found and all(path.is_file() for path in paths):
            found = [f"the weights {name} differ" for name in _other_weights(*paths)]
        if found:
            return f"{phase} epoch {epoch}: {found[0]}", len(common)
    return None, len(common)


def _other_weights(one: Path, other: Path) -> list[str]:
    """Return the tensors that differ between two checkpoints."""
    import torch

    from lever_lm.selectors.pointer.checkpoint import weights_of
    from lever_lm.utils.safe_torch_load import load_torch

    there, here = (weights_of(load_torch(path), path) for path in (one, other))
    same = {name for name in there.keys() & here.keys() if torch.equal(there[name], here[name])}
    return sorted((there.keys() | here.keys()) - same)


def verdict(result: dict) -> list[str]:
    """Return what `compare` found as lines for the terminal."""
    lines = [f"{kind}: {listed(result[kind])}" for kind in ("config", "environment") if result[kind]]
    if result["identical"]:
        outcome = f"all metrics and weights of {result['epochs']} epochs are identical"
    else:
        outcome = result["first_difference"] or "the two runs have no epoch in common"
    return [*(f"differs from {result['of']}: {line}" for line in lines), f"repeated {result['of']}: {outcome}"]
