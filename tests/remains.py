"""What a command left in a folder, and whether it is what it should be: whole, the same, nothing twice or over."""

import contextlib
import json
import shutil
import sqlite3
import tempfile
from collections import Counter
from pathlib import Path

TIMES = ("epoch_time", "step_time")
TIMED = ("digests.json",)  # files that hold when the inputs were written, and whether that was long enough ago


def content(path: Path):
    """What a file holds, as something that compares; raises where it is not whole. Times are left out."""
    import torch

    if path.suffix in (".pt", ".ckpt"):
        return _plain(torch.load(path, weights_only=True))
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return file.metadata(), {name: _plain(file.get_tensor(name)) for name in sorted(file.keys())}
    if path.suffix == ".sqlite":
        return _answers(path)
    if path.suffix == ".jsonl":
        return [_plain(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    return path.read_bytes()


def _plain(value):
    """Tensors as dtype, shape and bytes, dicts without their times, in their order."""
    if hasattr(value, "numpy"):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return [(name, _plain(inner)) for name, inner in value.items() if name not in TIMES]
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _answers(path: Path) -> list:
    """The answers of a cache, of a copy: to open it would mend what a kill left."""
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("", "-journal"):
            if (original := path.with_name(f"{path.name}{suffix}")).exists():
                shutil.copyfile(original, Path(folder) / f"copy{suffix}")
        with contextlib.closing(sqlite3.connect(Path(folder) / "copy")) as db:
            if (found := db.execute("PRAGMA integrity_check").fetchone()) != ("ok",):
                raise ValueError(found)
            if not db.execute("SELECT name FROM sqlite_master").fetchall():
                return []
            rows = db.execute("SELECT key, value FROM answers ORDER BY key").fetchall()
            return [row for row in rows if not row[0].startswith("speed:")]


def files(folder: Path) -> dict[str, Path]:
    """Every file below a folder by its relative path."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def left_overs(folder: Path) -> list[str]:
    """Temporary files, locks, journals and rank files: nothing of them may stay when a command has finished."""
    signs = (".tmp-", "-journal", "-wal", "-shm", ".rank", ".lock")
    return [name for name in files(folder) if any(sign in name.rsplit("/", 1)[-1] for sign in signs)]


def broken(folder: Path) -> list[str]:
    """Files that are not whole. A temporary file may be anything; of a file that grows by lines the last may be cut."""
    found = []
    for name, path in files(folder).items():
        if path.name.startswith(".tmp-") or name in left_overs(folder):
            continue
        try:
            if path.name == "metrics.jsonl":
                for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                    if line.endswith("\n"):
                        json.loads(line)
            else:
                content(path)
        except Exception as error:  # whatever a reader makes of half a file
            found.append(f"{name}: {type(error).__name__}: {error}")
    return found


def doubled(folder: Path) -> list[str]:
    """Epochs that stand twice in metrics.jsonl, and rows that do in train.log."""
    found = []
    for name, path in files(folder).items():
        if path.name == "metrics.jsonl":
            times = Counter((row["phase"], row["epoch"]) for row in map(json.loads, path.read_text().splitlines()))
        elif path.name == "train.log":
            times = Counter(line for line in path.read_text().splitlines() if not line.startswith("-"))
        else:
            continue
        found += [f"{name}: {row}" for row, n in times.items() if n > 1]
    return found


def differences(reference: Path, folder: Path) -> list[str]:
    """Files of which two folders do not hold the same, times and left-overs excepted. Image features are one set: how
    they lie in files depends on where a kill fell."""
    ours, theirs = _by_name(folder), _by_name(reference)
    missing = [f"missing: {name}" for name in theirs.keys() - ours.keys()]
    surplus = [f"surplus: {name}" for name in ours.keys() - theirs.keys()]
    return [*missing, *surplus, *(f"differs: {name}" for name in ours.keys() & theirs if ours[name] != theirs[name])]


def _by_name(folder: Path) -> dict:
    found, images, over = {}, {}, left_overs(folder)
    for name, path in files(folder).items():
        if name in over or path.name in TIMED:
            continue
        if "/vision_" in name and path.suffix == ".safetensors":
            images |= content(path)[1]
        else:
            found[name] = content(path)
    return found | ({"images": images} if images else {})


def asked_again(log: Path) -> tuple[int, int]:
    """How many prompts were asked more than once: in all, and beyond the two batches that are under way in each process
    that was killed, one being asked and one stored."""
    if not log.exists():
        return 0, 0
    lines = [line.split() for line in log.read_text().splitlines()]
    last = {process: int(batch) for process, batch, _ in lines}
    latest = list(last)[-1] if last else None
    times = Counter(key for _, _, key in lines)
    kept = Counter(key for process, batch, key in lines if process == latest or int(batch) < last[process] - 1)
    return sum(n - 1 for n in times.values()), sum(n - 1 for n in kept.values() if n > 1)
