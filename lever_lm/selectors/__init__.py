"""Selectors: what chooses the demonstrations of a query, and what each of them is given.

Q queries, N training examples, S shots, D feature size. A selector is a function from a `Problem` and S to the picks of
each query in turn: at most S rows of the training split, the first pick first. It takes them from `Query.allowed` or
from `Query.pool`, and draws from `Query.rng` alone, so that its picks depend on the seed and the query and on nothing
else. To add one: a function, and a line of `SELECTORS`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lever_lm.selectors.baselines import SAME_PARTS, nothing, oracle, random, similarity
from lever_lm.selectors.diverse import dpp, mmr
from lever_lm.selectors.mmices import rerank_near_images
from lever_lm.selectors.problem import Problem
from lever_lm.selectors.pseudo_answer import pseudo_answer
from lever_lm.utils.progress import WORTH_A_WORD, Track, Work, untracked

Select = Callable[[Problem, int], Iterator[list[int]]]


@dataclass(frozen=True)
class Selector:
    """label: what a person calls it. select: its function; None where a checkpoint or a file has the picks. colour: its
    place in the palette of figures; the others come after those that have one.

    kind: `baseline`, of `--baselines` and the demo; `features`, which looks at features alone too; `asks`, which asks
    the LVLM while it chooses; `learnt`, by `lever train`; `file`. simple: it learns nothing and sees no answer. pool:
    it chooses from the query's pool, else from the whole training split. calls: LVLM calls for the choice of a query.
    """

    label: str
    select: Select | None = None
    colour: int | None = None
    kind: str = "baseline"
    simple: bool = True
    pool: bool = False
    calls: int = 0


def _features(label: str, select: Select) -> Selector:
    return Selector(label, select, kind="features")


def _learnt(label: str, colour: int | None = None, *, pool: bool = True) -> Selector:
    return Selector(label, colour=colour, kind="learnt", simple=False, pool=pool)


ZERO_SHOT, RANDOM, ANY_POLICY, FROM_FILE = "zero_shot", "random", "policy", "icds"
# In the order of the demo's table.
SELECTORS = {
    ZERO_SHOT: Selector("no demonstrations", nothing),
    RANDOM: Selector("random", random, 5),
    "text_sim": Selector("text similarity", similarity(("text", "text")), 4),
    "img_sim": Selector("image similarity", similarity(("img", "img")), 3),
    "img_text_sim": Selector("image and text similarity", similarity(*SAME_PARTS), 2),
    "muier": _features("image to image and text", similarity(("img", "img"), ("img", "text"))),
    "mmices": _features("MMICES", rerank_near_images("text", "text")),
    "mmices_image": _features("MMICES by candidate images", rerank_near_images("text", "img")),
    "mmr": _features("MMR", mmr),
    "dpp": _features("DPP", dpp),
    "pseudo_answer": Selector("pseudo-answer", pseudo_answer, kind="asks", simple=False, calls=1),
    "fixed_set": _learnt("fixed set", pool=False),
    "answer_match": _learnt("answer match"),
    "epr": _learnt("EPR"),
    "lever_lm": _learnt("Lever-LM", pool=False),
    "rce": _learnt("RCE", 1),
    "grpo": _learnt("GRPO", 0),
    ANY_POLICY: _learnt("the policy"),
    FROM_FILE: Selector("choices from a file", kind="file", simple=False),
    "oracle": Selector("oracle", oracle, 6, simple=False, pool=True),
}
BASELINES = tuple(name for name, one in SELECTORS.items() if one.kind == "baseline")
SIMPLE = tuple(name for name, one in SELECTORS.items() if one.simple and name != ZERO_SHOT)
LEARNED = ("grpo", ANY_POLICY, "rce", FROM_FILE)  # the page shows the first of them that was evaluated
CONTRASTS = (RANDOM, "img_text_sim")  # the page and the model card set the learned one against these
RIVALS = ("img_text_sim", "answer_match", "rce")  # the terminal prints the paired tests against these


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
