"""policy.candidate_features: the numbers against literal transcriptions, and one policy with them from end to end."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from helpers import RUN

from lever_lm.config.schema import PolicyConfig
from lever_lm.data import Example
from lever_lm.data.embeddings import Embeddings
from lever_lm.evaluation.retriever import Retriever
from lever_lm.selectors.candidate_features import (
    CANDIDATE_FEATURES,
    NEIGHBOURS,
    Labelled,
    candidate_columns,
)
from lever_lm.selectors.learned import choose
from lever_lm.selectors.pointer.checkpoint import load_policy, own_config, read_checkpoint
from lever_lm.tasks import TASKS
from lever_lm.training.rollouts.propose import new_policy
from lever_lm.training.warmup import MatchGroups
from lever_lm.utils.errors import LeverError

BOTH = ("--set", "policy.candidate_features=[agreement, consistency]")


def example(number, answers, image=None):
    """An example whose image is its own, or that of the number `image`."""
    image = number if image is None else image
    made = Example(number, image, "what?", tuple(answers), tuple(answers), f"{image}.jpg")
    made.__dict__["content"] = f"{image}.jpg"
    return made


def labelled(*examples, seed=0):
    torch.manual_seed(seed)
    image, text = (torch.nn.functional.normalize(torch.randn(len(examples), 6), dim=-1) for _ in range(2))
    return Labelled(examples, Embeddings(image, text), TASKS["vqa"])


def test_agreement_is_the_share_that_gave_the_shown_answer_however_it_is_written():
    made = labelled(
        example(1, ["Two", "two", "2", "three"]),  # shown: Two
        example(2, ["five", "nine"]),  # of equals the first
        example(3, ["", " "]),
        example(4, ["a dog"] * 3),
    )
    assert CANDIDATE_FEATURES["agreement"](made) == [0.75, 0.5, 0.0, 1.0]
    assert candidate_columns(["agreement"], made).flatten().tolist() == [0.5, 0.0, -1.0, 1.0], "2x - 1"


def test_consistency_is_the_mean_score_for_the_nearest_examples_of_other_images():
    rng = random.Random(0)
    answers = [[rng.choice(["one", "two", "three"]) for _ in range(10)] for _ in range(40)]
    made = labelled(*(example(number, given, image=number % 15) for number, given in enumerate(answers)))
    image, text = made.embeddings.image.double(), made.embeddings.text.double()
    likeness, expected = (image @ image.T + text @ text.T).tolist(), []
    for row, one in enumerate(made.train):
        others = [i for i, other in enumerate(made.train) if other.image_id != one.image_id]
        near = sorted(others, key=lambda i: -likeness[row][i])[:NEIGHBOURS]
        expected.append(np.mean([TASKS["vqa"].score(one.answer, made.train[i]) for i in near]))
    assert NEIGHBOURS == 10
    assert CANDIDATE_FEATURES["consistency"](made) == pytest.approx(expected)
    assert len({round(value, 6) for value in expected}) > 5


def test_what_the_data_lack_is_said_with_the_option():
    with pytest.raises(LeverError, match=r"policy\.candidate_features.*1 of 2 examples, the first question 5"):
        CANDIDATE_FEATURES["agreement"](labelled(example(4, ["a"] * 2), example(5, ["a"])))
    with pytest.raises(LeverError, match=r"policy\.candidate_features: consistency .* there are none"):
        CANDIDATE_FEATURES["consistency"](labelled(example(4, ["a"]), example(5, ["a"], image=4)))


# ---------------------------------------------------------------------- in the policy


@pytest.mark.parametrize("shape", [{}, {"hidden_dim": 32}, {"num_layers": 0}, {"state_update": "gru", "stop": True}])
def test_an_untrained_policy_chooses_as_the_one_without_them(digits_config, shape):
    changed = {name: value for name, value in shape.items() if name == "num_layers"}
    policy = {name: value for name, value in shape.items() if name != "num_layers"}
    config = dataclasses.replace(digits_config, policy=dataclasses.replace(digits_config.policy, **policy))
    plain, wide = (new_policy(config, 64, columns, **changed).eval() for columns in (0, 2))
    query, candidates = torch.randn(3, 64), torch.randn(3, 9, 64)
    columns = torch.rand(3, 9, 2)
    picks = plain.select(query, candidates, 4)
    seen = torch.nn.functional.pad(query, (0, 2)), torch.cat([candidates, columns], -1)
    torch.testing.assert_close(wide.logits(*seen, picks), plain.logits(query, candidates, picks))
    with torch.no_grad():
        wide.input_proj.weight[:, 64:] += 1
    assert not torch.allclose(wide.logits(*seen, picks), plain.logits(query, candidates, picks))


def test_a_hidden_size_without_room_for_them_is_refused(digits_config):
    config = dataclasses.replace(digits_config, policy=PolicyConfig(hidden_dim=66))
    with pytest.raises(LeverError, match="hidden_dim 66 is the size of the features with 2 candidate_features"):
        new_policy(config, 64, 2)


def test_what_a_warm_up_learns_from_has_the_columns_and_zeros_for_the_query(digits, digits_config, digits_features):
    columns = torch.rand(len(digits.train_examples), 2)
    features = dataclasses.replace(digits_features, columns=columns)
    groups = MatchGroups(digits_config, digits, features).draw([0, 1, 2, 3], 0)
    plain = digits_features.icds(digits_config.features)
    assert torch.equal(groups.icds, torch.cat([plain, columns], 1))
    assert groups.queries.shape == groups.icds.shape
    assert not groups.queries[:, -2:].any()
    similarity = groups.queries @ groups.icds.T
    assert torch.allclose(similarity, digits_features.queries("train", digits_config.features) @ plain.T, atol=1e-6)


def test_a_policy_keeps_them_from_training_to_what_is_shared(digits_folder, lever, digits):
    small = ("--limit", "24", "--rce-epochs", "2", "--grpo-epochs", "2")
    assert lever("train", *small).status == 0
    rollouts = next(digits_folder.rglob("rl_data_*.json")).read_bytes()
    trained = lever("train", *small, *BOTH, "--run-name", "told", "--json")
    assert trained.status == 0, trained.err
    run = RUN.with_name("told")
    assert all(path.read_bytes() == rollouts for path in digits_folder.rglob("rl_data_*.json")), "the same proposals"
    assert trained.json["converted"] is None
    assert "v2 cannot express a policy with policy.candidate_features=['agreement', 'consistency']" in trained.err

    checkpoint = trained.json["recommended"]["checkpoint"]
    assert own_config(read_checkpoint(checkpoint))["candidate_features"] == ["agreement", "consistency"]
    policy = load_policy(checkpoint)
    assert policy.d_model == 66
    assert policy.input_proj.weight[:, 64:].abs().sum() > 0, "they have been learnt from"

    ask = ("infer", "--run-name", "told", "--limit", "12", "--shots", "2")
    told = lever(*ask, "--json")
    assert told.status == 0, told.err
    refused = lever(*ask, "--set", "policy.candidate_features=[]")
    assert refused.status == 1
    assert "policy.candidate_features=['agreement', 'consistency'] and would be given []" in refused.err
    refused = lever("infer", "--limit", "12", "--shots", "1", *BOTH)
    assert (refused.status, "policy.candidate_features=[] and would be given" in refused.err) == (1, True)
    assert lever("train", *small, "--run-name", "told").status == 1, "another config than the run's"

    assert lever("export", run, "shared").status == 0
    shared = json.loads((digits_folder / "shared/config.json").read_text())
    assert shared["candidate_features"] == shared["setting"]["policy"]["candidate_features"]
    here, there = Retriever(run), Retriever("shared", dataset="digits", lvlm="tiny_qwen2.5_vl")
    queries = digits.val_examples[:12]
    picks = [[pick.example.question_id for pick in row] for row in here.pick(queries, shots=2)]
    assert picks == [[pick.example.question_id for pick in row] for row in there.pick(queries, shots=2)]
    of_one = choose(here.policy, here._problem([queries[0]]), 2)[0][0]
    assert [here.examples[row].question_id for row in of_one] == picks[0]

    own = [(example.image, example.question, example.answer) for example in digits.train_examples[:30]]
    with pytest.raises(LeverError, match=r"policy\.candidate_features: agreement .* 30 of 30 examples"):
        Retriever("shared", examples=own).pick(queries[0])


def test_single_answers_are_enough_for_consistency(digits_folder, lever, digits):
    told = ("--set", "policy.candidate_features=[consistency]")
    assert lever("train", "--limit", "24", "--rce-epochs", "1", "--grpo-epochs", "0", *told).status == 0
    own = [(example.image, example.question, example.answer) for example in digits.train_examples[:30]]
    retriever = Retriever(RUN, examples=own)
    assert len(retriever.pick(digits.val_examples[0], shots=2)) == 2
    assert retriever._columns.shape == (30, 1)


def test_names_and_features_that_cannot_have_them_are_refused(digits_folder, lever):
    for names, found in (("[x]", "'x'"), ("[agreement, agreement]", "'agreement'")):
        refused = lever("train", "--set", f"policy.candidate_features={names}")
        assert refused.status == 2
        assert f"policy.candidate_features names {found}: each of agreement, consistency at most once" in refused.err
    torch.save(torch.randn(9, 4), "own.pth")
    (digits_folder / "rl.json").write_text("{}")
    refused = lever("train", "--rl-data", "rl.json", "--embeddings", "own.pth", *BOTH)
    assert refused.status == 2
    assert "policy.candidate_features (agreement, consistency) tells of examples of the dataset" in refused.err
