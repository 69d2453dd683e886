"""The one place that says which checkpoint is meant, where its config is, and whether it fits the features."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from lever_lm.config.schema import Config, keys_of
from lever_lm.config.values import with_measured_pool
from lever_lm.data.embeddings import encoder_fingerprint, same_encoder
from lever_lm.selectors.pointer.checkpoint import own_config, policy_of, read_checkpoint
from lever_lm.selectors.pointer.hub_format import is_exported, policy_folder, setting_of
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.environment import recorded
from lever_lm.training.metrics import RECOMMENDED, STRATEGIES, recommended_by
from lever_lm.training.run_dir import Layout, RunFolder, v2_name
from lever_lm.training.select_checkpoint import best_row, broken, read_best, read_history
from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import one_line, shown

VARIABLE = "LEVER_LM_CHECKPOINT_PATH"


def find_checkpoint(run: RunFolder, wanted: str | None, environ: dict) -> tuple[Path, str]:
    """Return which checkpoint to use, and why: `wanted` (a path, a hub id, best or latest), then
    LEVER_LM_CHECKPOINT_PATH, then the run's best.json, then the best by val_reward where it was logged, else by
    val_loss. Raises LeverError where there is none."""
    if wanted and wanted not in ("best", "latest"):
        if _is_run(wanted):
            path, why = find_checkpoint(RunFolder(wanted), None, {})
            return path, f"{why}, of the run named by --ckpt"
        if wanted.startswith((".", "~")) and not os.path.exists(wanted):  # a path, and no hub id
            raise LeverError(f"no checkpoint {wanted} (from --ckpt): check the path, or train first (`lever train`)")
        return _existing(Path(wanted), "--ckpt"), "named by --ckpt"
    if not wanted and (named := environ.get(VARIABLE, "").strip()):
        return _existing(Path(named), VARIABLE), f"named by {VARIABLE}"
    if wanted == "latest":
        return run.latest_checkpoint(), "the latest of the run"
    gone = ""
    if run.best.is_file():
        path, why = _chosen(run)
        if path.is_file():
            return path, why
        gone = f"; {run.best.name} names {one_line(path.name)}, which is gone: `lever best-ckpt` chooses again"
    history = read_history(run, None)
    strategy = recommended_by(history.rows) if any(RECOMMENDED in row for row in history.rows) else "val_loss"
    row = best_row(history.rows, STRATEGIES[strategy])
    if row is None:
        raise LeverError(f"no epoch of {run.path} has a finite {strategy}; name one: --ckpt PATH")
    path = run.checkpoint(history.phase, row["epoch"])
    return _existing(path if path.is_file() else v2_name(path), run.path), f"best by {strategy}{gone}"


def _chosen(run: RunFolder) -> tuple[Path, str]:
    """Return the checkpoint that best.json names, there or not, and what is to be said of the choice."""
    answer = read_best(run)
    path = run.path / Path(answer["checkpoint"]).name  # the folder may have been moved since
    path = next((file for file in (path, v2_name(path)) if file.is_file()), path)
    rows = [row for row in run.rows() if row["phase"] == answer.get("phase")] if path.is_file() else []
    chosen_among, now = answer.get("rows"), len(rows)
    more = ""
    if isinstance(chosen_among, int) and chosen_among < now:
        more = f", chosen when {chosen_among} of {now} epochs were there: `lever best-ckpt` again"
    if any(broken(row) for row in rows if row["epoch"] == answer.get("epoch")):
        more = ", an epoch that broke: `lever best-ckpt` again"
    return path, f"best.json of the run, strategy {answer['strategy']}{more}"


def find_or_newest(run: RunFolder, layout: Layout, wanted: str | None) -> tuple[Path, str]:
    """Return which checkpoint the options name, as `find_checkpoint` does, and why. Where they name none and their run
    has none: the checkpoint of the dataset's newest run. Raises LeverError where there is none.

    run: the run that the options name; layout: the paths that they give.
    """
    named = wanted not in (None, "best", "latest") or (not wanted and os.environ.get(VARIABLE, "").strip())
    if named or layout.run_name or _last_saved(run):
        return find_checkpoint(run, wanted, {} if layout.run_name else dict(os.environ))
    newest = max(map(RunFolder, layout.run.parent.glob("*/")), key=_last_saved, default=run)
    if _last_saved(newest):
        path, why = find_checkpoint(newest, wanted, {})
        return path, f"{why}, in the newest run: {run.path.name} has no checkpoint"
    raise LeverError(
        f"no checkpoint in {run.path}, nor in another run beside it: `lever demo` trains one in a minute or two on the "
        "embedded data, `lever train` one with these options; or name one: --ckpt PATH"
    )


def _last_saved(run: RunFolder) -> float:
    """Return when the latest checkpoint of a run was written; 0 where there is none."""
    with contextlib.suppress(LeverError, OSError):
        return run.latest_checkpoint().stat().st_mtime
    return 0.0


def _is_run(path: str | Path) -> bool:
    return os.path.isdir(path) and not is_exported(Path(path))


def _existing(path: Path, named_by) -> Path:
    if path.is_file() or policy_folder(path) is not None:
        return path
    unconverted = path.with_name(path.name.removesuffix("_v2format.ckpt") + ".pt")
    mend = "check the path, or train first (`lever train`)"
    if path.name.endswith("_v2format.ckpt") and unconverted.is_file():
        mend = f"convert it first: `lever convert {unconverted}`"
    raise LeverError(f"no checkpoint {path} (from {named_by}): {mend}")


# ---------------------------------------------------------------------- the checkpoint with its config


def locate(checkpoint: str | Path) -> tuple[Path, str, dict]:
    """Return the checkpoint of a run folder (as `lever infer` takes it), a file, an exported folder or a hub id; why
    this one; and the nested config values that lie with it, {} where there are none. Raises LeverError where there is
    no checkpoint."""
    path = Path(checkpoint)
    if _is_run(path):
        run = RunFolder(path)
        return *find_checkpoint(run, None, {}), values_of(run)
    if os.path.isfile(path):
        return path, "as named", values_of(RunFolder(path.parent))
    if policy_folder(path) is None:
        raise LeverError(f"no checkpoint {path}: expected a run folder, a checkpoint, an exported folder or OWNER/NAME")
    content = read_checkpoint(path)
    setting = setting_of(with_measured_pool(content["setting"]))
    return path, "as named", {**setting, "seed": own_config(content).get("seed", 0)}


def values_of(run: RunFolder) -> dict:
    """Return the nested config values that a run is used under: its own, without those of a single command. {} where it
    has no config, or learned from features of the user's own, of which its config says nothing."""
    if not run.config.is_file() or "embeddings" in recorded(run, "sources"):
        return {}
    return _without(run.values(), keys_of("command"))


def _without(values: dict, keys: Iterable[tuple[str, ...]], above: tuple[str, ...] = ()) -> dict:
    """Return nested values without some keys, and without sections that hold no other."""
    left = {
        name: _without(value, keys, (*above, name)) if isinstance(value, dict) else value
        for name, value in values.items()
        if (*above, name) not in keys
    }
    return {name: value for name, value in left.items() if value != {}}


def load_for(path: Path, config: Config, say: Callable[[str], None] = warnings.warn) -> PointerSelector:
    """Return the policy of a checkpoint. Raises LeverError where it was made for other features than those of this
    config. A policy that was trained on features from a file gets a warning: the file does not say whose they are."""
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
    here, there = list(config.policy.candidate_features), own.get("candidate_features", [])
    if there != here:
        raise LeverError(
            f"{path} was trained with policy.candidate_features={shown(there, 200)} and would be given {here}: "
            "pass the same as in training (--set policy.candidate_features=[…])"
        )
    if not isinstance(policy, PointerSelector) and isinstance(split := own.get("train_split"), str):
        policy.split = split
    if (embeddings := own.get("embeddings")) is not None:
        say(
            f"warning: {path} was trained on features of your own, {shown(str(embeddings), 200)}, and is given those "
            f"of {config.features.encoder}: unless these are the same, its choices mean nothing"
        )
    return policy
