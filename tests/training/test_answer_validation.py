"""Validation by answers: whose picks are answered, and how often."""

import dataclasses

import torch

from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.tasks import TASKS
from lever_lm.training.answer_validation import answer_accuracy, validation_calls
from lever_lm.training.finite_checks import At
from lever_lm.training.rollouts.propose import new_policy
from lever_lm.training.warmup import MatchGroups, match_hint


class Copies:
    """An LVLM that answers with the answer of the first demonstration that it is given."""

    def answer(self, prompts, what=""):
        self.prompts = prompts
        torch.rand(3)  # as where a model is loaded
        return [prompt.icds[-1].answer for prompt in prompts]


def test_at_most_200_queries_are_answered(digits_config, digits, digits_features):
    config = dataclasses.replace(digits_config, validate_on="answers")
    groups, lvlm = MatchGroups(config, digits, digits_features).all(list(range(210)), 0), Copies()
    policy: PointerSelector = new_policy(config, groups.icds.shape[1])
    before = torch.get_rng_state()
    found = answer_accuracy(config, digits, groups, lvlm)(policy, At("rce", 1))
    assert torch.equal(before, torch.get_rng_state())
    assert [prompt.query for prompt in lvlm.prompts] == list(digits.train_examples[:200])
    assert {len(prompt.icds) for prompt in lvlm.prompts} == {2}
    assert 0 < found["val_accuracy"] < 1
    assert validation_calls(config, 210) == (config.rce.epochs + config.grpo.epochs) * 200
    assert validation_calls(config, 7) == (config.rce.epochs + config.grpo.epochs) * 7
    assert validation_calls(digits_config, 210) == 0


def test_the_option_is_named_where_half_of_the_queries_have_a_match(digits_config, digits, digits_features):
    train = digits.train_examples
    groups = MatchGroups(digits_config, digits, digits_features).all(list(range(40)), 0)
    matched = groups.only((groups.rewards > 0).any(-1)).only(torch.arange(40) < 10)
    one = matched.rewards.argmax(-1)  # a right candidate of each
    wrong = torch.tensor(
        [
            next(r for r, shown in enumerate(train) if not TASKS["vqa"].score(shown.answer, train[q]))
            for q in matched.rows
        ]
    )
    right = matched.pools.gather(1, one[:, None])
    option = "--set warmup=match learns from these before GRPO, and asks the LVLM nothing"
    for count, named in ((10, True), (5, True), (4, False), (0, False)):
        pools = torch.cat([wrong[:, None], torch.where(torch.arange(10) < count, right[:, 0], wrong)[:, None]], 1)
        said = match_hint(dataclasses.replace(matched, pools=pools, pool_mask=None), digits)
        told = (
            f"matches: {count * 10}% of the training queries have one in their pool, {float(count > 0):.1f} on average"
        )
        assert said == (f"{told}: {option}" if named else told)
