"""A small world in which a policy learns in seconds, and a training run in it as `lever train` makes one.

S = 2 shots; a candidate is good or bad by one coordinate of its features, and a rollout is worth how many good ones it
holds.
"""

import itertools
import json
import math

import torch

from lever_lm.config.schema import GrpoConfig, RceConfig
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.batches import to_tensors
from lever_lm.training.grpo import train_grpo
from lever_lm.training.metrics import TIMES
from lever_lm.training.rce import train_rce
from lever_lm.training.rollouts.file_format import Group
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.run_state import Journal
from lever_lm.utils.safe_torch_load import load_torch

QUERIES, POOL, DIM = 24, 6, 8
TRAIN = QUERIES * 3 // 4
RCE = RceConfig(epochs=3, lr=3e-3, batch_size=8)
GRPO = GrpoConfig(epochs=6, lr=3e-3, batch_size=8, refresh_every=2)


def world(seed=0, rollouts=8):
    """Groups over random features: a candidate is worth its first coordinate's sign, which cosine does not see."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(QUERIES * POOL, DIM, generator=generator)
    worth = (features[:, 0] > 0).float()
    every = list(itertools.permutations(range(POOL), 2))
    groups = []
    for query in range(QUERIES):
        pool = list(range(query * POOL, (query + 1) * POOL))
        chosen = torch.randperm(len(every), generator=generator)[:rollouts].tolist()
        sequences = [list(every[i]) for i in chosen]
        rewards = [float(worth[pool[a]] + worth[pool[b]]) for a, b in sequences]
        groups.append(Group(query, pool, sequences, rewards))
    return groups, features, worth


def data(groups=None, features=None):
    """The groups as tensors: three quarters to train on, a quarter to validate."""
    if groups is None:
        groups, features, _ = world()
    return tuple(to_tensors(part, features, features) for part in (groups[:TRAIN], groups[TRAIN:]))


def with_groups(change):
    """`data` of a world in which `change` has made another group of each."""
    groups, features, _ = world()
    return data([change(group) for group in groups], features)


def make(seed=0, kind=PointerSelector, **kwargs):
    """A policy without dropout."""
    torch.manual_seed(seed)
    return kind(**{"d_model": DIM, "hidden_dim": 16, "dropout": 0.0, "attn_dropout": 0.0, **kwargs})


def journal_in(folder, policy, say=lambda line: None):
    """The journal of the run in a folder, as a process that begins or goes on with it has it."""
    folder.mkdir(exist_ok=True)
    journal = Journal(RunFolder(folder), {"policy": policy.shape}, {"rollouts": "r"}, say)
    journal.resume()
    return journal


def train(folder, rce=RCE, grpo=GRPO, policy=None, sets=None, say=lambda line: None, answer=None, **shape):
    """One process: what `lever train` does from the groups on → (policy, rows)."""
    initial = make(**shape)
    policy = policy or make(**shape)
    journal = journal_in(folder, policy, say)
    torch.manual_seed(0)
    training, validation = sets or data()
    train_rce(policy, training, validation, rce, journal)
    if grpo is not None:
        train_grpo(policy, initial, training, validation, grpo, journal, answer=answer)
    return policy, journal.rows


def expected_reward(policy, sets, worth):
    """Exact expected reward of the sampling policy, over all ordered pairs of each pool."""
    batch = sets.batch(torch.arange(len(sets)))
    pairs = torch.tensor(list(itertools.permutations(range(POOL), 2)))
    with torch.no_grad():
        log_probs = policy.eval().log_prob(batch.query, batch.candidates, pairs.expand(len(sets), -1, -1))
    return float((log_probs.exp() * worth[sets.pools][:, pairs].sum(-1)).sum(-1).mean())


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_times(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMES}


class Killed(BaseException):
    """What a signal would do."""


def die_at_a_new_row(line):
    """A `say` that kills the process where the row of an epoch is printed."""
    if line.split()[0].isdigit():
        raise Killed


def until_it_ends(run):
    """Call `run` again and again until it is no longer killed; returns how often it was."""
    for kills in itertools.count():
        try:
            run()
            return kills
        except Killed:
            pass


class Mortal(PointerSelector):
    """A policy whose process is killed in the middle of an epoch, at a given call of steps."""

    left = math.inf

    def steps(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().steps(*args, **kwargs)


def assert_same_run(one, other):
    """Both folders hold the same checkpoints, rows and log, times excepted."""
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in other.iterdir())
    for name in [n for n in names if "_epoch" in n]:
        a, b = load_torch(one / name), load_torch(other / name)
        assert same_state(a.pop("model_state_dict"), b.pop("model_state_dict")), name
        assert {**a, "metrics": without_times(a["metrics"])} == {**b, "metrics": without_times(b["metrics"])}, name
    rows = [
        [without_times(json.loads(line)) for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (one, other)
    ]
    assert rows[0] == rows[1]
    assert (one / "train.log").read_text(encoding="utf-8") == (other / "train.log").read_text(encoding="utf-8")
