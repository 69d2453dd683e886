"""How long each selector of features alone takes to choose, and in how much memory, at the size of OK-VQA.

    python scripts/bench_selectors.py [--train 9009] [--queries 5046] [--size 768] [--shots 4] [--only NAME …]

Random unit features; each selector in a process of its own, whose peak memory is printed beside that of one which only
makes the features. One JSON object a line.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NAMES = ("random", "text_sim", "img_sim", "img_text_sim", "muier", "mmices", "mmices_image", "mmr", "dpp")
ALONE = "features"  # makes them and chooses nothing


def problem(train: int, queries: int, size: int):
    """A problem of random features: each query has an image of its own, and is kept from one training example."""
    import torch

    from lever_lm.data.embeddings import Embeddings
    from lever_lm.data.example import Example
    from lever_lm.selectors.problem import Problem
    from lever_lm.tasks import TASKS

    generator = torch.Generator().manual_seed(0)

    def unit(count: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(count, size, generator=generator), dim=-1)

    def example(number: int, image: int) -> Example:
        made = Example(number, image, "?", ("a",), ("a",), f"{number}.jpg")
        made.__dict__["content"] = f"content {number}"  # no file is read
        return made

    asked = [example(train + i, i % train) for i in range(queries)]
    examples = [example(i, i) for i in range(train)]
    embeddings = Embeddings(unit(queries), unit(queries)), Embeddings(unit(train), unit(train))
    both = frozenset({"img", "text"})
    features = embeddings[0].combine(both), embeddings[1].combine(both)
    return Problem(asked, examples, embeddings, features, [[0]] * queries, 0, TASKS["vqa"])


def measure(name: str, options: argparse.Namespace) -> dict:
    """Choose in this process."""
    from lever_lm.selectors import select

    asked = problem(options.train, options.queries, options.size)
    began = time.perf_counter()
    picks = [] if name == ALONE else select(name, asked, options.shots)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB, on Linux
    return {"selector": name, "seconds": round(seconds, 1), "peak_gib": round(peak, 2), "queries": len(picks)}


def main() -> None:
    """Measure each selector in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("train", 9009), ("queries", 5046), ("size", 768), ("shots", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="+", choices=(ALONE, *NAMES))
    parser.add_argument("--here", choices=(ALONE, *NAMES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.here, options)))
        return
    for name in options.only or (ALONE, *NAMES):
        sizes = [f"--{key}={getattr(options, key)}" for key in ("train", "queries", "size", "shots")]
        subprocess.run([sys.executable, __file__, *sizes, "--here", name], check=True)


if __name__ == "__main__":
    main()
