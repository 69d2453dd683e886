"""Measure the time and memory in which a dataset of OK-VQA's size loads, from the official files and from parquet.

    python scripts/bench_data.py [--train 9009] [--val 5046] [--image-kb 60]

Makes 9,009 + 5,046 questions with an image of their own each, then loads each layout in a process of its own: first
time, again with the caches of `datasets` warm. Needs about three times the images' size on the disk, and removes it.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LOAD = """
import re, sys, threading, time
from lever_lm.config.schema import DataConfig
from lever_lm.data import load_dataset
import datasets, PIL.Image  # the libraries' own memory is not the data's

def anonymous():  # MB; pages of mapped files are not among it: the system takes those back when it needs them
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1000

def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], anonymous())

before = anonymous()
peak, done = [before], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
data = load_dataset(DataConfig("bench", sys.argv[1], sys.argv[1]))
seconds = time.perf_counter() - start
done.set()
watcher.join()
sizes = f"{peak[0] - before:.0f} {anonymous() - before:.0f}"
print(len(data.train_examples), len(data.val_examples), f"{seconds:.1f}", sizes)
"""


def picture(kilobytes: int) -> bytes:
    """Return a JPEG of about this size."""
    import numpy as np
    from PIL import Image

    side, content = 64, b""
    while len(content) < kilobytes * 1024:
        side, file = side + 32, io.BytesIO()
        noise = np.random.default_rng(side).integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file, "JPEG", quality=80)
        content = file.getvalue()
    return content


def make(root: Path, counts: dict[str, int], content: bytes) -> None:
    """Write official files and parquet shards of the same questions; images differ in bytes after the picture's end."""
    import datasets

    text = datasets.Value("string")
    columns = {"question_id": text, "image": datasets.Image(), "question": text, "answers": datasets.List(text)}
    for split, count in counts.items():
        images = root / "official" / f"{split}2014"
        images.mkdir(parents=True)
        answers = [
            {"answer": "cat", "raw_answer": "cats", "answer_confidence": "yes", "answer_id": i} for i in range(10)
        ]
        ids = [{"question_id": 10 * i + 5, "image_id": i} for i in range(count)]
        questions = [{**row, "question": f"What is in picture {row['image_id']}?"} for row in ids]
        annotations = [{**row, "answers": answers} for row in ids]
        for name, key, rows in (
            ("OpenEnded_mscoco_{}2014_questions.json", "questions", questions),
            ("mscoco_{}2014_annotations.json", "annotations", annotations),
        ):
            (root / "official" / name.format(split)).write_text(json.dumps({key: rows}))
        for i in range(count):
            (images / f"COCO_{split}2014_{i:012d}.jpg").write_bytes(content + f"{split}{i}".encode())
        (root / "parquet").mkdir(exist_ok=True)
        for shard, start in enumerate(range(0, count, 500)):
            rows = questions[start : start + 500]
            table = {
                "question_id": [str(row["question_id"]) for row in rows],
                "image": [{"bytes": content + f"{split}{r['image_id']}".encode(), "path": None} for r in rows],
                "question": [row["question"] for row in rows],
                "answers": [["cat"] * 10 for _ in rows],
            }
            part = datasets.Dataset.from_dict(table, features=datasets.Features(columns))
            part.to_parquet(str(root / "parquet" / f"{split}-{shard:05d}.parquet"))


def main() -> None:
    """Make, load, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=9009)
    parser.add_argument("--val", type=int, default=5046)
    parser.add_argument("--image-kb", type=int, default=60)
    arguments = parser.parse_args()
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        root, content = Path(folder), picture(arguments.image_kb)
        make(root, {"train": arguments.train, "val": arguments.val}, content)
        megabytes = (arguments.train + arguments.val) * len(content) / 1e6
        print(f"{arguments.train} + {arguments.val} questions, {megabytes:,.0f} MB of images")
        environment = {**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
        for layout, when in (("official", "first"), ("official", "again"), ("parquet", "first"), ("parquet", "again")):
            command = [sys.executable, "-c", LOAD, str(root / layout)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            train, val, seconds, peak, kept = done.stdout.split()
            print(f"{layout:>8}, {when}: {train} + {val} in {seconds} s, {peak} MB at most, {kept} MB kept")


if __name__ == "__main__":
    main()
