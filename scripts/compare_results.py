"""Compare two results folders number by number: what a refactor must not change.

    cd /tmp/before && lever demo --seed 0 --json > demo.json      # with the commit before
    cd /tmp/after && lever demo --seed 0 --json > demo.json       # with the one after
    python scripts/compare_results.py /tmp/before /tmp/after

JSON, JSON lines, YAML and SQLite answers are compared by value, tensors to the bit. Times, dates, versions, paths of
the machine and the hashes of source files differ between any two runs and are left out. The exit status is 1 where
anything else differs.
"""

import argparse
import json
import re
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from lever_lm.utils.safe_torch_load import load_torch

# Keys of values that belong to the moment, the machine or the code of a run.
MOMENT = re.compile(r"(_time|seconds|_s|date|when|started|ended|host|pid|command|versions|git|packages|source|folder)$")
SKIPPED = {".html", ".log", ".err", ".png", ".lock", ""}


def leaves(tree, place: str = "") -> Iterator[tuple[str, object]]:
    """Yield (place, value) of every number, string and tensor of nested dicts and lists."""
    if isinstance(tree, dict):
        for key in tree:
            if not MOMENT.search(str(key)):
                yield from leaves(tree[key], f"{place}.{key}")
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from leaves(value, f"{place}[{i}]")
    else:
        yield place, tree


def content(path: Path):
    """Return what a file holds as nested dicts and lists, or None where it is not compared."""
    if path.name == "digests.json":  # by absolute path and time of change
        return None
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".yaml":
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".ckpt"):
        return load_torch(path)
    if path.suffix == ".sqlite":
        with sqlite3.connect(path) as db:
            rows = db.execute("SELECT * FROM answers WHERE key NOT LIKE 'speed:%' ORDER BY key").fetchall()
        return {row[0]: row[1:] for row in rows}
    return None if path.suffix in SKIPPED else path.read_bytes()


def equal(one, other) -> bool:
    """Return whether two leaves are the same to the bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and (one == other or (one != one and other != other))


def main() -> int:
    """Print what differs; return 1 where anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--most", type=int, default=5, help="differences printed for each file")
    options = parser.parse_args()
    files = [
        {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
        for root in (options.before, options.after)
    ]
    print(f"{len(files[0] & files[1])} files in both")
    different = 0
    for path in sorted(files[0] ^ files[1]):
        different += 1
        print(f"only in {options.before if path in files[0] else options.after}: {path}")
    for path in sorted(files[0] & files[1]):
        before, after = (dict(leaves(content(root / path))) for root in (options.before, options.after))
        found = [place for place in before.keys() | after.keys() if not equal(before.get(place), after.get(place))]
        different += bool(found)
        print(f"{path}: {len(before)} values, {len(found)} differ")
        for place in sorted(found)[: options.most]:
            print(f"  {place}: {before.get(place)!s:.80} | {after.get(place)!s:.80}")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
