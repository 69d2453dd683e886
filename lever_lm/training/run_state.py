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

from lever_lm.selectors.pointer.checkpoint import new_of_shape, save_torch, v3_content
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.finite_checks import At, not_finite
from lever_lm.training.metrics import PHASES, metrics_on, table_header, table_of, table_row
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.tensorboard import TensorBoard
from lever_lm.utils.atomic_io import append_line, remove, write_text
from lever_lm.utils.errors import LeverError
from lever_lm.utils.progress import BETWEEN_LINES, Track, Work, untracked
from lever_lm.utils.safe_torch_load import load_torch

# ---------------------------------------------------------------------- state.pt


def state_of(run: RunFolder, inputs: dict[str, str], policy: PointerSelector | None = None) -> dict:
    """Read a run's state.pt. Raises LeverError where it is no state of a run, the run was begun with other `inputs`
    than these, or, where a policy is given, its weights are not those of one of this shape."""
    state = load_torch(run.state)
    there = state.get("inputs")
    known = {name: value for name, value in there.items() if isinstance(value, str)} if isinstance(there, dict) else {}
    # A run that was begun on answers alone (warmup=match) may be given rollouts later, for GRPO.
    late = {"rollouts"} - known.keys() if known else set()
    changed = [name for name, value in inputs.items() if known.get(name) != value and name not in late]
    if changed:
        raise LeverError(
            f"the {' and '.join(changed)} of the run in {run.path} have changed since it was begun; "
            "choose another folder with --run-name NAME, or start over with --overwrite"
        )
    if policy is not None:
        _check(run, state, _form(state, policy))
    return state


def _check(run: RunFolder, state: dict, form: dict) -> None:
    """Raise LeverError naming the first part of a state that is not of its form: the file may come from anywhere."""
    for name, part in form.items():
        if not _is_like(state.get(name), part):
            raise LeverError(
                f"{run.state} is no state of this run: its {name} is missing, not finite, or that of another policy; "
                "--overwrite starts over"
            )


def _form(state: dict, policy: PointerSelector) -> dict:
    """Return the form (see `_is_like`) of the state of a run of this policy, but for the optimizer."""
    weights = policy.state_dict()
    of_grpo = {"old": weights, "reference": weights, "beta": _is_number, "online": _is_round}
    return {
        "phase": lambda phase: isinstance(phase, str) and phase in PHASES,
        "rows": lambda rows: isinstance(rows, list) and bool(rows) and all(map(_is_row, rows)),
        "epoch": lambda epoch: isinstance(epoch, int) and _key(state) == _key(state["rows"][-1]),
        "policy": weights,
        "rng": _is_rng,
        "extra": of_grpo if state.get("phase") == "grpo" else {},
    }


def _form_of_optimizer(state, optimizer: torch.optim.Optimizer) -> dict:
    """Return the form of this optimizer's state, which knows the parameters that `state`, the one to check, knows."""
    known = state.get("state") if isinstance(state, dict) else None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        place: {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        for place, parameter in enumerate(parameters)
        if isinstance(known, dict) and place in known
    }
    return {**optimizer.state_dict(), "state": moments}


def _is_like(there, form) -> bool:
    """Return whether a value is finite and built as its form is: a tensor of its shape and dtype; a dict or list of its
    keys or length, and their forms; what a function says; else a value of its type, and, but for floats, its equal."""
    if isinstance(form, Tensor):
        same = isinstance(there, Tensor) and (there.shape, there.dtype) == (form.shape, form.dtype)
        return same and bool(there.isfinite().all())
    if isinstance(form, dict):
        same = isinstance(there, dict) and there.keys() == form.keys()
        return same and all(_is_like(there[key], form[key]) for key in form)
    if callable(form):
        return form(there)
    if type(there) is not type(form):
        return False
    if isinstance(form, (list, tuple)):
        return len(there) == len(form) and all(map(_is_like, there, form))
    return math.isfinite(there) if isinstance(form, float) else there == form


def _key(row: dict) -> tuple:
    return row["phase"], row["epoch"]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_row(row) -> bool:
    if not isinstance(row, dict) or row.get("phase") not in PHASES or type(row.get("epoch")) is not int:
        return False
    warnings, plain = row.get("warnings", {}), (int, float, str, bool, type(None))
    texts = isinstance(warnings, dict) and all(isinstance(text, str) for pair in warnings.items() for text in pair)
    values = all(isinstance(name, str) and type(value) in plain for name, value in row.items() if name != "warnings")
    return texts and values and not_finite(row) is None


def _is_rng(rng) -> bool:
    here = _get_rng()
    return (
        isinstance(rng, dict) and "cpu" in rng and all(_is_like(rng[name], here.get(name, rng[name])) for name in rng)
    )


def _is_round(online) -> bool:
    """Return whether a value is a round of online rollouts, or None."""
    if not isinstance(online, dict) or not all(isinstance(value, Tensor) for value in online.values()):
        return online is None
    forms = {name: (value.ndim, value.dtype, value.shape[:2]) for name, value in online.items()}
    size = next((form[2] for form in forms.values()), None)
    kinds = {"sequences": (3, torch.int64, size), "rewards": (2, torch.float32, size), "mask": (2, torch.bool, size)}
    return forms == kinds and not_finite(online) is None


# ---------------------------------------------------------------------- recording


class Journal:
    """Records the epochs of one run.

    config: what its checkpoints carry; of_phase: what those of a phase carry in its place. inputs: fingerprints of its
    data, which a resumed run must find unchanged. keep: rows so far → the checkpoints to keep; all without it. say: is
    told every epoch; track: shows how far a phase is; tracker: is told every row.
    """

    def __init__(
        self,
        run: RunFolder,
        config: dict,
        inputs: dict[str, str],
        say: Callable[[str], None],
        keep: Callable[[list[dict]], set[Path]] | None = None,
        *,
        track: Track = untracked,
        tracker: TensorBoard | None = None,
        of_phase: dict[str, dict] | None = None,
    ):
        self.run, self.config, self.inputs, self.say, self.keep = run, config, inputs, say, keep
        self.of_phase = of_phase or {}
        self._track, self.tracker = track, tracker
        self.rows: list[dict] = []
        self.state: dict | None = None
        self._heading: tuple[str, str] | None = None  # the table that this process has opened on the screen
        self._warned: set[str] = set()

    def resume(self) -> None:
        """Load the state of an earlier process, if there is one, and bring the files beside it up to date."""
        if self.run.state.is_file():
            policy = new_of_shape(self.config["policy"])
            self.state = state_of(self.run, self.inputs, policy)
            self.rows = self.state["rows"]
            policy.load_state_dict(self.state["policy"])
            self._publish_checkpoint(policy)
            last = self.rows[-1]
            self.say(f"going on after {last['phase']} epoch {last['epoch']} in {self.run.path}")
        # Rows of metrics.jsonl and train.log that a kill cut short or left out are written again, from the state.
        write_text(self.run.metrics, "".join(json.dumps(row) + "\n" for row in self.rows))
        lines = [line for place in range(len(self.rows)) for part in self._lines(place) for line in part]
        write_text(self.run.log, "".join(line + "\n" for line in lines))
        if self.tracker is not None:
            self.tracker.begin(self.rows)
        self._prune()

    def _lines(self, place: int) -> tuple[list[str], list[str]]:
        """Return what the log says of a row: the heading of the table that it opens; then the row and its warnings,
        each kind the first time it comes in the run."""
        row = self.rows[place]
        phase = row["phase"]
        new = {kind: text for kind, text in row.get("warnings", {}).items() if kind not in self._warned}
        self._warned |= new.keys()
        opens = place == 0 or table_of(self.rows[place - 1]) != table_of(row)
        lines = [table_row(row), *(f"warning: {phase} epoch {row['epoch']}: {text}" for text in new.values())]
        return table_header(*table_of(row)) if opens else [], lines

    def done(self, phase: str) -> int:
        """Return the number of epochs of a phase that are finished."""
        return sum(row["phase"] == phase for row in self.rows)

    def epochs(self, phase: str, last: int, name: str = "") -> Iterable[int]:
        """Yield the numbers of a phase's epochs that are left up to `last`, under a progress bar with the metrics;
        name: what the bar calls the phase."""
        done = self.done(phase)
        left = Work(range(done + 1, last + 1), "epochs", done=done, now=self._latest, after=BETWEEN_LINES)
        return self._track(left, (name or phase).upper(), last) if done < last else ()

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
        form = {"optimizer": _form_of_optimizer(self.state.get("optimizer"), optimizer)} if goes_on else {}
        _check(self.run, self.state, {"policy": policy.state_dict(), **form})
        policy.load_state_dict(self.state["policy"])
        _set_rng(self.state["rng"])
        if not goes_on:
            return None
        optimizer.load_state_dict(self.state["optimizer"])
        return self.state["extra"]

    def commit(self, row: dict, policy: PointerSelector, optimizer: torch.optim.Optimizer, extra: dict) -> None:
        """Record a finished epoch: state, then checkpoint, then the metrics and log lines. Raises LeverError when a
        metric, weight or moment is not finite, before anything is written."""
        at = At(row["phase"], row["epoch"], warmup=table_of(row)[1])
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
        heading, lines = self._lines(len(self.rows) - 1)
        append_line(self.run.log, "\n".join([*heading, *lines]))
        if self.tracker is not None:
            self.tracker.add(row)
        table = table_of(row)
        for line in (table_header(*table) if self._heading != table else []) + lines:
            self.say(line)
        self._heading = table
        self._prune()

    def _prune(self) -> None:
        """Delete the checkpoints that are not worth keeping. What was converted from them stays."""
        if self.keep is not None:
            kept = self.keep(self.rows)
            for path in {self.run.checkpoint(row["phase"], row["epoch"]) for row in self.rows} - kept:
                remove(path)

    def _publish_checkpoint(self, policy: PointerSelector) -> None:
        """Write the checkpoint of the last epoch unless it is there."""
        row = self.rows[-1]
        path = self.run.checkpoint(row["phase"], row["epoch"])
        if path.exists():
            return
        metrics = {name: value for name, value in row.items() if name not in ("phase", "epoch")}
        place = {"epoch": row["epoch"] - 1, "phase": row["phase"]}
        config = {**self.config, **self.of_phase.get(row["phase"], {})}
        save_torch(path, v3_content(policy, **place, kl_beta=row.get("beta", 0.0), metrics=metrics, config=config))


def _get_rng() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
