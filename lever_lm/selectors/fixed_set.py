"""The same demonstrations for every query: those whose presence in logged rollouts raised the reward most."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from lever_lm.data import Example
from lever_lm.selectors.problem import Problem
from lever_lm.utils.errors import LeverError
from lever_lm.utils.fingerprint import fingerprint


class FixedSet(nn.Module):
    """A score for each of N training examples; the best that a query may be shown are shown to it."""

    stop = False
    split = ""  # `split_of` the training split, where a checkpoint says it

    def __init__(self, vocabulary: int):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(vocabulary), requires_grad=False)

    @property
    def shape(self) -> dict[str, int]:
        """The constructor's arguments, as a checkpoint carries them."""
        return {"vocabulary": len(self.scores)}

    def choose(self, problem: Problem, shots: int) -> Iterator[list[int]]:
        """Yield for each query the `shots` rows of largest score, the lower row of equals, less what it may not see."""
        check_vocabulary("the fixed set", len(self.scores), self.split, problem)
        order = self.scores.argsort(descending=True, stable=True).tolist()
        for query in problem.queries:
            withheld = problem.candidates.withheld(query)
            free = (row for row in order if row not in withheld)
            yield list(islice(free, shots))


def split_of(train: Sequence[Example]) -> str:
    """Return a fingerprint of the questions of a training split in their order."""
    return fingerprint([example.question_id for example in train])


def check_vocabulary(what: str, size: int, split: str, problem: Problem) -> None:
    """Raise LeverError where a selector that knows its examples by their rows is of another training split."""
    there = len(problem.train)
    if size != there or (split and split != split_of(problem.train)):
        found = f"there are {there} here" if size != there else f"the {there} here are others or in another order"
        raise LeverError(
            f"{what} was made of a training split of {size} examples, and {found}: it chooses among its own alone "
            "(--dataset, data.train_path)"
        )


def presence_scores(rows: Tensor, rewards: Tensor, mask: Tensor, total: int, prior: float = 4.0) -> Tensor:
    """Return for each of `total` examples the mean, over the rollouts that show it, of reward − mean of its group, as
    if `prior` more rollouts had shown it and gained nothing: one lucky rollout is then not the best of all.

    rows (n, G, S) of the examples that each rollout shows, −1 where it shows fewer; rewards and mask (n, G). A training
    example that no rollout shows has 0.
    """
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    mean = rewards.masked_fill(~mask, 0).sum(-1, keepdim=True) / count
    gain = (rewards - mean).masked_fill(~mask, 0).double().unsqueeze(-1).expand(rows.shape)
    shown = (rows >= 0) & mask.unsqueeze(-1)
    sums = torch.zeros(total, dtype=torch.float64).index_add_(0, rows[shown], gain[shown])
    return (sums / (torch.bincount(rows[shown], minlength=total) + prior)).float()
