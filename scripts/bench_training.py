"""Measure how fast the policy trains, beside a trainer shaped like the lineage's and an honest one of one query a step.

    python scripts/bench_training.py [--device cuda] [--threads 1 2] [--growth] [--markdown FILE]

Data: scripts/synthetic.py, 800 queries. Three contenders, each in a process of its own, take turns epoch by epoch, so
that a busy machine slows all of them alike:
  lineage     one query a step, and every rollout projects its own copy of the query and of the pool; RCE on all
              rollouts, GRPO on the best 3, then 5; old log-probs and validation query by query. It saves nothing.
  one query   the package's training with a batch size of 1, else as the package comes
  ours        the package's training as it comes, dropout, validation and checkpoints included
An epoch is all that it takes: validation and, for the package's, fixed policies and saving. --growth instead measures
ours on random groups, from 800 to 80,000 queries and from 64 to 1,024 candidates.

n queries, K candidates, G rollouts of a query, S shots, D embedding, H hidden.
"""

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import synthetic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lever_lm.config.schema import GrpoConfig, RceConfig
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training import grpo, rce
from lever_lm.training.batches import GroupTensors, to_tensors
from lever_lm.training.losses import rce_temperature
from lever_lm.training.reference_policy import FrozenPolicy
from lever_lm.training.rollouts.file_format import load_groups, split_ids
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.run_state import Journal
from lever_lm.utils.console import Screen

EPOCHS = {"rce": RceConfig().epochs, "grpo": GrpoConfig().epochs}
LINEAGE_TOP_K = (3, 5)
GROWTH = [(800, 64), (8_000, 64), (80_000, 64), (800, 256), (800, 1_024)]  # queries, candidates
GROWTH_ROLLOUTS = 15


# ---------------------------------------------------------------------- the lineage's shape


class Lineage(nn.Module):
    """The plain policy the way the lineage computes it. Parameters are named as PointerSelector's."""

    def __init__(
        self,
        d_model: int = 768,
        hidden_dim: int = 256,
        dropout: float = 0.5,
        attn_dropout: float = 0.1,
        temperature: float = 0.1,
    ):
        super().__init__()
        self.temperature = temperature
        self.input_proj = nn.Linear(d_model, hidden_dim, bias=False)
        attention = nn.MultiheadAttention(hidden_dim, 1, dropout=attn_dropout, batch_first=True)
        self.cross_attn_layers = nn.ModuleList([attention])
        self.attn_norms = nn.ModuleList([nn.LayerNorm(hidden_dim)])
        self.query_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.cand_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def log_prob(self, query: Tensor, pool: Tensor, sequences: Tensor) -> Tensor:
        """query (D,), pool (K, D), sequences (G, S) → (G,)."""
        group = len(sequences)
        x = self.input_proj(query.expand(group, -1))
        e = self.input_proj(pool.expand(group, -1, -1))
        attended, _ = self.cross_attn_layers[0](x.unsqueeze(1), e, e)
        x = self.attn_norms[0](attended.squeeze(1) + x)
        state = F.normalize(self.dropout(self.query_proj(x)), dim=-1)
        candidates = F.normalize(self.dropout(self.cand_proj(e)), dim=-1)
        logits = torch.bmm(candidates, state.unsqueeze(-1)).squeeze(-1) / self.temperature
        taken, total = torch.zeros_like(logits, dtype=torch.bool), 0
        for pick in sequences.unbind(-1):
            total = total - F.cross_entropy(logits.masked_fill(taken, -100), pick, reduction="none")
            taken = taken.scatter(-1, pick.unsqueeze(-1), True)
        return total


def lineage_rce_loss(log_probs: Tensor, rewards: Tensor, temperature: float) -> Tensor:
    """Return the RCE loss of one query, a scalar; log-probs and rewards are (G,)."""
    return ((rewards / temperature).softmax(-1) * -log_probs).sum()


def lineage_grpo_loss(log_probs: Tensor, old: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the GRPO loss of one query and the KL in it, scalars; all arguments are (G,), G > 1."""
    advantages = ((rewards - rewards.mean()) / rewards.std().clamp(min=0.1)).clamp(-5, 5)
    log_ratio = log_probs - old
    ratio = log_ratio.exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    kl = (ratio - 1 - log_ratio).mean()
    return -objective.mean() + beta * kl, kl


def train_lineage(train: GroupTensors, val: GroupTensors, epochs: dict[str, int], clock: "Clock") -> None:
    """Train with the lineage's learning rates and its other settings."""
    policy = Lineage(train.queries.shape[1]).to(train.queries.device)

    def groups(data: GroupTensors, order: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        for place in order.tolist():
            real = data.mask[place]
            query, pool = data.queries[data.rows[place]], data.icds[data.pools[place]]
            yield place, query, pool, data.sequences[place, real], data.rewards[place, real]

    def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def validation() -> float:
        policy.eval()
        losses = [
            lineage_rce_loss(policy.log_prob(query, pool, sequences), rewards, 0.5).item()
            for _, query, pool, sequences, rewards in groups(val, torch.arange(len(val)))
        ]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def old_log_probs() -> list[Tensor]:
        policy.eval()
        everything = groups(train, torch.arange(len(train)))
        return [policy.log_prob(query, pool, sequences) for _, query, pool, sequences, _ in everything]

    validation = clock.timed("validation", validation)
    optimizer, steps = torch.optim.AdamW(policy.parameters(), lr=1e-4), 0
    for _ in range(epochs["rce"]):
        policy.train()
        for _, query, pool, sequences, rewards in groups(train, torch.randperm(len(train))):
            temperature = rce_temperature(steps, EPOCHS["rce"] * len(train))
            step(optimizer, lineage_rce_loss(policy.log_prob(query, pool, sequences), rewards, temperature))
            steps += 1
        validation()
        clock.turn("rce")
    old = old_log_probs()
    clock.turn("old")
    optimizer, beta = torch.optim.AdamW(policy.parameters(), lr=5e-6), 0.1
    for epoch in range(epochs["grpo"]):
        policy.train()
        for place, query, pool, sequences, rewards in groups(train, torch.randperm(len(train))):
            best = rewards.argsort(descending=True, stable=True)[: LINEAGE_TOP_K[min(epoch, 1)]]
            if len(best) > 1:
                log_probs = policy.log_prob(query, pool, sequences[best])
                loss, kl = lineage_grpo_loss(log_probs, old[place][best], rewards[best], beta)
                step(optimizer, loss)
                beta = min(beta * 1.5, 10.0) if kl > 0.1 else max(beta / 1.5, 0.001) if kl < 0.01 else beta
        validation()
        clock.turn("grpo")


# ---------------------------------------------------------------------- the package's


def train_package(
    train: GroupTensors, val: GroupTensors, epochs: dict[str, int], clock: "Clock", batch_size: int | None = None
) -> None:
    """Train with the package's own loops as they are, `batch_size` apart."""
    changes = {} if batch_size is None else {"batch_size": batch_size}
    rce_config = RceConfig(epochs=epochs["rce"], **changes)
    grpo_config = GrpoConfig(epochs=epochs["grpo"], **changes)
    initial, policy = (PointerSelector(train.queries.shape[1]).to(train.queries.device) for _ in range(2))
    rce.validate = grpo.validate = clock.timed("validation", rce.validate)
    FrozenPolicy.__init__ = clock.timed("old", FrozenPolicy.__init__)
    FrozenPolicy.log_probs = clock.timed("old", FrozenPolicy.log_probs)

    class Paced(Journal):
        """Ends a turn with each epoch."""

        def commit(self, row, *rest):
            super().commit(row, *rest)
            clock.turn(row["phase"])

    with tempfile.TemporaryDirectory() as folder:
        journal = Paced(RunFolder(Path(folder)), {"policy": policy.shape}, {}, lambda line: None)
        journal.resume()
        rce.train_rce(policy, train, val, rce_config, journal)
        grpo.train_grpo(policy, initial, train, val, grpo_config, journal)


CONTENDERS = {
    "lineage": train_lineage,
    "one query": functools.partial(train_package, batch_size=1),
    "ours": train_package,
}


# ---------------------------------------------------------------------- a contender's process


class Clock:
    """Seconds of a turn and of named parts of it. A turn begins with a line on stdin, and ends with one on stdout."""

    def __init__(self, device: str):
        self.device, self.parts = device, {}
        self._wait()

    def _wait(self) -> None:
        print(json.dumps(self.parts), flush=True)
        if not sys.stdin.readline():
            sys.exit("the race was called off")
        self.parts, self.began = {}, time.perf_counter()

    def timed(self, part: str, function: Callable) -> Callable:
        """Return the function with its seconds counted."""

        def wrapper(*arguments):
            began = time.perf_counter()
            result = function(*arguments)
            self.parts[part] = self.parts.get(part, 0) + time.perf_counter() - began
            return result

        return wrapper

    def turn(self, phase: str) -> None:
        """End an epoch or another piece of work."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.parts = {"phase": phase, "seconds": time.perf_counter() - self.began, "old": 0, **self.parts}
        self.parts["memory"] = peak_memory(self.device)
        self._wait()


def peak_memory(device: str) -> float:
    """MiB that this process has held at most: of the GPU's, or of the system's; getrusage would count the parent's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def work(contender: str, file: Path | None, size: tuple[int, int], arguments: argparse.Namespace) -> None:
    """Do the work of a contender's process."""
    torch.set_num_threads(arguments.threads[0])
    torch.manual_seed(0)
    sets = [GroupTensors(**parts) for parts in torch.load(file, weights_only=True)] if file else random_sets(*size)
    train, val = (data.to(torch.device(arguments.device)) for data in sets)
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    torch.optim.AdamW([weight]).step()  # at the first one torch loads parts of itself: no epoch's work
    clock = Clock(arguments.device)
    CONTENDERS[contender](train, val, {"rce": arguments.rce_epochs, "grpo": arguments.grpo_epochs}, clock)


def random_sets(queries: int, pool: int) -> list[GroupTensors]:
    """Training and validation groups of this many queries in all, drawn at random and fast."""
    features = F.normalize(torch.randn(max(queries, synthetic.World.n_train), synthetic.World.d), dim=-1)
    sets = []
    for n in (queries * 4 // 5, queries - queries * 4 // 5):
        first = torch.randint(pool, (n, GROWTH_ROLLOUTS))
        second = (first + torch.randint(1, pool, first.shape)) % pool
        sets.append(
            GroupTensors(
                queries=features,
                icds=features,
                rows=torch.randint(len(features), (n,)),
                pools=torch.randint(len(features), (n, pool)),
                pool_mask=None,
                sequences=torch.stack([first, second], -1),
                mask=torch.ones_like(first, dtype=torch.bool),
                rewards=torch.rand(first.shape) * synthetic.REWARD_IF_RIGHT,
            )
        )
    return sets


# ---------------------------------------------------------------------- the race


def synthetic_sets(queries: int) -> list[GroupTensors]:
    """Training and validation groups of the synthetic world."""
    with tempfile.TemporaryDirectory() as folder:
        data = synthetic.write(folder, synthetic.World(queries=queries))
        groups = sorted(load_groups(Path(folder) / "rl_data.json"), key=lambda group: group.query_id)
    features = torch.from_numpy(data.embeddings)
    splits = split_ids(data.qids.tolist())
    return [to_tensors([group for group in groups if group.query_id in ids], features, features) for ids in splits]


def race(contenders: list[str], options: list[str], threads: int) -> dict[str, list[dict]]:
    """Let the contenders work in turn, each in a process of its own. Returns their turns."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    turns, running = {name: [] for name in contenders}, {}
    for name in contenders:
        command = [sys.executable, __file__, *options, "--threads", str(threads), "--contender", name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        running[name] = subprocess.Popen(command, env=environment, **pipes)
        running[name].stdout.readline()  # it has read its data
    while running:
        for name, process in list(running.items()):
            process.stdin.write("go\n")
            process.stdin.flush()
            if line := process.stdout.readline():
                turns[name].append(json.loads(line))
                continue
            del running[name]
            if process.wait():
                raise SystemExit(f"{name} failed: its error is above")
    return turns


def summary(turns: list[dict]) -> dict[str, float]:
    """Median seconds of an epoch, and of all epochs that a training has; MiB."""

    def median(phase: str, part: str = "seconds") -> float:
        return statistics.median([turn[part] for turn in turns if turn["phase"] == phase] or [0.0])

    once = median("old")
    epochs = {phase: median(phase) for phase in EPOCHS}
    return {
        **epochs,
        "validation": median("grpo", "validation"),
        "old": once or median("grpo", "old"),
        "total": once + sum(EPOCHS[phase] * seconds for phase, seconds in epochs.items()),
        "memory": max(turn["memory"] for turn in turns),
    }


Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def compare(arguments: argparse.Namespace) -> Iterator[Table]:
    """Yield the contenders, a table for each number of threads."""
    total = f"{EPOCHS['rce']} + {EPOCHS['grpo']}"
    header = ["trainer", "RCE", "GRPO", "validation", "old", total, "×", "MiB"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sets.pt"
        torch.save([vars(data) for data in synthetic_sets(arguments.queries)], file)
        options = [*passed_on(arguments), "--file", str(file)]
        for threads in arguments.threads:
            found = {name: summary(turns) for name, turns in race(list(CONTENDERS), options, threads).items()}
            rows = []
            for name, one in found.items():
                ratio = found["lineage"]["total"] / one["total"]
                seconds = [f"{one[key]:.3g}" for key in ("rce", "grpo", "validation", "old", "total")]
                rows.append([name, *seconds, f"{ratio:.1f}", f"{one['memory']:.0f}"])
            title = (
                f"Seconds of an epoch and of {total} epochs; {arguments.queries} queries; {place(arguments, threads)}. "
                "Validation is a part of an epoch; old log-probs are one too, but the lineage takes them once"
            )
            yield title, header, rows


def growth(arguments: argparse.Namespace) -> Iterator[Table]:
    """Yield the table of our trainer at every size."""
    rows, threads = [], arguments.threads[0]
    for queries, pool in GROWTH:
        options = [*passed_on(arguments), "--size", str(queries), str(pool)]
        one = summary(race(["ours"], options, threads)["ours"])
        rows.append([f"{queries:,}", f"{pool:,}", f"{one['rce']:.3g}", f"{one['grpo']:.3g}", f"{one['memory']:.0f}"])
    title = f"Seconds of an epoch of ours; random groups of {GROWTH_ROLLOUTS} rollouts, {place(arguments, threads)}"
    yield title, ["queries", "candidates", "RCE", "GRPO", "MiB"], rows


def passed_on(arguments: argparse.Namespace) -> list[str]:
    """Return the options that a contender's process gets."""
    names = ("device", "rce_epochs", "grpo_epochs")
    return [word for name in names for word in ("--" + name.replace("_", "-"), str(getattr(arguments, name)))]


def place(arguments: argparse.Namespace, threads: int) -> str:
    """Return where the bench ran, and how busy the machine was."""
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{threads} of {os.cpu_count()} cores"
    return f"{where}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"


def markdown(title: str, header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown, with its title above."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join([title, "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def main() -> None:
    """Race, or grow; print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=synthetic.World.queries)
    parser.add_argument("--rce-epochs", type=int, default=3, help="how many are measured")
    parser.add_argument("--grpo-epochs", type=int, default=5, help="how many are measured")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 2; on a GPU, and with --growth, 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.threads = arguments.threads or ([1] if arguments.growth or arguments.device == "cuda" else [1, 2])
    if arguments.contender:
        work(arguments.contender, arguments.file, arguments.size, arguments)
        return
    tables = []
    for table in growth(arguments) if arguments.growth else compare(arguments):
        Screen().table(*table)
        tables.append(markdown(*table))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
