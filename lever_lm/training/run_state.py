"""The state of a training run: what an epoch leaves behind, and how a killed run goes on where it was.

`state.pt` is written first and holds everything of the epoch it ends with, its row and its weights included; the
checkpoint, metrics.jsonl and train.log are then made from it. What a kill left out is written on resume.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from lever_lm.selectors.pointer.checkpoint import save_torch, v3_content
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.finite_checks import At, not_finite
from lever_lm.training.metrics import PHASES, metrics_on, table_header, table_row
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.tensorboard import TensorBoard
from lever_lm.utils.atomic_io import append_line, remove, write_text
from lever_lm.utils.errors import LeverError
from lever_lm.utils.progress import BETWEEN_LINES, Track, Work, untracked
from lever_lm.utils.safe_torch_load import load_torch
from lever_lm.utils.terminal import shown

# ---------------------------------------------------------------------- state.pt

_FIELDS = ("phase", "epoch", "policy", "optimizer", "rng", "extra", "rows", "inputs")
_EXTRA = {"old", "reference", "beta", "online"}  # of GRPO
# An online round in `extra`: dimensions and kind of its tensors.
_ONLINE = {"sequences": (3, torch.int64), "rewards": (2, torch.float32), "mask": (2, torch.bool)}


def state_of(run: RunFolder, inputs: dict[str, str], policy: PointerSelector | None = None) -> dict:
    """Read a run's state.pt. Raises LeverError where it is no state of this run, the run was begun with other `inputs`
    than these, or its weights are not those of a policy of this shape."""
    state = load_torch(run.state)
    _refuse(run, _problem_of(state))
    there = state["inputs"]
    changed = [name for name, value in inputs.items() if not isinstance(there, dict) or there.get(name) != value]
    if changed:
        raise LeverError(
            f"the {' and '.join(changed)} of the run in {run.path} have changed since it was begun; "
            "choose another folder with --run-name NAME, or start over with --overwrite"
        )
    _refuse(run, _misfit(state, policy) if policy is not None else None)
    return state


def _refuse(run: RunFolder, problem: str | None) -> None:
    """Raise LeverError where there is a problem with the state."""
    if problem:
        raise LeverError(f"{run.state} is no state of this run ({problem}): --overwrite starts over")


def _problem_of(state: dict) -> str | None:
    """Return what keeps a file's content from being the state of any run: the file may come from anywhere."""
    if missing := [name for name in _FIELDS if name not in state]:
        return f"no {missing[0]}"
    rows, rng = state["rows"], state["rng"]
    if not isinstance(rows, list) or not rows:
        return "no rows"
    if bad := [number for number, row in enumerate(rows, 1) if not _is_row(row)]:
        return f"row {bad[0]} is none of an epoch"
    if (state["phase"], state["epoch"]) != (rows[-1]["phase"], rows[-1]["epoch"]):
        return "its last row is of another epoch"
    sound = isinstance(rng, dict) and "cpu" in rng and all(_has_form(value, 1, torch.uint8) for value in rng.values())
    if not sound or len(rng["cpu"]) != len(torch.get_rng_state()):
        return "rng is no random state"
    return _problem_of_extra(state["extra"], state["phase"])


def _is_row(row) -> bool:
    if not isinstance(row, dict) or row.get("phase") not in PHASES or type(row.get("epoch")) is not int:
        return False
    warnings, plain = row.get("warnings", {}), (int, float, str, bool, type(None))
    texts = isinstance(warnings, dict) and all(isinstance(text, str) for pair in warnings.items() for text in pair)
    values = all(isinstance(name, str) and type(value) in plain for name, value in row.items() if name != "warnings")
    return texts and values and not_finite(row) is None


def _problem_of_extra(extra, phase: str) -> str | None:
    needed = _EXTRA - {"online"} if phase == "grpo" else set()
    if not isinstance(extra, dict) or not needed <= extra.keys() <= _EXTRA:
        return "extra is none of GRPO"
    beta, online = extra.get("beta", 0.0), extra.get("online")
    if not isinstance(beta, (int, float)) or not math.isfinite(beta):
        return f"beta is {shown(beta)}"
    if online is None:
        return None
    sound = isinstance(online, dict) and online.keys() == _ONLINE.keys()
    sound = sound and all(_has_form(online[name], *form) for name, form in _ONLINE.items())
    sound = sound and len({tuple(tensor.shape[:2]) for tensor in online.values()}) == 1
    return None if sound and not_finite(online) is None else "online holds no rollouts"


def _has_form(value, dimensions: int, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and (value.ndim, value.dtype) == (dimensions, dtype)


def _misfit(state: dict, policy: PointerSelector, optimizer: torch.optim.Optimizer | None = None) -> str | None:
    """Return what keeps a sound state from being that of this policy and, where it is given, this optimizer."""
    snapshots = {name: state["extra"][name] for name in ("old", "reference") if name in state["extra"]}
    for name, weights in {"policy": state["policy"], **snapshots}.items():
        if not _is_like(weights, policy.state_dict()):
            return f"{name} holds no finite weights, or those of another policy"
    if optimizer is None:
        return None
    there, here = state["optimizer"], optimizer.state_dict()
    known = there.get("state") if isinstance(there, dict) else None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    here["state"] = {
        place: {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        for place, parameter in enumerate(parameters)
        if isinstance(known, dict) and place in known
    }
    return None if _is_like(there, here) else "optimizer has other options, or holds another policy's state"


def _is_like(there, here) -> bool:
    """Return whether a value is built as another one is: keys, kinds, equal integers, and for tensors shape and dtype;
    and whether all its numbers are finite."""
    if isinstance(here, Tensor):
        same = isinstance(there, Tensor) and (there.shape, there.dtype) == (here.shape, here.dtype)
        return same and bool(there.isfinite().all())
    if isinstance(here, dict):
        same = isinstance(there, dict) and there.keys() == here.keys()
        return same and all(_is_like(there[key], here[key]) for key in here)
    if type(there) is not type(here):
        return False
    if isinstance(here, (list, tuple)):
        return len(there) == len(here) and all(map(_is_like, there, here))
    return math.isfinite(there) if isinstance(here, float) else there == here


# ---------------------------------------------------------------------- recording


class Journal:
    """Records the epochs of one run.

    config: what its checkpoints carry. inputs: fingerprints of its data, which a resumed run must find unchanged. keep:
    rows so far → the checkpoints to keep; all without it. say: is told every epoch; detail: what a verbose command
    shows; track: shows how far a phase is; tracker: is told every row.
    """

    def __init__(
        self,
        run: RunFolder,
        config: dict,
        inputs: dict[str, str],
        say: Callable[[str], None],
        keep: Callable[[list[dict]], set[Path]] | None = None,
        *,
        detail: Callable[[str], None] | None = None,
        track: Track = untracked,
        tracker: TensorBoard | None = None,
    ):
        self.run, self.config, self.inputs, self.say, self.keep = run, config, inputs, say, keep
        self.detail, self._track, self.tracker = detail or say, track, tracker
        self.rows: list[dict] = []
        self.state: dict | None = None
        self._heading: str | None = None  # the phase whose table this process has opened on the screen
        self._warned: set[str] = set()
        self._note: str | None = None

    def resume(self) -> None:
        """Load the state of an earlier process, if there is one, and bring the files beside it up to date."""
        if self.run.state.is_file():
            self.state = state_of(self.run, self.inputs)
            self.rows = self.state["rows"]
            self._publish_checkpoint()
            last = self.rows[-1]
            self.say(f"going on after {last['phase']} epoch {last['epoch']} in {self.run.path}")
        # Rows of metrics.jsonl and train.log that a kill cut short or left out are written again, from the state.
        write_text(self.run.metrics, "".join(json.dumps(row) + "\n" for row in self.rows))
        lines: list[str] = []
        for place, row in enumerate(self.rows):
            lines += self._heading_of(place) + ([str(row["note"])] if "note" in row else []) + self._lines(row)
        write_text(self.run.log, "".join(line + "\n" for line in lines))
        if self.tracker is not None:
            self.tracker.begin(self.rows)
        self._prune()

    def _heading_of(self, place: int) -> list[str]:
        """Return the heading of the table that the row at a place opens; [] where it opens none."""
        phase = self.rows[place]["phase"]
        return table_header(phase) if place == 0 or self.rows[place - 1]["phase"] != phase else []

    def _lines(self, row: dict) -> list[str]:
        """Return the row of an epoch and its warnings, each kind the first time it comes in the run."""
        new = {kind: text for kind, text in row.get("warnings", {}).items() if kind not in self._warned}
        self._warned |= new.keys()
        return [table_row(row), *(f"warning: {row['phase']} epoch {row['epoch']}: {text}" for text in new.values())]

    def done(self, phase: str) -> int:
        """Return the number of epochs of a phase that are finished."""
        return sum(row["phase"] == phase for row in self.rows)

    def epochs(self, phase: str, last: int) -> Iterable[int]:
        """Yield the numbers of a phase's epochs that are left up to `last`, under a progress bar with the metrics."""
        done = self.done(phase)
        left = Work(range(done + 1, last + 1), "epochs", done=done, now=self._latest, after=BETWEEN_LINES)
        return self._track(left, phase.upper(), last) if done < last else ()

    def _latest(self) -> str:
        """Return the last epoch in a few numbers."""
        row = self.rows[-1] if self.rows else {}
        known = [name for name in metrics_on("progress") if isinstance(row.get(name), (int, float))]
        return ", ".join(f"{name} {row[name]:.4f}" for name in known)

    def restore(self, phase: str, policy: PointerSelector, optimizer: torch.optim.Optimizer) -> dict | None:
        """Put weights, optimizer and random state where the last epoch of `phase` left them. Returns the phase's
        extra state, None where the phase has not begun."""
        if self.state is None:
            return None
        goes_on = self.state["phase"] == phase
        _refuse(self.run, _misfit(self.state, policy, optimizer if goes_on else None))
        policy.load_state_dict(self.state["policy"])
        _set_rng(self.state["rng"])
        if not goes_on:
            return None
        optimizer.load_state_dict(self.state["optimizer"])
        return self.state["extra"]

    def note(self, text: str) -> None:
        """Say what is different from the next epoch on; train.log has it before that epoch, whose row keeps it."""
        self._note = text
        self.say(text)
        append_line(self.run.log, text)

    def commit(self, row: dict, policy: PointerSelector, optimizer: torch.optim.Optimizer, extra: dict) -> None:
        """Record a finished epoch: state, then checkpoint, then the metrics and log lines. Raises LeverError when a
        metric, weight or moment is not finite, before anything is written."""
        if self._note is not None:
            row["note"], self._note = self._note, None
        at = At(row["phase"], row["epoch"])
        if name := not_finite(row):
            raise at.stop(f"{name} is {row.get(name, 'not finite')}")
        tensors = {"weight": policy.state_dict(), "optimizer": optimizer.state_dict()["state"], "extra": extra}
        if name := not_finite(tensors):
            raise at.stop(f"{name} is not finite, after its last step")
        self.rows.append(row)
        self.state = {
            "phase": row["phase"],
            "epoch": row["epoch"],
            "policy": {name: tensor.detach().cpu() for name, tensor in policy.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "rng": _get_rng(),
            "extra": extra,
            "rows": self.rows,
            "inputs": self.inputs,
        }
        save_torch(self.run.state, self.state)
        self._publish_checkpoint(policy)
        append_line(self.run.metrics, json.dumps(row))
        again = [kind for kind in row.get("warnings", {}) if kind in self._warned]
        lines = self._lines(row)
        for line in self._heading_of(len(self.rows) - 1) + lines:
            append_line(self.run.log, line)
        if self.tracker is not None:
            self.tracker.add(row)
        for line in (table_header(row["phase"]) if self._heading != row["phase"] else []) + lines:
            self.say(line)
        self._heading = row["phase"]
        for kind in again:
            self.detail(f"       warning, again: {row['warnings'][kind]}")
        self._prune()

    def _prune(self) -> None:
        """Delete the checkpoints that are not worth keeping. What was converted from them stays."""
        if self.keep is not None:
            kept = self.keep(self.rows)
            for path in {self.run.checkpoint(row["phase"], row["epoch"]) for row in self.rows} - kept:
                remove(path)

    def _publish_checkpoint(self, policy: PointerSelector | None = None) -> None:
        """Write the checkpoint of the last epoch unless it is there."""
        row = self.rows[-1]
        path = self.run.checkpoint(row["phase"], row["epoch"])
        if path.exists():
            return
        if policy is None:
            policy = PointerSelector(**self.config["policy"])
            _refuse(self.run, _misfit(self.state, policy))
            policy.load_state_dict(self.state["policy"])
        metrics = {name: value for name, value in row.items() if name not in ("phase", "epoch")}
        place = {"epoch": row["epoch"] - 1, "phase": row["phase"]}
        save_torch(path, v3_content(policy, **place, kl_beta=row.get("beta", 0.0), metrics=metrics, config=self.config))


def _get_rng() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
