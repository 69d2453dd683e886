"""Which checkpoint of a run is meant, and whether it fits the features it is to be used with."""

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

from lever_lm.config.schema import Config
from lever_lm.data.embeddings import encoder_fingerprint, same_encoder
from lever_lm.selectors.pointer.checkpoint import own_config, policy_of, read_checkpoint
from lever_lm.selectors.pointer.hub_format import is_exported, policy_folder
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.metrics import RECOMMENDED, STRATEGIES
from lever_lm.training.run_dir import RunFolder, v2_name
from lever_lm.training.select_checkpoint import best_row, broken, read_best, read_history
from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import one_line, shown


def find_checkpoint(run: RunFolder, wanted: str | None, environ: dict) -> tuple[Path, str]:
    """Which checkpoint to infer with, and why: `wanted` (a path, a hub id, best or latest), then
    LEVER_LM_CHECKPOINT_PATH, then the run's best.json, then the best by val_reward where it was logged, else by
    val_loss."""
    from_environment = environ.get("LEVER_LM_CHECKPOINT_PATH", "").strip()
    if wanted and wanted not in ("best", "latest"):
        if os.path.isdir(wanted) and not is_exported(Path(wanted)):
            path, why = find_checkpoint(RunFolder(wanted), None, {})
            return path, f"{why}, of the run named by --ckpt"
        if wanted.startswith((".", "~")) and not os.path.exists(wanted):  # a path, and no hub id
            raise LeverError(f"no checkpoint {wanted} (from --ckpt): check the path, or train first (`lever train`)")
        return _existing(Path(wanted), "--ckpt"), "named by --ckpt"
    if not wanted and from_environment:
        return _existing(Path(from_environment), "LEVER_LM_CHECKPOINT_PATH"), "named by LEVER_LM_CHECKPOINT_PATH"
    if wanted == "latest":
        return latest_checkpoint(run), "the latest of the run"
    gone = ""
    if run.best.is_file():
        answer = read_best(run)
        path = run.path / Path(answer["checkpoint"]).name  # the folder may have been moved since
        path = next((file for file in (path, v2_name(path)) if file.is_file()), path)
        if path.is_file():
            rows = [row for row in run.rows() if row["phase"] == answer.get("phase")]
            chosen_among, now = answer.get("rows"), len(rows)
            stale = isinstance(chosen_among, int) and chosen_among < now
            more = f", chosen when {chosen_among} of {now} epochs were there: `lever best-ckpt` again" if stale else ""
            if any(broken(row) for row in rows if row["epoch"] == answer.get("epoch")):
                more = ", an epoch that broke: `lever best-ckpt` again"
            return path, f"best.json of the run, strategy {answer['strategy']}{more}"
        gone = f"; {run.best.name} names {one_line(path.name)}, which is gone: `lever best-ckpt` chooses again"
    history = read_history(run, None)
    strategy = RECOMMENDED if any(RECOMMENDED in row for row in history.rows) else "val_loss"
    row = best_row(history.rows, STRATEGIES[strategy])
    if row is None:
        raise LeverError(f"no epoch of {run.path} has a finite {strategy}; name one: --ckpt PATH")
    path = run.checkpoint(history.phase, row["epoch"])
    return _existing(path if path.is_file() else v2_name(path), run.path), f"best by {strategy}{gone}"


def latest_checkpoint(run: RunFolder) -> Path:
    """The last epoch of the last phase in a run folder, its v2 file where there is no other. Raises LeverError when
    there is none."""
    for phase in ("grpo", "rce"):
        names = {
            match[0]: (int(match[1]), not match[2])
            for path in run.path.glob(f"{phase}_epoch*")
            if (match := re.fullmatch(rf"{phase}_epoch(\d+)(?:\.pt|(_v2format)\.ckpt)", path.name))
        }
        if names:
            return run.path / max(names, key=names.__getitem__)
    raise LeverError(f"no checkpoint in {run.path}: train first (`lever train`), or name one with --ckpt PATH")


def _existing(path: Path, named_by) -> Path:
    if path.is_file() or policy_folder(path) is not None:
        return path
    unconverted = path.with_name(path.name.removesuffix("_v2format.ckpt") + ".pt")
    mend = "check the path, or train first (`lever train`)"
    if path.name.endswith("_v2format.ckpt") and unconverted.is_file():
        mend = f"convert it first: `lever convert {unconverted}`"
    raise LeverError(f"no checkpoint {path} (from {named_by}): {mend}")


def load_for(path: Path, config: Config, say: Callable[[str], None] = warnings.warn) -> PointerSelector:
    """The policy of a checkpoint, if it was made for the features of this config. Raises LeverError otherwise; of
    features from a file nobody can tell whose they are, and that is said."""
    content = read_checkpoint(path)
    policy, own = policy_of(content, path, config.policy.num_heads), own_config(content)
    made_for = {
        "encoder": (encoder_fingerprint(config.features.encoder), same_encoder),
        "features": (config.features.name, str.__eq__),
    }
    for key, (here, same) in made_for.items():
        there = own.get(key)
        if there is not None and not same(str(there), here):
            raise LeverError(
                f"{path} was trained on the {key} {shown(str(there), 200)} and would be given {here!r}: pass the same "
                "--features and --dataset (features.encoder) as in training"
            )
    if (embeddings := own.get("embeddings")) is not None:
        say(
            f"warning: {path} was trained on features of your own, {shown(str(embeddings), 200)}, and is given those "
            f"of {config.features.encoder}: unless these are the same, its choices mean nothing"
        )
    return policy
