"""`lever pick`: which demonstrations a policy shows before one question, why these, and what the LVLM then answers."""

from collections import Counter

from lever_lm.data import Example
from lever_lm.data.rows import any_id
from lever_lm.evaluation.retriever import Pick, Retriever
from lever_lm.utils.console import Screen
from lever_lm.utils.errors import UsageError


def the_query(
    retriever: Retriever, image: str | None, question: str | None, example: str | None
) -> tuple[Example, str]:
    """Return the query and its source: an image and a question, or an evaluation question, by default the first."""
    if image is not None:
        return retriever.query(image, question), "your own"
    evaluation = retriever.stages.data.val_examples
    if example is None:
        return evaluation[0], f"question {evaluation[0].question_id}, the first of the evaluation split"
    for query in evaluation:
        if query.question_id == any_id(example):
            return query, f"question {example} of the evaluation split"
    first = ", ".join(str(query.question_id) for query in evaluation[:3])
    split = f"the evaluation split of {retriever.config.data.name}, which begins with {first}"
    raise UsageError(f"--example {example} is no question of {split}")


def pick_for(retriever: Retriever, query: Example, shots: int, *, answer: bool, prompt: bool) -> dict:
    """Return the picks for a query, as `--json` has them; with the LVLM's answer and the prompt where asked for."""
    picks, pool = retriever.pick(query, shots=shots), retriever.pool(query)
    by = retriever.config.sampler.name if retriever.config.infer.pool_size else "the nearest by image and text"
    sampler = by if retriever.from_pools else None
    result = {
        "query": {**_described(query), "question_id": query.question_id if query.answers else None},
        "icds": [_row(pick) for pick in picks],
        "pool": {"size": len(pool), "sampler": sampler, "examples": len(retriever.examples)},
        "checkpoint": str(retriever.checkpoint),
    }
    if answer:
        result["answer"] = retriever.answer(query, picks=picks)
    if query.answers:
        result["references"] = list(query.answers)
    if answer and query.answers:
        scores = retriever.task.metrics(result["answer"], query, result["answer"])
        result |= {name: value for name, value in scores.items() if name != "raw_accuracy"}
        result["read"] = retriever.task.read(result["answer"], query)
    if prompt:
        result["prompt"] = retriever.prompt(query, picks=picks, form="text")
    return result


def _described(example: Example) -> dict:
    return {"question_id": example.question_id, "question": example.question, "image": str(example.image or "no image")}


def _row(pick: Pick) -> dict:
    numbers = {name: getattr(pick, name) for name in ("probability", "image_similarity", "text_similarity")}
    rounded = {name: None if value is None else round(value, 6) for name, value in numbers.items()}
    return {**rounded, **_described(pick.example), "answer": pick.example.answer}


def show_picks(screen: Screen, result: dict, source: str) -> None:
    """Show the result of `pick_for` on the terminal."""
    query, pool, icds = result["query"], result["pool"], result["icds"]
    screen.result(f"query: {query['question']} ({source}; {query['image']})")
    among = f"a pool of {pool['size']} ({pool['sampler']}, of {pool['examples']} examples)"
    if pool["sampler"] is None:
        among = f"all {pool['size']} examples that the query may be shown"
    sure = "p: its probability when it was picked; " if any(icd["probability"] is not None for icd in icds) else ""
    screen.say(f"chosen from {among}, the first pick first; {sure}image, question: their cosine to the query's")
    for place, icd in enumerate(icds, 1):
        alike = f"image {icd['image_similarity']:+.2f}, question {icd['text_similarity']:+.2f}"
        sure = "" if icd["probability"] is None else f"p {icd['probability']:.3f}; "
        screen.result(f"{place:>3}. {sure}{alike}: {icd['question']} → {icd['answer']}")
        screen.say(f"     question {icd['question_id']}, {icd['image']}")
    for line in result.get("prompt", "").splitlines():
        screen.result(f"  | {line}")
    if "references" in result:
        counted = ", ".join(f"{answer} ×{n}" for answer, n in Counter(result["references"]).most_common())
        screen.say(f"references: {counted}")
    if "answer" in result:
        scored = ""
        if "accuracy" in result:
            scored = f" (score {result['accuracy']:.2f}, read as {result['read'] or 'nothing'})"
            if "normalized_accuracy" in result:
                always = f"{result['normalized_accuracy']:.2f} with answers always normalised"
                scored = f" (VQA accuracy: {result['accuracy']:.2f} official, {always})"
        screen.result(f"answer: {result['answer']}{scored}")
