"""Check that the tests notice faults: change one line of lever_lm at a time, and run the tests that should fail.

    python scripts/mutate.py [--only ID …] [--all-tests] [--timeout 600] [--json FILE]

tests/data/faults.yaml holds the faults: `old`, a piece of source that stands once in lever_lm, wherever that is; `new`,
what stands there instead; `what` then goes wrong; `tests`, the stems of the test files that should catch it. All of it
happens in a copy of the checkout, in a temporary folder, whose tests must pass before a fault is put in. A fault is
caught where a test fails or runs out of time. Leaves with 1 where a fault survives, or where `old` is not found once.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("lever_lm", "configs", "tests", "scripts", "docs", "pyproject.toml", "README.md")
FAULTS = Path("tests", "data", "faults.yaml")
KEYS = ["id", "old", "new", "what", "tests"]
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", re.MULTILINE)


def read_faults(root: Path) -> list[dict]:
    """Return the faults of a checkout. Raises ValueError where one is not what the docstring of this file says."""
    faults = yaml.safe_load((root / FAULTS).read_text(encoding="utf-8"))
    for fault in faults:
        if list(fault) != KEYS or "\n" in fault["old"] + fault["new"] or fault["old"] == fault["new"]:
            raise ValueError(f"no fault of one line with {', '.join(KEYS)}: {fault}")
    if len({fault["id"] for fault in faults}) < len(faults):
        raise ValueError("two faults have one id")
    return faults


def places(root: Path, faults: list[dict]) -> tuple[dict[str, Path], list[str]]:
    """Return fault's id → the file that it is put into; and what is wrong where there is no such file, or a test is
    gone."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted((root / "lever_lm").rglob("*.py"))}
    found, wrong = {}, []
    for fault in faults:
        there = [path for path, text in sources.items() for _ in range(text.count(fault["old"]))]
        if len(there) != 1:
            where = ", ".join(str(path.relative_to(root)) for path in there) or "nowhere"
            wrong.append(f"{fault['id']}: found {len(there)} times, expected once ({where}): {fault['old']}")
        else:
            found[fault["id"]] = there[0]
        gone = [stem for stem in fault["tests"] if len(list((root / "tests").rglob(f"{stem}.py"))) != 1]
        wrong += [f"{fault['id']}: tests has not one file {stem}.py" for stem in gone]
    return found, wrong


def test_files(root: Path, stems: list[str]) -> list[str]:
    """Return the test files of these stems, wherever they lie below tests."""
    return [str(next((root / "tests").rglob(f"{stem}.py")).relative_to(root)) for stem in stems]


def run_tests(root: Path, files: list[str], timeout: float | None) -> tuple[str | None, float, str]:
    """Run tests up to the first failure: which it is, `timeout`, or None where all pass; seconds; what was printed.
    Raises RuntimeError where pytest did not run them."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--basetemp", str(root / "basetemp")]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what the tests have started ends with them
    ) as process:
        try:
            said, _ = process.communicate(timeout=timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return "timeout", time.monotonic() - began, ""
    took, failed = time.monotonic() - began, _FAILED.search(said)
    if process.returncode not in (0, 1, 2) or (process.returncode and not failed):
        raise RuntimeError(f"pytest left with {process.returncode}:\n{said}")
    return failed[1] if process.returncode else None, took, said


def put(path: Path, text: str) -> None:
    """Write a source file. Python knows its compiled form by size and second, which two faults may share."""
    path.write_text(text, encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ID", help="these faults")
    parser.add_argument("--all-tests", action="store_true", help="all tests, not those that a fault names")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the tests of a fault (%(default)g)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what became of each fault")
    args = parser.parse_args()
    faults = read_faults(ROOT)
    if unknown := set(args.only or ()) - {fault["id"] for fault in faults}:
        parser.error(f"no fault {', '.join(sorted(unknown))}")
    faults = [fault for fault in faults if not args.only or fault["id"] in args.only]
    _, wrong = places(ROOT, faults)
    if wrong:
        print("\n".join(wrong))
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what cleans up
    outcomes, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        root = Path(folder)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, root / name)
        where, _ = places(root, faults)
        named = ["tests"] if args.all_tests else None
        union = dict.fromkeys(stem for fault in faults for stem in fault["tests"])
        failed, took, said = run_tests(root, named or test_files(root, list(union)), None)
        if failed:
            print(f"{said}\n{failed} fails without a fault")
            return 1
        print(f"unchanged: {'all' if named else len(union)} test files pass in {took:.0f} s", flush=True)
        for fault in faults:
            path = where[fault["id"]]
            text = path.read_text(encoding="utf-8")
            put(path, text.replace(fault["old"], fault["new"]))
            by, took, _ = run_tests(root, named or test_files(root, fault["tests"]), args.timeout)
            put(path, text)
            outcomes.append({**fault, "file": str(path.relative_to(root)), "caught_by": by, "seconds": round(took, 1)})
            said = f"caught by {by}" if by else f"SURVIVED ({fault['what']})"
            print(f"{fault['id']}: {said} in {took:.0f} s", flush=True)
    survived = [outcome["id"] for outcome in outcomes if outcome["caught_by"] is None]
    print(f"{len(outcomes) - len(survived)} of {len(outcomes)} caught, {len(survived)} survived: {', '.join(survived)}")
    print(f"{time.monotonic() - began:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps(outcomes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
