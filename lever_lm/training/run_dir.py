"""The places of files on disk, and what makes two runs the same run."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import yaml

from lever_lm.config.schema import Config, keys_of, to_dict
from lever_lm.config.values import typed, with_measured_pool
from lever_lm.training.metrics import PHASES
from lever_lm.training.metrics_file import metrics_rows
from lever_lm.utils.atomic_io import remove, sweep, write_text
from lever_lm.utils.errors import LeverError
from lever_lm.utils.locks import alone
from lever_lm.utils.safe_parse import CONFIG_LIMIT, load_yaml, read_bytes
from lever_lm.utils.terminal import shown

_CHECKPOINT = re.compile(rf"({'|'.join(PHASES)})_epoch(\d{{1,9}})(?:\.pt|_v2format\.ckpt)")
LOCK = ".lock"  # in a folder that one process at a time works in

# ---------------------------------------------------------------------- places


def camel(name: str) -> str:
    """Return a name in camel case: rand_sampler → RandSampler."""
    return "".join(part.capitalize() for part in name.split("_"))


def lvlm_name(path: str) -> str:
    """Return the name of an LVLM in file names: Qwen/Qwen2.5-VL-3B-Instruct → Qwen2_5-VL-3B-Instruct."""
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
        self.exported = self.cache / "query_embeddings.pt"  # where Lever-Plus puts the features of the training split
        self.answers = self.cache / f"answers_{lvlm_name(config.lvlm.path)}.sqlite"
        suffix = f"_{run_name}" if run_name else ""
        self.rollouts = self.dataset / "generated_data" / f"rl_data_{self.setting}{suffix}.json"
        self.run = self.dataset / "model_cpk" / (run_name or f"v3_{self.setting}")
        self.inference = self.dataset / "inference" / (run_name or f"v3_{self.setting}")


def v2_name(path: Path) -> Path:
    """Return the v2 file of a checkpoint: `grpo_epoch25.pt` → `grpo_epoch25_v2format.ckpt`, in the same folder."""
    return path.with_name(f"{path.stem.removesuffix('_v2format')}_v2format.ckpt")


def inference_folder(run_dir: Path) -> Path:
    """Return where the inferences of a run folder named by path are: beside model_cpk/, else inside the folder."""
    parent = run_dir.resolve().parent
    return parent.parent / "inference" / run_dir.name if parent.name == "model_cpk" else run_dir / "inference"


# ---------------------------------------------------------------------- runs

# Settings that may change when a run goes on: they do not change what is already there.
_FREE = {*keys_of("command", "length", "speed", "place")} - {("data", "train_path")}


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
        self.environment = self.path / "env.json"
        self.events = self.path / "tensorboard"

    def checkpoint(self, phase: str, epoch: int) -> Path:
        """Return the path of a checkpoint: `rce_epoch1.pt`, `grpo_epoch50.pt`; epochs count from 1."""
        return self.path / f"{phase}_epoch{epoch}.pt"

    def checkpoints(self) -> dict[tuple[str, int], Path]:
        """Return (phase, epoch) → checkpoint, the file in the v2 format where there is no other."""
        found: dict[tuple[str, int], Path] = {}
        for path in sorted(self.path.glob("*_epoch*")):  # `.pt` comes before `_v2format.ckpt`
            if match := _CHECKPOINT.fullmatch(path.name):
                found.setdefault((match[1], int(match[2])), path)
        return found

    def latest_checkpoint(self) -> Path:
        """Return the checkpoint of the last epoch of the last phase. Raises LeverError when there is none."""
        found = self.checkpoints()
        if not found:
            raise LeverError(f"no checkpoint in {self.path}: train first (`lever train`), or name one with --ckpt PATH")
        return found[max(found, key=lambda key: (PHASES.index(key[0]), key[1]))]

    @contextlib.contextmanager
    def alone(self, say: Callable[[str], None]) -> Iterator[None]:
        """Keep the folder to this process. Raises LeverError with pid and host of the process that has it. A folder
        that nothing was written to is removed afterwards."""
        new = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            with alone(self.path / LOCK, str(self.path), "choose another folder with --run-name NAME") as left_by:
                if left_by:
                    say(f"{self.path}: process {left_by['pid']} on {left_by['host']} ended in the midst of it")
                yield
        finally:
            with contextlib.suppress(OSError):  # not empty
                for folder in new:
                    folder.rmdir()

    def open(self, config: Config, *, overwrite: bool = False) -> None:
        """Make the folder a run of this config, or go on with the one in it.

        Raises LeverError naming what differs when the folder holds a run of another config; `overwrite` empties it.
        """
        if overwrite and self.path.is_dir():
            self._clear()
        self.check(config)
        self.path.mkdir(parents=True, exist_ok=True)
        sweep(self.path)
        write_text(self.config, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))

    def check(self, config: Config) -> None:
        """Raise LeverError when the folder holds a run of another config, naming what differs, or checkpoints without a
        state to go on from."""
        foreign = [] if self.state.is_file() else sorted(f.name for f in self.path.glob("*_epoch*.pt"))
        if foreign:  # our own state.pt is written before any checkpoint
            raise LeverError(
                f"{self.path} holds {len(foreign)} checkpoints and no state.pt to go on from, {foreign[0]} among "
                "them. Choose another folder with --run-name NAME, or start over with --overwrite (it deletes them)"
            )
        differences = self.differences(config) if self.config.is_file() else []
        if differences:
            raise LeverError(
                f"{self.path} holds a run of another config: {'; '.join(differences[:5])}. "
                "Choose another folder with --run-name NAME, or start over with --overwrite"
            )

    def differences(self, config: Config) -> list[str]:
        """Return what a config would change about the run in the folder, as `key: there, here`."""
        found = differing(self.settings(), to_dict(config))
        return in_words(one for one in found if not any(one[0][: len(free)] == free for free in _FREE))

    def settings(self) -> dict:
        """Return the nested values of the run's config.yaml, with the defaults of options that it does not know."""
        return _with_defaults(self.values(), to_dict(Config()))

    def values(self) -> dict:
        """Read the nested values of the run's config.yaml, with its pools. Raises LeverError where it cannot be
        read."""
        try:
            there = typed(load_yaml(read_bytes(self.config, CONFIG_LIMIT)))
        except (OSError, ValueError) as error:
            raise LeverError(f"cannot read {self.config}: {error}; --overwrite starts over") from error
        return with_measured_pool(there) if isinstance(there, dict) else {}

    def lvlm(self) -> str | None:
        """Return the name of the LVLM whose answers the run learned from: by its config, else by the folder's name."""
        try:
            config = load_yaml(read_bytes(self.config, CONFIG_LIMIT))
            return lvlm_name(config["lvlm"]["path"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            parts = self.path.resolve().name.split("_", 2)  # v3_RandSampler_Qwen2_5-VL-3B-Instruct
            return parts[2] if len(parts) == 3 and parts[0] == "v3" else None

    def rows(self) -> list[dict]:
        """Read the rows of metrics.jsonl, one per finished epoch, without a last one that was cut short; [] when there
        is no such file. Raises LeverError naming the line that is no row."""
        return metrics_rows(self.metrics)[0] if self.metrics.is_file() else []

    def _clear(self) -> None:
        own = [self.config, self.metrics, self.log, self.state, self.best, self.report, self.environment]
        for file in [*own, *self.path.glob("rce_epoch*"), *self.path.glob("grpo_epoch*"), *self.event_files()]:
            remove(file)
        with contextlib.suppress(OSError):  # none there, or not empty
            self.events.rmdir()

    def event_files(self) -> list[Path]:
        """Return the files that a tracker wrote for TensorBoard; other files of that folder are not among them."""
        return sorted(self.events.glob("events.out.tfevents.*.lever"))


def _with_defaults(there, defaults):
    """Return nested values completed by defaults: an option that an older config.yaml does not know had its default."""
    if not (isinstance(there, dict) and isinstance(defaults, dict)):
        return there
    return {**defaults, **{name: _with_defaults(value, defaults.get(name)) for name, value in there.items()}}


def differing(there, here, key: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object, object]]:
    """Return where two nested values differ: (key, the value there, the value here), None for one that is missing."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = [*here, *(name for name in there if name not in here)]
        return [found for name in names for found in differing(there.get(name), here.get(name), (*key, _key(name)))]
    return [] if there == here else [(key, there, here)]


def in_words(found: Iterable[tuple[tuple[str, ...], object, object]]) -> list[str]:
    """Return what `differing` found, as `key: there, here`."""
    return [f"{'.'.join(key)}: {shown(there)} there, {shown(here)} here" for key, there, here in found]


def _key(name) -> str:
    """Return a key of a config, fit for a message."""
    plain = isinstance(name, str) and name.replace("-", "_").isidentifier() and len(name) < 100
    return name if plain else shown(name)
