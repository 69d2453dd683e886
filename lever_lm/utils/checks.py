"""Checks before the work: each names a thing that a command needs, what was found, and what mends it."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import is_hub_id, lacking, model_folder, weight_files

GIB = 1 << 30
_OWN_RESULTS = "--results DIR of your own (and --ckpt RUN_DIR for a run that is here)"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. status: ok, missing, or warning; `fetched`: missing here, but a command that may
    use the network gets it itself."""

    what: str
    status: str
    found: str
    mend: str = ""
    fetched: bool = False

    def line(self) -> str:
        """Return the check as a line for the terminal."""
        return f"{self.status:>7}  {self.what}: {self.found}{f' → {self.mend}' if self.mend else ''}"


def require(checks: Iterable[Check]) -> None:
    """Raise LeverError with the whole list of what is missing and cannot be fetched by the command itself."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    missing = [check for check in checks if check.status == "missing" and (offline or not check.fetched)]
    lines = [f"{check.what}: {check.found} → {check.mend}" for check in missing]
    if lines:
        raise LeverError("\n  ".join(lines if len(lines) == 1 else [f"{len(lines)} things are missing:", *lines]))


def check_file(what: str, path: Path, mend: str) -> Check:
    """Check that a file is there and can be read."""
    if not os.path.isfile(path):
        return Check(what, "missing", f"{path} is {'a folder' if os.path.isdir(path) else 'not there'}", mend)
    if not os.access(path, os.R_OK):
        return Check(what, "missing", f"{path} may not be read", f"chmod u+r {path}")
    return Check(what, "ok", str(path))


def check_model(option: str, path: str) -> Check:
    """Check that a model's directory or hub id has its config, all weights and the files of its processor here."""
    folder = model_folder(path)
    missing = lacking(folder) if folder else []
    if folder and not missing:
        size = sum(file.stat().st_size for file in weight_files(folder))
        return Check(option, "ok", f"{path}, {size / GIB:.2f} GiB")
    lacks, other = f"{path} lacks {', '.join(missing)}", f"--set {option}=DIR or OWNER/NAME"
    if is_hub_id(path):
        found = f"{lacks} in the hub's cache" if missing else f"{path} is not in the hub's cache"
        return Check(option, "missing", found, f"hf download {path}, or --set {option}=DIR", fetched=True)
    if missing:
        return Check(option, "missing", lacks, f"fetch these files again, or {other}")
    return Check(option, "missing", f"{path} is no directory and no hub id OWNER/NAME", other)


def check_results(path: Path) -> Check:
    """Check that the results folder can be written to."""
    there = nearest_existing(path)
    if not there.is_dir():
        return Check("results", "missing", f"{there} is not a folder", "--results DIR")
    if not os.access(there, os.W_OK | os.X_OK):
        return Check("results", "missing", f"{there} may not be written to", f"chmod u+w {there}, or {_OWN_RESULTS}")
    return Check("results", "ok", str(path))


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if os.path.exists(path) or path.parent == path else nearest_existing(path.parent)
