"""The table of selectors: what every baseline shows, the greedy picks of a policy, and how sure it was of them."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from lever_lm.evaluation.evaluate import problem_of
from lever_lm.selectors import BASELINES, CONTRASTS, LEARNED, RIVALS, SELECTORS, SIMPLE, Selector, named, select
from lever_lm.selectors.learned import choose
from lever_lm.selectors.pointer.checkpoint import load_policy, save_torch, to_v2, v3_content
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.tasks import TASKS
from lever_lm.tasks.vqa_metrics import vqa_accuracy
from lever_lm.training.rollouts.propose import new_policy
from lever_lm.utils.errors import LeverError

QUERIES = 40


def first_queries(config, digits, features, train=None, queries=None):
    """The problem of the first evaluation questions, over the training split or another one."""
    embeddings = (features.val.take(slice(QUERIES)), features.train)
    return problem_of(
        config, (queries or digits.val_examples)[:QUERIES], train or digits.train_examples, TASKS["vqa"], embeddings
    )


@pytest.fixture(scope="module")
def problem(digits_config, digits, digits_features):
    return first_queries(digits_config, digits, digits_features)


@pytest.fixture(scope="module")
def ragged(problem):
    """The problem with pools of 256 and of 9 candidates in turn."""
    return dataclasses.replace(problem, pools=[p if i % 2 else p[:9] for i, p in enumerate(problem.pools)])


@pytest.fixture(scope="module")
def policy(digits_config):
    return new_policy(dataclasses.replace(digits_config, seed=3), 64).eval()


# ---------------------------------------------------------------------- the table


def test_every_name_that_is_singled_out_is_in_the_table():
    assert {*BASELINES, *LEARNED, *CONTRASTS, *RIVALS, *SIMPLE} <= SELECTORS.keys()
    assert all((one.select is None) == (one.kind in ("learnt", "file")) for one in SELECTORS.values())
    assert (named("img_text_sim"), named("theirs")) == ("image and text similarity", "theirs")


@pytest.mark.parametrize("rows", [[[3, 3]], "leak"], ids=["twice", "own image"])
def test_a_selector_that_repeats_or_leaks_is_found_out(problem, monkeypatch, rows):
    first = problem.queries[0]
    if rows == "leak":
        twin = dataclasses.replace(problem.train[7], image_id=first.image_id)
        problem = dataclasses.replace(problem, train=(*problem.train[:7], twin, *problem.train[8:]))
        rows = [[7]]
    monkeypatch.setitem(SELECTORS, "new", Selector("new", lambda problem, shots: iter(rows)))
    with pytest.raises(ValueError, match=f"new .* question {first.question_id}"):
        select("new", problem, 2)


# ---------------------------------------------------------------------- baselines


@pytest.mark.parametrize(
    ("name", "parts"), [("text_sim", ["text"]), ("img_sim", ["image"]), ("img_text_sim", ["image", "text"])]
)
def test_a_similarity_baseline_is_brute_force_over_the_whole_training_split(problem, name, parts):
    queries, train = problem.embeddings
    for row, (query, chosen) in enumerate(zip(problem.queries, select(name, problem, 4), strict=True)):
        scores = sum(getattr(train, part) @ getattr(queries, part)[row] for part in parts).tolist()
        allowed = [i for i, example in enumerate(problem.train) if example.image_id != query.image_id]
        best = sorted((scores[i] for i in allowed), reverse=True)[:4]
        # Repeated questions tie, so the scores are compared and not the rows.
        assert [scores[i] for i in chosen] == pytest.approx(best, abs=1e-5)


def test_random_draws_from_the_whole_training_split_by_the_querys_seed_alone(problem):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    picks = select("random", problem, 4)
    drawn = [i for chosen in picks for i in chosen]
    assert len(set(drawn)) > 0.9 * len(drawn)
    assert min(drawn) < 250
    assert max(drawn) > len(problem.train) - 250
    assert select("random", problem, 4) == picks
    embeddings = (problem.embeddings[0].take(slice(5, 9)), problem.embeddings[1])
    fewer = dataclasses.replace(problem, queries=problem.queries[5:9], pools=problem.pools[5:9], embeddings=embeddings)
    assert select("random", fewer, 4) == picks[5:9]


@pytest.mark.parametrize("renumbered", [False, True])
def test_no_baseline_shows_the_querys_own_image_even_where_it_is_a_training_image(
    digits_config, digits, digits_features, renumbered
):
    asked = digits.train_examples[:QUERIES]
    if renumbered:
        asked = tuple(dataclasses.replace(e, question_id=10**6 + i, image_id=10**6 + i) for i, e in enumerate(asked))
    features = dataclasses.replace(digits_features, val=digits_features.train)
    problem = first_queries(digits_config, digits, features, queries=asked)
    for name in BASELINES:
        for query, chosen in zip(problem.queries, select(name, problem, 4), strict=True):
            assert query.image not in {digits.train_examples[i].image for i in chosen}, name


def test_the_oracle_ranks_the_pool_by_the_accuracy_of_its_own_answers(problem):
    right, similar, rows = (
        0,
        sum(a @ b.T for a, b in zip(*map(vars_of, problem.embeddings), strict=True)),
        range(QUERIES),
    )
    for row, query, pool, chosen in zip(
        rows, problem.queries, problem.pools, select("oracle", problem, 4), strict=True
    ):
        assert set(chosen) <= set(pool)
        answers = {i: problem.train[i].answer for i in pool}
        scores = {i: vqa_accuracy(answer, query.answers, always_normalize=True) for i, answer in answers.items()}
        assert [scores[i] for i in chosen] == sorted(scores.values(), reverse=True)[:4]
        equals = [similar[row, i].item() for i in chosen if scores[i] == scores[chosen[0]]]
        assert equals == pytest.approx(sorted(equals, reverse=True), abs=1e-5)
        right += scores[chosen[0]] > 0
    assert right > 0.9 * QUERIES


def vars_of(embeddings):
    return embeddings.image, embeddings.text


@pytest.mark.parametrize("name", BASELINES)
def test_fewer_shots_show_the_first_of_more_shots(problem, name):
    one, four = select(name, problem, 1), select(name, problem, 4)
    assert one == [chosen[:1] for chosen in four]
    assert {len(chosen) for chosen in four} == {0 if name == "zero_shot" else 4}


# ---------------------------------------------------------------------- a policy's choices


def test_choices_are_the_greedy_picks_of_each_query_alone_whatever_the_other_pools(ragged, policy):
    queries, icds = ragged.features
    alone = []
    for query, pool in zip(queries, ragged.pools, strict=True):
        picked = policy.select(query[None], icds[pool][None], 3)[0].tolist()
        alone.append([pool[i] for i in picked])
    assert choose(policy, ragged, 3)[0] == alone
    assert choose(policy, ragged, 1)[0] == [chosen[:1] for chosen in alone]


def test_large_pools_are_looked_at_a_few_queries_at_a_time_and_the_picks_are_the_same(problem, policy, monkeypatch):
    every, sizes, select_ = choose(policy, problem, 3)[0], [], policy.select
    monkeypatch.setattr("lever_lm.selectors.learned._CANDIDATES", 3 * 256 + 1)
    monkeypatch.setattr(policy, "select", lambda q, c, *rest: sizes.append(c.shape[:2]) or select_(q, c, *rest))
    assert choose(policy, problem, 3)[0] == every
    assert set(sizes) == {(3, 256), (QUERIES % 3, 256)}


def test_more_shots_than_the_pool_holds_and_features_of_another_width_are_refused(problem, policy):
    with pytest.raises(LeverError, match=r"257 shots .*--shots.*infer\.pool_size"):
        choose(policy, problem, 257)
    with pytest.raises(LeverError, match="96 dimensions, these have 64"):
        choose(PointerSelector(d_model=96, hidden_dim=32), problem, 1)


@pytest.mark.parametrize("stop", [False, True])
def test_how_sure_the_policy_was_is_what_its_log_prob_says(ragged, stop):
    torch.manual_seed(0)
    policy = PointerSelector(d_model=64, hidden_dim=32, state_update="gru", stop=stop).eval().requires_grad_(False)
    picks, reasons = choose(policy, ragged, 3)
    queries, icds = ragged.features
    for query, pool, chosen, why in zip(queries, ragged.pools, picks, reasons, strict=True):
        places = torch.tensor([[[pool.index(icd) for icd in chosen]]])
        one = query[None], icds[pool][None]
        expected = policy.log_prob(*one, places).exp().item()
        assert np.prod(why["probabilities"]) == pytest.approx(expected, rel=1e-3, abs=1e-5)
        best = policy.steps(*one, places)[0][0, 0, : len(pool)].topk(8).indices.tolist()
        assert [icd for icd, _ in why["considered"]] == [ragged.train[pool[place]].question_id for place in best]
        assert why["considered"][0][1] == why["probabilities"][0]


def test_both_formats_of_a_checkpoint_pick_the_same(tmp_path, problem, policy):
    content = v3_content(policy, epoch=0, phase="grpo", kl_beta=0.1, metrics={}, config={})
    save_torch(tmp_path / "a.pt", content)
    save_torch(tmp_path / "a_v2format.ckpt", to_v2(content, tmp_path / "a.pt")[0])
    for path in tmp_path.iterdir():
        assert choose(load_policy(path), problem, 5) == choose(policy, problem, 5)
