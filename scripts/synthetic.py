"""Make rollouts of a world whose reward is known, so that a policy can be judged by what it truly earns.

    python scripts/synthetic.py --out DIR [--seed 0] [--queries 800] …

Writes DIR/rl_data.json (a rollout file), DIR/embeddings.pt ((N, D) float32) and DIR/truth.npz (qids, truth). As a
module: `generate` and `write` make a world, `unseen` more queries of it, and `true_rewards` judges a policy by them.

N training examples, D embedding, Q queries, K candidates in a query's pool, n queries to judge by, S = 2 shots.
truth (Q, K, K): truth[q, i, j] is the mean reward (hard_plus_soft) of the pool positions [i, j], i picked first;
the diagonal repeats a pick and means nothing.
The order of the random draws, and of the floating-point operations, is that of ../shared/golden/make_rl_data.py: the
same arguments give the same bits, and moving one draw past another changes every number after it.
"""

import argparse
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from lever_lm.selectors.pointer.model import PointerSelector

TOPICS = 24
UTILITY_DIM, VIEW_DIM = 12, 24  # what decides the reward; what the policy that collects the rollouts sees
VIEW_TEMPERATURE = 0.5
SAMPLING_TEMPERATURES = (1.0, 1.3)
NEVER = -1e9  # logit of a candidate already picked
ACCURACIES, ACCURACY_WEIGHTS = np.array([0.3, 0.6, 0.9, 1.0]), np.array([0.2, 0.25, 0.15, 0.4])  # of a right answer
REWARD_IF_RIGHT = 1 + (ACCURACIES * ACCURACY_WEIGHTS).sum()
ANSWERS = ["red", "blue", "dog", "cat", "kitchen", "1950", "tennis", "wood"]
ANSWERS += ["summer", "pizza", "train", "beach", "winter", "glass", "bus", "9"]
PRIORITY = {"beam": 4, "retrieval": 3, "sample": 2, "random": 1}  # which of two equal sets of picks is kept
UNSCORED = {"beam_rank": None, "beam_score": None, "logprob_score": None, "temperature": None}
CHUNK = 32  # queries judged at a time


def _setting(default, meaning: str):
    """A field that is a flag of the command line too."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class World:
    """Size and difficulty of a synthetic world. Raises ValueError on sizes that do not fit one another."""

    n_train: int = _setting(9009, "training examples N")
    d: int = _setting(768, "size of an embedding")
    queries: int = _setting(800, "training examples that get a group of rollouts")
    pool: int = _setting(64, "candidates K of a query")
    beams: int = _setting(5, "likeliest pairs of the collecting policy, per query")
    retrieval: int = _setting(4, "pairs by similarity to the query, nearest first")
    random: int = _setting(3, "pairs drawn evenly")
    samples_per_temp: int = _setting(2, "pairs drawn from the collecting policy at each of two temperatures")
    gain: float = _setting(5.0, "how much the demonstrations decide whether the answer is right")
    difficulty: float = _setting(1.0, "standard deviation of the queries' own difficulty, in logits")
    seed: int = _setting(0, "of every draw")

    def __post_init__(self):
        if self.queries > self.n_train:
            raise ValueError(f"{self.queries} queries of {self.n_train} examples: lower --queries or raise --n-train")
        if not 2 <= self.pool < self.n_train:
            raise ValueError(f"a pool of {self.pool}: --pool must be at least 2 and below --n-train {self.n_train}")
        if 2 * self.retrieval > self.pool:
            raise ValueError(f"{self.retrieval} pairs do not fit in a pool of {self.pool}: lower --retrieval")


class Data(NamedTuple):
    """What `generate` makes: content of the rollout file, embeddings (N, D), qids (Q,) ascending, truth (Q, K, K)."""

    content: dict
    embeddings: ndarray
    qids: ndarray
    truth: ndarray


class Unseen(NamedTuple):
    """Queries to judge by: their rows qids (n,), truth (n, K, K), pools (n, K) of rows."""

    qids: ndarray
    truth: ndarray
    pools: ndarray


# ---------------------------------------------------------------------- making


def generate(world: World = World()) -> Data:
    """Return all of a world: a rollout file's content, embeddings (N, D) float32, qids (Q,), truth (Q, K, K)
    float32."""
    rng = np.random.default_rng(world.seed)
    space = _draw_space(world, rng)
    qids = np.sort(rng.choice(world.n_train, world.queries, replace=False))
    content, truth = {}, []
    for query in qids.tolist():
        others = np.setdiff1d(np.arange(world.n_train), [query])
        pool = rng.choice(others, world.pool, replace=False)
        chance = _chance_of_right(world, space.utility, query, pool, rng)
        group = _distinct(_propose(world, space, query, pool, rng))
        answer = str(rng.choice(ANSWERS))
        answered = [{**trajectory, **_answered(trajectory, pool, chance, answer, rng)} for trajectory in group]
        content[str(query)] = {
            "query": _query(query, answer),
            "candidate_pool_ids": pool.tolist(),
            "pointer_candidates": answered,
        }
        truth.append(chance * REWARD_IF_RIGHT)
    return Data(content, space.embeddings, qids, np.array(truth, dtype=np.float32))


def write(folder: str | Path, world: World = World()) -> Data:
    """Generate a world and put rl_data.json, embeddings.pt and truth.npz into a folder, made where it is missing."""
    folder, data = Path(folder), generate(world)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rl_data.json").write_text(json.dumps(data.content), encoding="utf-8")
    np.savez_compressed(folder / "truth.npz", qids=data.qids, truth=data.truth)
    torch.save(torch.from_numpy(data.embeddings), folder / "embeddings.pt")
    return data


class _Space(NamedTuple):
    """Unit rows for every training example: embeddings (N, D) float32, utility (N, UTILITY_DIM), view (N, VIEW_DIM)."""

    embeddings: ndarray
    utility: ndarray
    view: ndarray


def _draw_space(world: World, rng: np.random.Generator) -> _Space:
    """Embeddings like CLIP's: a direction common to all, a topic, noise. Utility and view are random projections."""
    topics = _unit(rng.standard_normal((TOPICS, world.d)))
    topic = rng.integers(0, TOPICS, world.n_train)
    common = _unit(rng.standard_normal(world.d))
    noise = _unit(rng.standard_normal((world.n_train, world.d)))
    embeddings = _unit(0.8 * common + 0.35 * topics[topic] + 0.45 * noise).astype(np.float32)
    centred = embeddings - embeddings.mean(0)
    utility, view = (
        _unit(centred @ (rng.standard_normal((world.d, size)) / np.sqrt(world.d))) for size in (UTILITY_DIM, VIEW_DIM)
    )
    return _Space(embeddings, utility, view)


def _chance_of_right(world: World, utility: ndarray, query: int, pool: ndarray, rng: np.random.Generator) -> ndarray:
    """Probability (K, K) that the answer after each ordered pair is right: useful demonstrations help, the second pick
    more than the first, and two that are alike help less."""
    useful = utility[pool] @ utility[query]
    hardness = rng.standard_normal() * world.difficulty
    # Not `rows @ rows.T`: numpy has another routine for a matrix and its own transpose, which rounds otherwise.
    alike = utility[pool] @ utility[pool].T
    logit = world.gain * (0.45 * useful[:, None] + 0.65 * useful[None, :] - 0.1 * alike) - hardness - 0.2
    return 1 / (1 + np.exp(-logit))


def _query(row: int, answer: str) -> dict:
    """The query of an entry; its ten annotators agree."""
    return {
        "query_id": row,
        "question_id": 100_000 + row,
        "image_id": 500_000 + row,
        "question": "what is shown here?",
        "gt_answers_raw": [answer] * 10,
        "gt_answers_norm": [answer] * 10,
    }


# ---------------------------------------------------------------------- proposing


def _propose(world: World, space: _Space, query: int, pool: ndarray, rng: np.random.Generator) -> list[dict]:
    """Return the trajectories of one group, repeats among them: beams, samples, retrieval, random."""
    logits = space.view[pool] @ space.view[query] / VIEW_TEMPERATURE
    similarity = space.embeddings[pool] @ space.embeddings[query]
    samples = [
        _sample(logits / temperature, temperature, rng)
        for temperature in SAMPLING_TEMPERATURES
        for _ in range(world.samples_per_temp)
    ]
    random = [rng.choice(world.pool, 2, replace=False).tolist() for _ in range(world.random)]
    return [
        *_beams(logits, world.beams),
        *samples,
        *_retrieve(similarity, world.retrieval),
        *({"pointer": picks, "gen_method": "random", **UNSCORED} for picks in random),
    ]


def _beams(logits: ndarray, count: int) -> list[dict]:
    """The likeliest ordered pairs under a policy whose logits (K,) no pick changes."""
    size = len(logits)
    first = np.log(_softmax(logits))
    second = np.log(_softmax(np.where(np.eye(size, dtype=bool), NEVER, logits)) + 1e-30)
    both = first[:, None] + second
    beams = []
    for rank, best in enumerate(np.argsort(-both, axis=None)[:count]):
        i, j = divmod(int(best), size)
        scores = {
            "beam_rank": rank,
            "beam_score": float(np.exp(first[i]) + np.exp(both[i, j] - first[i])),
            "logprob_score": float(both[i, j]),
        }
        beams.append({"pointer": [i, j], "gen_method": "beam", **UNSCORED, **scores})
    return beams


def _sample(logits: ndarray, temperature: float, rng: np.random.Generator) -> dict:
    """Two different picks drawn one after the other; logits (K,) are already divided by the temperature."""
    size = len(logits)
    first = _softmax(logits)
    i = int(rng.choice(size, p=first))
    second = _softmax(np.where(np.arange(size) == i, NEVER, logits))
    j = int(rng.choice(size, p=second))
    scores = {"logprob_score": float(np.log(first[i]) + np.log(second[j])), "temperature": temperature}
    return {"pointer": [i, j], "gen_method": "sample", **UNSCORED, **scores}


def _retrieve(similarity: ndarray, count: int) -> list[dict]:
    """The candidates two by two in order of similarity (K,) to the query: first and second, third and fourth, …"""
    pairs = np.argsort(-similarity)[: 2 * count].reshape(count, 2)
    means = [float((similarity[i] + similarity[j]) / 2) for i, j in pairs]
    return [
        {"pointer": pair, "gen_method": "retrieval", "similarity_score": mean, **UNSCORED}
        for pair, mean in zip(pairs.tolist(), means, strict=True)
    ]


def _distinct(trajectories: list[dict]) -> list[dict]:
    """Return one trajectory for each set of picks, where the set first stood: that of the highest priority, else the
    first."""
    kept: dict[frozenset[int], dict] = {}
    for trajectory in trajectories:
        rival = kept.setdefault(frozenset(trajectory["pointer"]), trajectory)
        if PRIORITY[trajectory["gen_method"]] > PRIORITY[rival["gen_method"]]:
            kept[frozenset(trajectory["pointer"])] = trajectory
    return list(kept.values())


# ---------------------------------------------------------------------- answering


def _answered(trajectory: dict, pool: ndarray, chance: ndarray, answer: str, rng: np.random.Generator) -> dict:
    """Return what the answer of the model after this trajectory adds to it; chance (K, K) of a right answer."""
    i, j = trajectory["pointer"]
    right = int(rng.random() < chance[i, j])
    if right:
        accuracy, said, relevance = float(rng.choice(ACCURACIES, p=ACCURACY_WEIGHTS)), answer, 1.0
    else:
        said = str(rng.choice([word for word in ANSWERS if word != answer]))
        accuracy, relevance = 0.0, float(np.round(rng.random() * 0.4, 4))
    return {
        "pointer_global": [int(pool[i]), int(pool[j])],
        "vqa_raw_generation": said,
        "vqa_pred_answer": said,
        "vqa_correct": right,
        "vqa_acc_score": accuracy,
        "vqa_gt_prob": float(np.clip(chance[i, j] + rng.normal() * 0.1, 0, 1)),
        "vqa_rel_token_f1": float(right),
        "vqa_rel_edit_sim": relevance,
        "vqa_rel_score": relevance,
        "vqa_eval_mode": "vqaEval",
        "eval_split_used": "train",
        "eval_failed": False,
    }


def _unit(rows: ndarray) -> ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _softmax(logits: ndarray) -> ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


# ---------------------------------------------------------------------- judging


def unseen(world: World, data: Data, count: int = 1000) -> Unseen:
    """Return more queries of a world that was generated, none of them among its own: neither trained nor selected on,
    only judged. They may stand in the pools of the world's queries, as demonstrations.

    Raises ValueError where fewer than `count` examples are left.
    """
    rng = np.random.default_rng([world.seed, 1])
    left = np.setdiff1d(np.arange(world.n_train), data.qids)
    if count > len(left):
        raise ValueError(f"{count} more queries: only {len(left)} of the {world.n_train} examples are left")
    space = _draw_space(world, np.random.default_rng(world.seed))
    qids = np.sort(rng.choice(left, count, replace=False))
    pools, truth = [], []
    for query in qids.tolist():
        pools.append(rng.choice(np.setdiff1d(np.arange(world.n_train), [query]), world.pool, replace=False))
        truth.append(_chance_of_right(world, space.utility, query, pools[-1], rng) * REWARD_IF_RIGHT)
    return Unseen(qids, np.array(truth, dtype=np.float32), np.array(pools))


@torch.no_grad()
def true_rewards(
    policy: PointerSelector, queries: Tensor, candidates: Tensor, truth: ndarray | Tensor
) -> tuple[float, float]:
    """Return the mean true reward of the policy that samples at temperature 1, exact over all K (K − 1) ordered pairs;
    and of its greedy picks, as inference takes them.

    queries (n, D), candidates (n, K, D), truth (n, K, K). Raises ValueError on a policy in training mode.
    """
    if policy.training:
        raise ValueError("the policy is in training mode, where dropout changes its picks: call policy.eval() first")
    size = candidates.shape[1]
    firsts = torch.stack([torch.arange(size), torch.full((size,), -1)], -1)  # every first pick, and what may follow it
    rewards = torch.as_tensor(truth).to(candidates)
    expected = greedy = 0.0
    for query, pool, reward in zip(*(rows.split(CHUNK) for rows in (queries, candidates, rewards)), strict=True):
        steps = policy.steps(query, pool, firsts.to(pool.device).expand(len(query), -1, -1))
        first, second = (step.expand(-1, size, -1)[..., :size].double().softmax(-1) for step in steps)
        # All rows of `first` are alike; after pick i the chance of picking i again is exp(−100), the rest of the row.
        expected += float((first[:, 0, :, None] * second * reward).sum())
        places, best = torch.arange(len(query)), first[:, 0].argmax(-1)
        greedy += float(reward[places, best, second[places, best].argmax(-1)].double().sum())
    return expected / len(queries), greedy / len(queries)


def _ordered_pairs(size: int) -> Tensor:
    """All (i, j) with i ≠ j below a size: (size (size − 1), 2) long."""
    pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    return pairs[pairs[:, 0] != pairs[:, 1]]


# ---------------------------------------------------------------------- command line


def summary(data: Data) -> dict:
    """Return how a world turned out: counts, share of right answers, mean true reward of a random and of the best
    pair."""
    right = [t["vqa_correct"] for entry in data.content.values() for t in entry["pointer_candidates"]]
    pairs = _ordered_pairs(data.truth.shape[-1])
    rewards = data.truth[:, pairs[:, 0], pairs[:, 1]].astype(np.float64)
    means = {"right": np.mean(right), "random_pair": rewards.mean(), "best_pair": rewards.max(1).mean()}
    return {"queries": len(rewards), "rollouts": len(right), **{name: round(float(x), 4) for name, x in means.items()}}


def main() -> None:
    """Parse, write, print what was made."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to", default=argparse.SUPPRESS)
    for one in fields(World):
        flag = "--" + one.name.replace("_", "-")
        parser.add_argument(flag, type=type(one.default), default=one.default, help=one.metadata["help"])
    arguments = vars(parser.parse_args())
    folder = arguments.pop("out")
    try:
        world = World(**arguments)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(summary(write(folder, world))))


if __name__ == "__main__":
    main()
