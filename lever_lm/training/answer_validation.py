"""Validation by answers (validate_on=answers): what the LVLM answers after the policy's own picks for held-out queries.

B queries in a batch, K candidates, S shots.
"""

import torch

from lever_lm.config.schema import Config
from lever_lm.data import VqaData
from lever_lm.lvlm import CachedLvlm, build_prompt
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.tasks import task_of
from lever_lm.training.batches import EVAL_BATCH, GroupTensors
from lever_lm.training.finite_checks import At
from lever_lm.training.metrics import MEASURED
from lever_lm.training.validation import Validate

MOST = 200  # held-out queries that are answered after each epoch


def validation_calls(config: Config, queries: int) -> int:
    """Return how many prompts a run of all its epochs puts to the LVLM for validation, of `queries` held-out ones."""
    epochs = config.rce.epochs + config.grpo.epochs
    return epochs * min(MOST, queries) if config.validate_on == "answers" else 0


def answer_accuracy(config: Config, data: VqaData, val: GroupTensors, lvlm: CachedLvlm) -> Validate:
    """Return the function that measures a policy: val_accuracy, the mean score of the LVLM's answers to the first MOST
    validation queries after rollout.shots greedy picks from their pools. It draws nothing."""
    train, task, shots = data.train_examples, task_of(data), config.rollout.shots
    val = val.only(torch.arange(len(val), device=val.rows.device) < MOST)

    @torch.no_grad()
    def accuracy(policy: PointerSelector, at: At) -> dict[str, float]:
        policy.eval()
        picks = torch.cat(
            [
                policy.select(batch.query, batch.candidates, shots, batch.pool_mask)  # (B, S)
                for _, batch in val.chunks(EVAL_BATCH)
            ]
        )
        prompts = [
            build_prompt([train[pool[place]] for place in places if place >= 0], train[row], config.prompt)
            for row, places, pool in zip(val.query_ids, picks.tolist(), val.pools.tolist(), strict=True)
        ]
        with torch.random.fork_rng():  # loading a model may draw, and a run that goes on loads it elsewhere
            answers = lvlm.answer(prompts, "validation")
        scores = [task.score(answer, prompt.query) for answer, prompt in zip(answers, prompts, strict=True)]
        return {MEASURED: sum(scores) / len(scores)}

    return accuracy
