"""The memory of a training run: what an epoch leaves behind, and how a killed run goes on where it was.

`state.pt` is written first and holds everything of the epoch it ends with, its row and its weights included; the
checkpoint, metrics.jsonl and train.log are then made from it. Whatever a kill left out is made up for on resume.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from lever_lm.selectors.pointer.checkpoint import save_torch, v3_content
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.finite_checks import At, not_finite
from lever_lm.training.metrics import metrics_on, table_header, table_row
from lever_lm.training.resume_state import misfit, problem_of
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.tensorboard import TensorBoard
from lever_lm.utils.atomic_io import append_line, remove, write_text
from lever_lm.utils.errors import LeverError
from lever_lm.utils.progress import BETWEEN_LINES, Track, Work, untracked
from lever_lm.utils.safe_torch_load import load_torch


def state_of(run: RunFolder, inputs: dict[str, str], policy: PointerSelector | None = None) -> dict:
    """The content of a run's state.pt. Raises LeverError where it is none of this run, the run was begun with other
    `inputs` than these, or its weights are not those of a policy of this shape."""
    state = load_torch(run.state)
    _refuse(run, problem_of(state))
    there = state.get("inputs")
    changed = [name for name, value in inputs.items() if not isinstance(there, dict) or there.get(name) != value]
    if changed:
        raise LeverError(
            f"the {' and '.join(changed)} of the run in {run.path} have changed since it was begun; "
            "choose another folder with --run-name NAME, or start over with --overwrite"
        )
    _refuse(run, misfit(state, policy) if policy is not None else None)
    return state


def _refuse(run: RunFolder, problem: str | None) -> None:
    """Raise LeverError where there is a problem with the state."""
    if problem:
        raise LeverError(f"{run.state} is no state of this run ({problem}): --overwrite starts over")


# Rows so far → the checkpoints that are not to be deleted.
Keep = Callable[[list[dict]], set[Path]]


class Journal:
    """Records epochs of one run. `config` is what its checkpoints carry; `inputs` are the fingerprints of its data,
    which a resumed run must find unchanged; `keep` names the checkpoints to keep, all without it. `say` is told what
    everybody should know, `detail` what some like to, `track` shows how far a phase is; `tracker` is told every row."""

    def __init__(
        self,
        run: RunFolder,
        config: dict,
        inputs: dict[str, str],
        say: Callable[[str], None],
        keep: Keep | None = None,
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
        lines = []
        for i, row in enumerate(self.rows):
            lines += [
                *(table_header(row["phase"]) if self._opens_phase(i) else []),
                *([str(row["note"])] if "note" in row else []),
                table_row(row),
                *self._warnings(row),
            ]
        write_text(self.run.log, "".join(line + "\n" for line in lines))
        if self.tracker is not None:
            self.tracker.begin(self.rows)
        self._prune()

    def _opens_phase(self, i: int) -> bool:
        return i == 0 or self.rows[i]["phase"] != self.rows[i - 1]["phase"]

    def done(self, phase: str) -> int:
        """Epochs of a phase that are finished."""
        return sum(row["phase"] == phase for row in self.rows)

    def epochs(self, phase: str, last: int) -> Iterable[int]:
        """The numbers of the epochs of a phase that are left up to `last`, under a progress bar with the metrics."""
        done = self.done(phase)
        left = Work(range(done + 1, last + 1), "epochs", done=done, now=self._latest, after=BETWEEN_LINES)
        return self._track(left, phase.upper(), last) if done < last else ()

    def _latest(self) -> str:
        """The last epoch in a few numbers."""
        row = self.rows[-1] if self.rows else {}
        return ", ".join(
            f"{name} {row[name]:.4f}" for name in metrics_on("progress") if isinstance(row.get(name), (int, float))
        )

    def restore(self, phase: str, policy: PointerSelector, optimizer: torch.optim.Optimizer) -> dict | None:
        """Put weights, optimizer and random state where the last epoch of `phase` left them. Returns the phase's
        extra state, None where the phase has not begun."""
        if self.state is None:
            return None
        goes_on = self.state["phase"] == phase
        _refuse(self.run, misfit(self.state, policy, optimizer if goes_on else None))
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
        """An epoch is finished: state, then checkpoint, then the metrics and log lines. Raises LeverError when a
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
        header, warnings = table_header(row["phase"]), self._warnings(row)
        for line in [*(header if self._opens_phase(len(self.rows) - 1) else []), table_row(row), *warnings]:
            append_line(self.run.log, line)
        if self.tracker is not None:
            self.tracker.add(row)
        for line in [*(header if self._heading != row["phase"] else []), table_row(row), *warnings]:
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

    def _warnings(self, row: dict) -> list[str]:
        """The warnings of an epoch, each kind the first time it comes in the run."""
        new = {kind: text for kind, text in row.get("warnings", {}).items() if kind not in self._warned}
        self._warned |= new.keys()
        return [f"warning: {row['phase']} epoch {row['epoch']}: {text}" for text in new.values()]

    def _publish_checkpoint(self, policy: PointerSelector | None = None) -> None:
        """Write the checkpoint of the last epoch unless it is there."""
        row = self.rows[-1]
        path = self.run.checkpoint(row["phase"], row["epoch"])
        if path.exists():
            return
        if policy is None:
            policy = PointerSelector(**self.config["policy"])
            _refuse(self.run, misfit(self.state, policy))
            policy.load_state_dict(self.state["policy"])
        metrics = {name: value for name, value in row.items() if name not in ("phase", "epoch")}
        content = v3_content(
            policy,
            epoch=row["epoch"] - 1,
            phase=row["phase"],
            kl_beta=row.get("beta", 0.0),
            metrics=metrics,
            config=self.config,
        )
        save_torch(path, content)


def _get_rng() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
