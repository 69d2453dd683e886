"""Selectors: what chooses the demonstrations of a query, and what each of them is given.

Q queries, N training examples, S shots, D feature size. A selector is a function from a `Problem` and S to the picks of
each query in turn: at most S rows of the training split, the first pick first. It takes them from `Query.allowed` or
from `Query.pool`, and draws from `Query.rng` alone, so that its picks depend on the seed and the query and on nothing
else. To add one: a function, and a line of `SELECTORS`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lever_lm.selectors.baselines import nothing, oracle, random, similarity
from lever_lm.selectors.diverse import dpp, mmr
from lever_lm.selectors.mmices import rerank_near_images
from lever_lm.selectors.problem import Problem
from lever_lm.utils.progress import WORTH_A_WORD, Track, Work, untracked

Select = Callable[[Problem, int], Iterator[list[int]]]


@dataclass(frozen=True)
class Selector:
    """label: what a person calls it. select: its function; None where a checkpoint or a file has the picks. colour: its
    place in the palette of figures; the others come after those that have one."""

    label: str
    select: Select | None = None
    colour: int | None = None


ZERO_SHOT, RANDOM, ANY_POLICY, FROM_FILE = "zero_shot", "random", "policy", "icds"
# In the order of the demo's table.
SELECTORS = {
    ZERO_SHOT: Selector("no demonstrations", nothing),
    RANDOM: Selector("random", random, 5),
    "text_sim": Selector("text similarity", similarity(("text", "text")), 4),
    "img_sim": Selector("image similarity", similarity(("img", "img")), 3),
    "img_text_sim": Selector("image and text similarity", similarity(("img", "img"), ("text", "text")), 2),
    "rce": Selector("RCE", colour=1),
    "grpo": Selector("GRPO", colour=0),
    ANY_POLICY: Selector("the policy"),
    FROM_FILE: Selector("choices from a file"),
    "oracle": Selector("oracle", oracle, 6),
    "muier": Selector("image to image and text", similarity(("img", "img"), ("img", "text"))),
    "mmices": Selector("MMICES", rerank_near_images("text", "text")),
    "mmices_image": Selector("MMICES by candidate images", rerank_near_images("text", "img")),
    "mmr": Selector("MMR", mmr),
    "dpp": Selector("DPP", dpp),
}
BASELINES = tuple(name for name, selector in SELECTORS.items() if selector.select)
LEARNED = ("grpo", ANY_POLICY, "rce", FROM_FILE)  # the page shows the first of them that was evaluated
CONTRASTS = (RANDOM, "img_text_sim")  # the page and the model card set the learned one against these
RIVALS = ("img_text_sim", "rce")  # the terminal prints the paired tests against these


def named(method: str) -> str:
    """Return a method's label; a method that is not in the table is its own."""
    return SELECTORS[method].label if method in SELECTORS else method


def select(name: str, problem: Problem, shots: int, track: Track = untracked) -> list[list[int]]:
    """Return the picks of a selector of the table for every query, rows of the training split, first pick first.

    Raises ValueError where it picks a row twice, or one that shows the query itself or its image.
    """
    picks = []
    work = Work(SELECTORS[name].select(problem, shots), "queries", after=WORTH_A_WORD)
    for query, rows in zip(problem.queries, track(work, name, len(problem.queries)), strict=True):
        if len(set(rows)) < len(rows) or problem.candidates.withheld(query) & set(rows):
            raise ValueError(f"{name} repeats a demonstration of question {query.question_id}, or shows its own image")
        picks.append(rows)
    return picks
