"""The synthetic world: the golden generator's bits, what truth means, and the judging of a policy by enumeration."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.batches import to_tensors
from lever_lm.training.rollouts.file_format import load_groups

CHECKOUT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("synthetic", CHECKOUT / "scripts" / "synthetic.py")
synthetic = sys.modules["synthetic"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(synthetic)
World = synthetic.World

SMALL = {"n_train": 120, "d": 24, "queries": 20, "pool": 16, "seed": 3}
ODD = {"beams": 0, "retrieval": 1, "samples_per_temp": 0, "random": 13, "gain": 2.0, "difficulty": 0.5}
MADE = ("content", "embeddings", "qids", "truth")
# Of what the golden script made of SMALL and of SMALL with ODD; see `digest`.
SAME = {"embeddings": "e93c8e0e7f949a05", "qids": "9c37ca852f55dfb5"}
DIGESTS = {
    "usual": {"content": "89a4af0447cb3144", **SAME, "truth": "0ad04e75909ec3b5"},
    "odd": {"content": "6e913f645f036d9d", **SAME, "truth": "279b2d9099eaee5f"},
}


@pytest.fixture(scope="module")
def small():
    """A small world: content, embeddings, qids, truth."""
    return synthetic.generate(World(**SMALL))


def flags(settings):
    return [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), str(value))]


def read(folder):
    """What a folder holds: the bytes of the JSON, then every array as (dtype, shape, bytes)."""
    tensor = torch.load(folder / "embeddings.pt", weights_only=True)
    with np.load(folder / "truth.npz") as file:
        arrays = {"embeddings": tensor.numpy(), **file}
    facts = {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in arrays.items()}
    return (folder / "rl_data.json").read_bytes(), facts


def digest(value):
    """sha256 of JSON or an array, floats as ten-thousandths: machines differ in the last bits of a matrix product."""

    def plain(part):
        if isinstance(part, dict):
            return {name: plain(one) for name, one in part.items()}
        if isinstance(part, list):
            return [plain(one) for one in part]
        return round(part * 10_000) if isinstance(part, float) else part

    text = json.dumps(plain(value.tolist() if isinstance(value, np.ndarray) else value))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------- the golden generator


@pytest.mark.parametrize("extra", [{}, ODD], ids=["usual", "odd"])
def test_a_world_is_the_one_it_always_was(extra):
    data = synthetic.generate(World(**SMALL, **extra))
    assert {name: digest(getattr(data, name)) for name in MADE} == DIGESTS["odd" if extra else "usual"]


def test_the_defaults_are_the_golden_ones():
    world = World()
    assert (world.n_train, world.d, world.queries, world.pool, world.seed) == (9009, 768, 800, 64, 0)
    assert (world.beams, world.retrieval, world.random, world.samples_per_temp) == (5, 4, 3, 2)
    assert (world.gain, world.difficulty) == (5.0, 1.0)


@pytest.mark.parametrize(
    ("sizes", "flag"),
    [
        ({"queries": 121}, "--queries"),
        ({"pool": 120}, "--pool"),
        ({"pool": 1}, "--pool"),
        ({"retrieval": 9}, "--retrieval"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_their_flag(sizes, flag):
    with pytest.raises(ValueError, match=flag):
        World(**{**SMALL, **sizes})


# ---------------------------------------------------------------------- the data


def test_the_rollout_file_loads(tmp_path):
    data = synthetic.write(tmp_path / "new" / "folder", World(**SMALL))
    groups = load_groups(tmp_path / "new" / "folder" / "rl_data.json")
    assert [group.query_id for group in groups] == data.qids.tolist() == sorted(data.qids.tolist())
    for group in groups:
        logged = data.content[str(group.query_id)]["pointer_candidates"]
        assert group.query_id not in group.pool
        assert len(set(group.pool)) == 16
        assert group.sequences == [t["pointer"] for t in logged]
        assert [[group.pool[i] for i in picks] for picks in group.sequences] == [t["pointer_global"] for t in logged]
        assert group.rewards == [t["vqa_correct"] + t["vqa_acc_score"] for t in logged]
        assert len({frozenset(picks) for picks in group.sequences}) == len(group.sequences)


def test_embeddings_are_unit_rows_and_truth_a_mean_reward(small):
    assert small.embeddings.shape == (120, 24)
    assert small.truth.shape == (20, 16, 16)
    assert small.embeddings.dtype == small.truth.dtype == np.float32
    assert np.linalg.norm(small.embeddings, axis=-1) == pytest.approx(np.ones(120), abs=1e-6)
    assert 0 < small.truth.min() < small.truth.max() < 2


def test_rewards_scatter_about_the_truth_of_their_ordered_pair():
    data = synthetic.generate(World(n_train=200, d=16, queries=100, pool=20, random=60, seed=1))
    reward, mean, swapped = np.array(
        [
            (t["vqa_correct"] + t["vqa_acc_score"], table[tuple(t["pointer"])], table[tuple(t["pointer"][::-1])])
            for table, entry in zip(data.truth, data.content.values(), strict=True)
            for t in entry["pointer_candidates"]
        ]
    ).T
    assert abs((reward - mean).mean()) < 3 * (reward - mean).std() / len(reward) ** 0.5
    assert np.square(reward - mean).mean() < 0.98 * np.square(reward - swapped).mean(), "i is the first pick"


def test_of_equal_picks_the_likelier_kind_stands_where_the_first_stood():
    def trajectory(kind, *picks):
        return {"pointer": list(picks), "gen_method": kind}

    kinds = [("sample", 0, 1), ("sample", 2, 3), ("retrieval", 1, 0), ("random", 3, 2), ("sample", 2, 3)]
    kept = synthetic._distinct([trajectory(*kind) for kind in kinds])
    assert kept == [trajectory("retrieval", 1, 0), trajectory("sample", 2, 3)]


# ---------------------------------------------------------------------- unseen queries


def test_unseen_queries_are_of_the_same_world_and_none_of_its_own(small):
    more = synthetic.unseen(World(**SMALL), small, 100)
    assert len(set(more.qids.tolist())) == 100
    assert not set(more.qids.tolist()) & set(small.qids.tolist())
    again = synthetic.unseen(World(**SMALL), small, 100)
    assert all(np.array_equal(a, b) for a, b in zip(more, again, strict=True))
    with pytest.raises(ValueError, match="101 more queries: only 100 of the 120"):
        synthetic.unseen(World(**SMALL), small, 101)
    assert more.pools.shape == (100, SMALL["pool"])
    for query, pool in zip(more.qids, more.pools.tolist(), strict=True):
        assert len(set(pool)) == len(pool)
        assert query not in pool
    # The mean true reward of a useful pair is above that of a useless one, by the world's own utility.
    space = synthetic._draw_space(World(**SMALL), np.random.default_rng(SMALL["seed"]))
    assert np.array_equal(space.embeddings, small.embeddings)
    useful = np.einsum("qku,qu->qk", space.utility[more.pools], space.utility[more.qids])
    best, worst = useful.argsort(-1)[:, -2:], useful.argsort(-1)[:, :2]
    rows = np.arange(100)
    assert (more.truth[rows, best[:, 0], best[:, 1]] > more.truth[rows, worst[:, 0], worst[:, 1]]).all()


# ---------------------------------------------------------------------- judging a policy


def case(update="none", *, n=3, size=5):
    """A policy with a sharp opinion, and queries (n, D), candidates (n, K, D), truth (n, K, K)."""
    torch.manual_seed(0)
    policy = PointerSelector(d_model=6, hidden_dim=8, state_update=update).eval()
    return policy, (torch.randn(n, 6), torch.randn(n, size, 6), np.random.default_rng(0).random((n, size, size)))


@torch.no_grad()
def enumerated(policy, queries, candidates, truth):
    """The expected reward pair by pair, from the logits of one sequence at a time."""
    total = 0.0
    for query, pool, table in zip(queries, candidates, truth, strict=True):
        for i in range(len(pool)):
            for j in range(len(pool)):
                if i != j:
                    steps = policy.logits(query[None], pool[None], torch.tensor([[i, j]]))[0].double().softmax(-1)
                    total += float(steps[0, i] * steps[1, j]) * table[i, j]
    return total / len(queries)


@pytest.mark.parametrize("update", ["none", "gate"])
def test_the_expected_reward_is_that_of_all_pairs_one_by_one(update, monkeypatch):
    policy, world = case(update)
    expected = enumerated(policy, *world)
    swapped = enumerated(policy, *world[:2], world[2].transpose(0, 2, 1))
    assert abs(expected - swapped) > 1e-3, "the case tells first and second pick apart"
    assert synthetic.true_rewards(policy, *world)[0] == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr(synthetic, "CHUNK", 3)
    assert synthetic.true_rewards(policy, *world)[0] == pytest.approx(expected, abs=1e-6)


def test_a_policy_without_an_opinion_earns_the_mean_of_all_pairs():
    policy, world = case(n=4, size=7)
    torch.nn.init.zeros_(policy.cand_proj.weight)
    off_diagonal = world[2][:, ~np.eye(7, dtype=bool)]
    assert synthetic.true_rewards(policy, *world)[0] == pytest.approx(off_diagonal.mean(), abs=1e-6)


def test_the_greedy_reward_by_hand():
    policy = PointerSelector(d_model=3, hidden_dim=3).eval()
    with torch.no_grad():  # without attention and noise the logits are the query's own entries, centred
        for parameter in policy.cross_attn_layers[0].out_proj.parameters():
            parameter.zero_()
        for projection in (policy.query_proj, policy.cand_proj):
            projection.weight.copy_(torch.eye(3))
    queries = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])  # pick 0 then 1, and 2 then 1
    truth = np.zeros((2, 3, 3), dtype=np.float32)
    truth[0, 0, 1], truth[1, 2, 1], truth[0, 1, 0], truth[1, 1, 2] = 0.5, 1.5, 9, 9
    assert synthetic.true_rewards(policy, queries, torch.eye(3).expand(2, 3, 3), truth)[1] == 1.0
    # A gap of 1.2 at temperature 0.1 leaves next to nothing to chance.
    assert synthetic.true_rewards(policy, queries, torch.eye(3).expand(2, 3, 3), truth)[0] == pytest.approx(1, abs=0.01)


def test_a_policy_in_training_mode_is_refused():
    policy, world = case()
    with pytest.raises(ValueError, match=r"policy\.eval\(\)"):
        synthetic.true_rewards(policy.train(), *world)


# ---------------------------------------------------------------------- the command


def test_the_command_writes_what_the_module_makes_and_sums_it_up(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rl_data.json").write_text("of an earlier run")
    monkeypatch.setattr(sys, "argv", ["synthetic.py", "--out", str(tmp_path / "out"), *flags(SMALL)])
    synthetic.main()
    content, arrays = read(tmp_path / "out")
    assert json.loads(content) == small.content
    assert {name: facts[2] for name, facts in arrays.items()} == {
        name: getattr(small, name).tobytes() for name in MADE if name != "content"
    }
    said = json.loads(capsys.readouterr().out)
    assert said["queries"] == 20
    assert said["rollouts"] == sum(len(entry["pointer_candidates"]) for entry in small.content.values())
    off_diagonal = small.truth[:, ~np.eye(16, dtype=bool)]
    assert said["random_pair"] == pytest.approx(off_diagonal.mean(), abs=1e-4)
    assert said["best_pair"] == pytest.approx(off_diagonal.max(1).mean(), abs=1e-4)


def test_the_command_refuses_sizes_that_do_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["synthetic.py", "--out", str(tmp_path / "out"), "--queries", "9010"])
    with pytest.raises(SystemExit) as stopped:
        synthetic.main()
    assert stopped.value.code == 2
    assert "lower --queries" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_under_the_lineages_dropout_the_kl_of_unchanged_weights_is_noise(tmp_path):
    synthetic.write(tmp_path, World(n_train=900, queries=80))
    embeddings = torch.load(tmp_path / "embeddings.pt", weights_only=True)
    groups = to_tensors(load_groups(tmp_path / "rl_data.json"), embeddings, embeddings)
    batch = groups.batch(torch.arange(len(groups)))
    torch.manual_seed(0)
    policy = PointerSelector(d_model=768, hidden_dim=256)  # dropout 0.5, of attention 0.1, as the lineage's
    with torch.no_grad():
        old, new = (
            policy.train(mode).log_prob(batch.query, batch.candidates, batch.sequences) for mode in (False, True)
        )
    gap = (new - old)[batch.mask]
    assert float((gap.exp() - 1 - gap).mean()) == pytest.approx(0.35, abs=0.05)
