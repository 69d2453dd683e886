"""Parsers of torch files: checkpoints of both formats, what convert makes of them, a run's state, embeddings."""

from pathlib import Path

import torch

from fuzzing.harness import Parser, Target
from fuzzing.texts import to_file
from fuzzing.torchfiles import known, saved, spoil_torch
from lever_lm.data.embeddings import read_embeddings
from lever_lm.selectors.pointer.checkpoint import load_policy, own_config, to_v2, to_v3, v3_content
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.run_state import Journal
from lever_lm.utils.safe_torch_load import load_torch

_METRICS = {"val_loss": 1.5, "kl": 0.04}


def _policy(**options) -> PointerSelector:
    torch.manual_seed(0)
    return PointerSelector(**{"d_model": 6, "hidden_dim": 8, **options}).eval()


def _v3(**options) -> dict:
    return v3_content(
        _policy(**options), epoch=2, phase="grpo", kl_beta=0.1, metrics=_METRICS, config={"encoder": "tiny@1"}
    )


def _seeds() -> list[bytes]:
    ours = _v3()
    theirs = {key: value for key, value in ours.items() if key not in ("config", "format")}
    return [saved(ours), saved(theirs), saved(to_v2(ours, "x")[0]), saved(_v3(num_layers=2, state_update="gru"))]


def checkpoint(folder: Path) -> Target:
    """A checkpoint, as `lever infer` loads it."""
    path = folder / "grpo_epoch3.pt"

    def read() -> None:
        policy = load_policy(path)
        content = load_torch(path)
        own_config(content)
        with torch.no_grad():
            policy.select(torch.ones(1, policy.d_model), torch.ones(1, 3, policy.d_model), 2)

    return Target(_seeds(), spoil_torch, to_file(path, read), known())


def convert(folder: Path) -> Target:
    """A checkpoint, as `lever convert` reads it, in both directions."""
    from lever_lm.utils.errors import LeverError

    path = folder / "grpo_epoch3.pt"

    def read() -> None:
        content = load_torch(path)
        refused = []
        for make in (lambda: to_v2(content, path, allow_truncate=True)[0], lambda: to_v3(content, path)):
            try:
                saved(make())
            except LeverError as error:  # one way may be open
                refused.append(error)
        if refused:
            raise refused[0]

    return Target(_seeds()[:3], spoil_torch, to_file(path, read), known())


def checkpoint_metrics(folder: Path) -> Target:
    """The checkpoints of a run without metrics.jsonl, as `lever best-ckpt` reads them."""
    from fuzzing.folders import choices

    run = RunFolder(folder / "run")
    run.path.mkdir()
    return Target(_seeds()[:2], spoil_torch, to_file(run.checkpoint("grpo", 3), lambda: choices(run, None)), known())


def state(folder: Path) -> Target:
    """A run's state.pt, as `lever train` goes on from it."""
    policy = _policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    policy.log_prob(torch.randn(1, 6), torch.randn(1, 3, 6), torch.tensor([[[0, 1]]])).sum().backward()
    optimizer.step()
    inputs = {"rollouts": "1234", "features": "5678"}
    rows = [
        {"phase": "rce", "epoch": 1, "train_loss": 1.0, "val_loss": 2.0, "temperature": 2.0, "warnings": {"x": "y"}}
    ]
    content = {
        "phase": "rce",
        "epoch": 1,
        "policy": policy.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rows": rows,
    }
    content |= {"rng": {"cpu": torch.get_rng_state()}, "extra": {}, "inputs": inputs}
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    online = {
        "sequences": torch.zeros(2, 3, 2, dtype=torch.int64),
        "rewards": torch.zeros(2, 3),
        "mask": torch.ones(2, 3) > 0,
    }
    extra = {"beta": 0.1, "old": weights, "reference": weights, "online": online}
    later = [*rows, {"phase": "grpo", "epoch": 1, "ppo_loss": 0.5, "kl": 0.1, "beta": 0.1}]
    second = {**content, "phase": "grpo", "rows": later, "extra": extra}
    run = RunFolder(folder / "run")
    run.path.mkdir()

    def read() -> None:
        for path in run.path.iterdir():
            if path != run.state:
                path.unlink()
        journal = Journal(run, {"policy": policy.shape}, inputs, lambda text: None)
        journal.resume()
        for phase in ("rce", "grpo"):
            journal.done(phase)
            fresh = _policy()
            journal.restore(phase, fresh, torch.optim.AdamW(fresh.parameters(), lr=1e-3))

    return Target([saved(content), saved(second)], spoil_torch, to_file(run.state, read), known())


def embeddings(folder: Path) -> Target:
    """`--embeddings FILE.pt`."""
    path, matrix = folder / "e.pt", torch.randn(5, 3)
    seeds = [saved(matrix), saved({"x": matrix.half()}), saved(matrix.numpy()), saved({"x": matrix.double().numpy()})]
    return Target(seeds, spoil_torch, to_file(path, lambda: read_embeddings(path)), known())


PARSERS = [
    Parser("checkpoint", checkpoint),
    Parser("convert", convert),
    Parser("checkpoint-metrics", checkpoint_metrics),
    Parser("state", state),
    Parser("embeddings.pt", embeddings),
]
