"""The bench compares like with like: its lineage-shaped reference computes what the package's policy computes; and it
runs."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import SCRIPTS

from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.losses import grpo_loss, rce_loss
from lever_lm.training.rewards import group_advantage

D, H, K, B, G, S = 12, 8, 7, 3, 5, 3


@pytest.fixture
def bench(script):
    return script("bench_training")


@pytest.fixture
def pair(bench):
    """The package's policy and the reference with the same weights, in eval mode."""
    torch.manual_seed(0)
    policy, reference = PointerSelector(D, H).double().eval(), bench.Lineage(D, H).double().eval()
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    reference.load_state_dict(policy.state_dict())
    return policy, reference


def batch():
    """Queries, pools and sequences of a batch."""
    generator = torch.Generator().manual_seed(1)
    picks = torch.rand(B, G, K, generator=generator).argsort(-1)[..., :S]
    features = torch.randn(B, 1 + K, D, generator=generator, dtype=torch.float64)
    return features[:, 0], features[:, 1:], picks


def one_by_one(reference):
    return torch.stack([reference.log_prob(*one) for one in zip(*batch(), strict=True)])


def test_the_reference_gives_our_log_probs_and_gradients(pair):
    policy, reference = pair
    ours, theirs = policy.log_prob(*batch()), one_by_one(reference)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (name, one), other in zip(policy.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-7, atol=1e-8, msg=name)


def test_the_reference_gives_our_losses(bench, pair):
    _, reference = pair
    log_probs = one_by_one(reference)
    generator = torch.Generator().manual_seed(2)
    rewards = torch.rand(B, G, generator=generator, dtype=torch.float64) * 2
    old = log_probs + 0.3 * torch.randn(B, G, generator=generator, dtype=torch.float64)
    mask = torch.ones(B, G, dtype=torch.bool)

    theirs = [bench.lineage_rce_loss(*one, 0.7) for one in zip(log_probs, rewards, strict=True)]
    torch.testing.assert_close(torch.stack(theirs).mean(), rce_loss(log_probs, rewards, mask, 0.7))

    theirs = [bench.lineage_grpo_loss(*one, 0.3) for one in zip(log_probs, old, rewards, strict=True)]
    ours, metrics = grpo_loss(log_probs, old, group_advantage(rewards, mask), mask, kl_beta=0.3)
    torch.testing.assert_close(torch.stack([loss for loss, _ in theirs]).mean(), ours)
    torch.testing.assert_close(torch.stack([kl for _, kl in theirs]).mean(), metrics["kl"])


def test_random_groups_have_the_shapes_that_are_asked_for(bench):
    train, val = bench.random_sets(50, 9)
    assert (len(train), len(val)) == (40, 10)
    assert train.pools.shape == (40, 9)
    assert (train.sequences[..., 0] != train.sequences[..., 1]).all()
    assert int(train.sequences.min()) >= 0
    assert int(train.sequences.max()) < 9


@pytest.mark.slow
def test_a_tiny_race_is_run_to_its_end_and_written_down(tmp_path):
    small = ["--queries", "20", "--rce-epochs", "1", "--grpo-epochs", "1", "--threads", "1"]
    command = [sys.executable, SCRIPTS / "bench_training.py", *small, "--markdown", tmp_path / "table.md"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in (tmp_path / "table.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == ["trainer", "---", "lineage", "one query", "ours"]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[1:])
    assert rows[2][rows[0].index("×")] == "1.0"
