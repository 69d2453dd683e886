"""Measure how `lever rollout` scales with the processes of a torchrun job on this host, and whether it repeats itself:
the digits, 1 process twice and N.

    python scripts/bench_sharding.py                      # the shipped model; N: the GPUs of this host, else 2 on a CPU
    python scripts/bench_sharding.py --model 3b --limit 100
    python scripts/bench_sharding.py --model DIR -- --set lvlm.num_beams=3     # the rest goes to `lever rollout`

`3b` is the 3B shape with random weights, made by bench_lvlm.py; digits are small images, which are shown to it as large
as photographs (lvlm.min_pixels=307200). Each run has a results folder of its own with the CLIP features in it and no
answers. Answering is timed by the command itself: from when every process has its model to when the last one has asked
its share. The rest is start-up. Prints a table in Markdown and whether each rollout file has the bytes of the first
one; exits with 1 where one has not. `--json FILE` keeps the numbers.
"""

import argparse
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TINY = "asset:tiny-qwen2.5-vl"


def run(folder: Path, processes: int, options: list[str]) -> dict:
    """Run one `lever rollout` in a folder and return: processes, prompts, prompts/s while answering, seconds in all."""
    job = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *job, "-m", "lever_lm", "rollout", "--json", *options]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    (cache,) = folder.rglob("answers_*.sqlite")
    with sqlite3.connect(cache) as db:
        (prompts,) = db.execute("SELECT count(*) FROM answers WHERE key NOT LIKE 'speed:%'").fetchone()
        (speed,) = db.execute("SELECT value FROM answers WHERE key LIKE 'speed:%'").fetchone()  # of one process
    rate = processes * float(speed)
    return {
        "processes": processes,
        "prompts": prompts,
        "prompts_per_second": rate,
        "seconds": seconds,
        "startup": seconds - prompts / rate,
        "file": Path(folder, json.loads(done.stdout)["path"]).read_bytes(),
    }


def with_features(folder: Path, source: Path) -> Path:
    """Return a folder with the features of another, and nothing else."""
    for features in source.rglob("features_*.safetensors"):
        there = folder / features.relative_to(source)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(features, there)
    return folder


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=200, help="queries; about 15 prompts each")
    parser.add_argument("--processes", type=int, nargs="+", help="default: 1, 1 and the number of GPUs, or 1, 1 and 2")
    parser.add_argument("--model", default=TINY, help="a directory, an asset, or 3b")
    parser.add_argument("--json", type=Path, help="keep the numbers here")
    parser.add_argument("options", nargs="*", help="more options of `lever rollout`, after --")
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    counts = arguments.processes or [1, 1, gpus if gpus > 1 else 2]
    with tempfile.TemporaryDirectory() as root:
        model, large = arguments.model, []
        if model == "3b":
            from bench_lvlm import build_shape

            model = str(Path(root, "3b"))
            build_shape(Path(model), torch.device("cuda" if gpus else "cpu"), "qwen2.5-3b")
            torch.cuda.empty_cache()  # the GPU is the runs'
            large = ["--set", "lvlm.min_pixels=307200"]
        options = ["--set", f"lvlm.path={model}", *large, *arguments.options]
        warm = Path(root, "warm")
        warm.mkdir()
        run(warm, 1, ["--limit", "2", *options])  # features, and everything read from disk once
        rows = []
        for number, processes in enumerate(counts):
            folder = with_features(Path(root, str(number)), warm)
            rows.append(run(folder, processes, ["--limit", str(arguments.limit), *options]))
    files = [row.pop("file") for row in rows]
    for row, file in zip(rows, files, strict=True):
        row["equal"] = file == files[0]
    equal = all(row["equal"] for row in rows)
    where = f"{gpus} × {torch.cuda.get_device_name(0)}" if gpus else f"{os.cpu_count()} cores"
    print(f"{arguments.model}, {rows[0]['prompts']} prompts, {where}\n")
    print("| processes | prompts/s | scaling | seconds in all | of them start-up | rollout file |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        row["scaling"] = row["prompts_per_second"] / rows[0]["prompts_per_second"]
        print(
            f"| {row['processes']} | {row['prompts_per_second']:.1f} | ×{row['scaling']:.2f} | {row['seconds']:.1f} "
            f"| {row['startup']:.1f} | {'equal' if row['equal'] else 'DIFFERENT'}, {len(files[0]):,} bytes |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"where": where, "equal": equal, "runs": rows}, indent=1))
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
