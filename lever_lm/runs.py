"""Where everything is on disk, how it gets there unbroken, and what makes two runs the same run."""

import contextlib
import hashlib
import json
import os
import platform
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

import yaml

from lever_lm import __version__
from lever_lm.config import LVLM_SPEED, PACKAGE, Config, to_dict
from lever_lm.errors import LeverError

TEMPORARY_PREFIX = ".tmp-"

# ---------------------------------------------------------------------- writing


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C within the block takes effect after it. For writes: torch.save turns a KeyboardInterrupt into a
    RuntimeError of its own, and a temporary file made a moment before has nobody yet to remove it."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` whole or not at all: temporary file beside it, fsync, rename."""
    with interrupts_wait(), _replacing(Path(path)) as file:
        yield file


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
    except OSError as error:
        raise LeverError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        _remove(name)
        raise LeverError(
            f"cannot write {path}: {error.strerror or error}; what was there before is unchanged"
        ) from error
    except BaseException:
        _remove(name)
        raise


def _remove(path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, content, *, indent: int | None = 1) -> None:
    """Write a JSON file atomically. Raises ValueError on NaN: it is no JSON."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=indent, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict, header: dict[str, str]) -> None:
    """Write a safetensors file atomically, with a header of strings."""
    from safetensors.torch import save

    with atomic_file(path) as file:
        file.write(save(tensors, metadata=header))


def append_line(path: Path, line: str) -> None:
    """Append one line and wait until it is on disk."""
    try:
        with interrupts_wait(), open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise LeverError(f"cannot write {path}: {error.strerror}") from error


def file_digest(path: Path) -> str:
    """16 hex digits of a file's content."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()[:16] if hasattr(hashlib, "file_digest") else _digest(file)
        )


def _digest(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------- places


def camel(name: str) -> str:
    """rand_sampler → RandSampler."""
    return "".join(part.capitalize() for part in name.split("_"))


def lvlm_name(path: str) -> str:
    """Qwen/Qwen2.5-VL-3B-Instruct → Qwen2_5-VL-3B-Instruct."""
    return Path(path.removeprefix("asset:").rstrip("/")).name.replace(".", "_")


class Layout:
    """Paths below `results/<dataset>/` for one config. A named run has a rollout file of its own beside its folder."""

    def __init__(self, config: Config, root: Path | str = "results", run_name: str | None = None):
        self.dataset = Path(root) / config.data.name
        self.setting = f"{camel(config.sampler.name)}_{lvlm_name(config.lvlm.path)}"
        self.run_name = run_name
        self.cache = self.dataset / "cache"
        encoder = Path(config.features.encoder.removeprefix("asset:").rstrip("/")).name
        self.features = self.cache / f"features_{encoder}.safetensors"
        self.answers = self.cache / f"answers_{lvlm_name(config.lvlm.path)}.sqlite"
        suffix = f"_{run_name}" if run_name else ""
        self.rollouts = self.dataset / "generated_data" / f"rl_data_{self.setting}{suffix}.json"
        self.run = self.dataset / "model_cpk" / (run_name or f"v3_{self.setting}")
        self.inference = self.dataset / "inference" / (run_name or f"v3_{self.setting}")


def v2_name(path: Path) -> Path:
    """`grpo_epoch25.pt` → `grpo_epoch25_v2format.ckpt`, in the same folder."""
    return path.with_name(f"{path.stem.removesuffix('_v2format')}_v2format.ckpt")


def inference_folder(run_dir: Path) -> Path:
    """Where the inferences of a run folder named by path are: beside model_cpk/, else inside the folder itself."""
    parent = run_dir.resolve().parent
    return parent.parent / "inference" / run_dir.name if parent.name == "model_cpk" else run_dir / "inference"


# ---------------------------------------------------------------------- runs

# Settings that may change when a run goes on: they do not change what is already there.
_FREE = (
    ("device",),
    ("grpo", "epochs"),
    ("grpo", "patience"),
    ("infer",),
    ("features", "batch_size"),
    *(("lvlm", name) for name in LVLM_SPEED),
    ("data", "okvqa_path"),
    ("data", "coco_path"),
)


class RunFolder:
    """One run's folder: what is in it, and whether it may go on under a config."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.log = self.path / "train.log"
        self.state = self.path / "state.pt"
        self.best = self.path / "best.json"
        self.report = self.path / "report.html"

    def checkpoint(self, phase: str, epoch: int) -> Path:
        """`rce_epoch1.pt`, `grpo_epoch50.pt`; epochs count from 1."""
        return self.path / f"{phase}_epoch{epoch}.pt"

    def open(self, config: Config, *, overwrite: bool = False) -> None:
        """Make the folder a run of this config, or go on with the one in it.

        Raises LeverError naming what differs when the folder holds a run of another config; `overwrite` empties it.
        """
        if overwrite and self.path.is_dir():
            self._clear()
        self.check(config)
        self.path.mkdir(parents=True, exist_ok=True)
        for left_over in self.path.glob(f"{TEMPORARY_PREFIX}*"):
            left_over.unlink()
        write_text(self.config, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))

    def check(self, config: Config) -> None:
        """Raise LeverError when the folder holds a run of another config, naming what differs, or checkpoints of a
        training that is not ours to go on with."""
        strangers = [] if self.state.is_file() else sorted(f.name for f in self.path.glob("*_epoch*.pt"))
        if strangers:  # our own state.pt is written before any checkpoint
            raise LeverError(
                f"{self.path} holds {len(strangers)} checkpoints and no state.pt to go on from, {strangers[0]} among "
                "them. Choose another folder with --run-name NAME, or start over with --overwrite (it deletes them)"
            )
        differences = self.differences(config) if self.config.is_file() else []
        if differences:
            raise LeverError(
                f"{self.path} holds a run of another config: {'; '.join(differences[:5])}. "
                "Choose another folder with --run-name NAME, or start over with --overwrite"
            )

    def differences(self, config: Config) -> list[str]:
        """What a config would change about the run in the folder, as `key: there → here`."""
        try:
            there = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise LeverError(
                f"cannot read {self.config}: {' '.join(str(error).split())}; --overwrite starts over"
            ) from error
        there = there if isinstance(there, dict) else {}
        return _differences(_with_defaults(there, to_dict(Config())), to_dict(config), ())

    def lvlm(self) -> str | None:
        """The name of the LVLM whose answers the run learned from: from its config, else from the folder's name."""
        try:
            config = yaml.safe_load(self.config.read_text(encoding="utf-8"))
            return lvlm_name(config["lvlm"]["path"])
        except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            parts = self.path.resolve().name.split("_", 2)  # v3_RandSampler_Qwen2_5-VL-3B-Instruct
            return parts[2] if len(parts) == 3 and parts[0] == "v3" else None

    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl, one per finished epoch; [] when there is none."""
        if not self.metrics.is_file():
            return []
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines() if line.strip()]

    def _clear(self) -> None:
        own = [self.config, self.metrics, self.log, self.state, self.best, self.report, self.path / "env.json"]
        for file in [*own, *self.path.glob("rce_epoch*"), *self.path.glob("grpo_epoch*")]:
            _remove(file)


def _with_defaults(there, defaults):
    """An older config.yaml knows fewer options: the others had the effect of their defaults."""
    if not (isinstance(there, dict) and isinstance(defaults, dict)):
        return there
    return {**defaults, **{name: _with_defaults(value, defaults.get(name)) for name, value in there.items()}}


def _differences(there, here, key: tuple[str, ...]) -> list[str]:
    if key in _FREE:
        return []
    if isinstance(there, dict) and isinstance(here, dict):
        names = [*here, *(name for name in there if name not in here)]
        return [line for name in names for line in _differences(there.get(name), here.get(name), (*key, name))]
    return [] if there == here else [f"{'.'.join(key)}: {there!r} there, {here!r} here"]


# ---------------------------------------------------------------------- environment


def environment(config: Config, inputs: dict[str, str]) -> dict:
    """Versions, revision, platform and input fingerprints of a run, for env.json."""
    packages = ("torch", "transformers", "datasets", "numpy", "safetensors", "qwen-vl-utils", "pillow")
    return {
        "lever_lm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "git_revision": _git_revision(),
        "seed": config.seed,
        "inputs": inputs,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Revision of the checkout the package runs from; None when installed."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    command = ["git", "-C", str(PACKAGE.parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
