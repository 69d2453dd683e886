"""MMICES, MMR, DPP and MUIER against slow, literal transcriptions of their formulas."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from lever_lm.data.embeddings import Embeddings
from lever_lm.data.example import Example
from lever_lm.selectors import diverse, mmices, select
from lever_lm.selectors.problem import Problem
from lever_lm.tasks import TASKS

CASES = 200


def unit(rng, count, size):
    rows = torch.from_numpy(rng.standard_normal((count, size))).float()
    return torch.nn.functional.normalize(rows, dim=-1)


def random_problem(seed):
    """A problem of random features: some training examples show the image of a query."""
    rng = np.random.default_rng(seed)
    queries, train, size = 4, int(rng.integers(5, 40)), int(rng.integers(2, 9))
    examples = [Example(i, i, f"q{i}", ("a",), ("a",), f"{i}") for i in range(train)]
    asked = [Example(1000 + i, i, f"q{i}", ("a",), ("a",), f"query{i}") for i in range(queries)]
    for example in (*examples, *asked):
        example.__dict__["content"] = example.image
    embeddings = tuple(Embeddings(unit(rng, n, size), unit(rng, n, size)) for n in (queries, train))
    features = tuple(each.combine(frozenset({"img", "text"})) for each in embeddings)
    return Problem(asked, examples, embeddings, features, [list(range(train))] * queries, seed, TASKS["vqa"])


def cos(a, b):
    return sum(x * y for x, y in zip(a.double().tolist(), b.double().tolist(), strict=True))


def allowed(problem, row):
    return [i for i in range(len(problem.train)) if i != row]  # query i shows the image of example i


def ranked(scores):
    """Rows by falling score."""
    return sorted(scores, key=lambda row: -scores[row])


def of_muier(problem, row, shots):
    (ours, theirs) = problem.embeddings
    return ranked(
        {d: cos(ours.image[row], theirs.image[d]) + cos(ours.image[row], theirs.text[d]) for d in allowed(problem, row)}
    )[:shots]


def of_mmices(by):
    def picks(problem, row, shots):
        (ours, theirs) = problem.embeddings
        near = ranked({d: cos(ours.image[row], theirs.image[d]) for d in allowed(problem, row)})[: mmices.NEAR]
        second = theirs.text if by == "text" else theirs.image
        return ranked({d: cos(ours.text[row], second[d]) for d in near})[:shots]

    return picks


def of_mmr(problem, row, shots):
    queries, icds = problem.features
    picks = []
    while len(picks) < min(shots, len(allowed(problem, row))):
        left = [d for d in allowed(problem, row) if d not in picks]
        scores = {
            d: 0.5 * cos(queries[row], icds[d]) - 0.5 * max((cos(icds[s], icds[d]) for s in picks), default=0.0)
            for d in left
        }
        picks.append(ranked(scores)[0])
    return picks


def of_dpp(problem, row, shots):
    queries, icds = problem.features
    rho = {d: (1 + cos(queries[row], icds[d])) / 2 for d in allowed(problem, row)}
    near = ranked(rho)[: diverse.DPP_NEAR]
    r = {d: math.exp((rho[d] - max(rho.values())) / (2 * 0.1)) for d in near}
    kernel = {(i, j): r[i] * (1 + cos(icds[i], icds[j])) / 2 * r[j] for i in near for j in near}
    picks = []
    while len(picks) < min(shots, len(near)):
        det = {
            d: np.linalg.det(np.array([[kernel[i, j] for j in (*picks, d)] for i in (*picks, d)]))
            for d in near
            if d not in picks
        }
        picks.append(ranked(det)[0])
    return picks


@pytest.mark.parametrize(
    ("name", "literal", "near"),
    [
        ("muier", of_muier, None),
        ("mmices", of_mmices("text"), 7),
        ("mmices_image", of_mmices("image"), 7),
        ("mmr", of_mmr, None),
        ("dpp", of_dpp, 12),
    ],
)
def test_a_selector_picks_what_its_formula_says(monkeypatch, name, literal, near):
    if near:  # the reranked part, so small that it cuts
        monkeypatch.setattr(mmices, "NEAR", near)
        monkeypatch.setattr(diverse, "DPP_NEAR", near)
    for seed in range(CASES // 4):
        problem = random_problem(seed)
        expected = [literal(problem, row, 3) for row in range(len(problem.queries))]
        assert select(name, problem, 3) == expected, f"seed {seed}"


def test_the_greedy_map_is_the_best_next_item_and_near_the_best_set():
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(CASES):
        size, count = int(rng.integers(2, 8)), int(rng.integers(1, 4))
        vectors = rng.standard_normal((size, 10))
        kernel = vectors @ vectors.T
        picks = diverse.greedy_map(torch.from_numpy(kernel)[None], count)[0].tolist()
        for step in range(len(picks)):
            dets = {
                i: np.linalg.det(kernel[np.ix_([*picks[:step], i], [*picks[:step], i])])
                for i in range(size)
                if i not in picks[:step]
            }
            assert dets[picks[step]] == pytest.approx(max(dets.values()), rel=1e-6)
        best = max(np.linalg.det(kernel[np.ix_(s, s)]) for s in itertools.combinations(range(size), len(picks)))
        ratios.append(np.linalg.det(kernel[np.ix_(picks, picks)]) / best)
    assert min(ratios) > 0.1
    assert np.mean(ratios) > 0.95


def test_items_that_add_nothing_to_the_determinant_come_last():
    kernel = torch.tensor(
        [[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.5]], [[2.0, 0, 0], [0, 4.0, 0], [0, 0, 3.0]]]
    )
    assert diverse.greedy_map(kernel, 3).tolist() == [[0, 2, 1], [1, 2, 0]]
    assert diverse.greedy_map(kernel, 9).tolist() == [[0, 2, 1], [1, 2, 0]]


@pytest.mark.parametrize("name", ["muier", "mmices", "mmices_image", "mmr", "dpp"])
def test_fewer_shots_show_the_first_of_more_shots(name):
    problem = random_problem(random.Random(1).randrange(100))
    assert select(name, problem, 1) == [chosen[:1] for chosen in select(name, problem, 4)]
