"""What demonstrations do to answers, counted: pure functions of predictions, picks and shown answers.

Q queries, S shots. `says(prediction, answer)` is True where a prediction is that answer, as the task compares them.
Sources of the questions asked: Baldassini et al., arXiv:2404.15736 (copies, majority vote); arXiv:2407.00902 (images);
Lu et al., arXiv:2104.08786 (order).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

Says = Callable[[str, str], bool]


def majority(answers: Sequence[str]) -> str:
    """Return the commonest answer, the earlier of equals; "" of none."""
    return Counter(answers).most_common(1)[0][0] if answers else ""


def copies(predictions: Sequence[str], shown: Sequence[Sequence[str]], says: Says) -> list[bool]:
    """Return for each query whether its prediction is one of the answers that were shown."""
    return [any(says(text, answer) for answer in answers) for text, answers in zip(predictions, shown, strict=True)]


def copies_by_place(predictions: Sequence[str], shown: Sequence[Sequence[str]], says: Says) -> list[float]:
    """Return the share of queries whose prediction is the answer at each place, first pick first; a query counts at
    every place where its prediction stands."""
    places = max(map(len, shown), default=0)
    hits = [
        [says(text, answers[place]) for text, answers in zip(predictions, shown, strict=True) if place < len(answers)]
        for place in range(places)
    ]
    return [sum(each) / len(each) for each in hits]


def entropy_of_picks(picks: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return the entropy in nats of which demonstration is shown, over all queries and places; and the largest that it
    can be, that of every query showing others. One set for all queries of S examples has log S."""
    counts = Counter(row for chosen in picks for row in chosen)
    total = sum(counts.values())
    if not total:
        return 0.0, 0.0
    return -sum(n / total * math.log(n / total) for n in counts.values()), math.log(total)


def most_picked(picks: Sequence[Sequence[int]], count: int) -> list[int]:
    """Return the rows that are picked for most queries, the most frequent first, the lower row of equals."""
    counts = Counter(row for chosen in picks for row in chosen)
    return [row for row, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:count]]


def spread_over_orders(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return from scores (orders, Q): the standard deviation over orders of the accuracy, and the mean over queries of
    the standard deviation of a query's score. Over n − 1; 0 for a single order."""
    if len(scores) < 2:
        return 0.0, 0.0
    return _std([sum(each) / len(each) for each in scores]), sum(map(_std, zip(*scores, strict=True))) / len(scores[0])


def _std(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
