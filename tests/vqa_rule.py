"""The official VQA accuracy, transcribed slowly from the evaluator's public description: dictionaries as it gets them,
step by step as it takes them. Nothing here is shared with lever_lm.tasks.vqa_metrics but the table of contractions."""

import re
from functools import cache

from lever_lm.tasks.vqa_metrics import CONTRACTIONS

MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
DIGITS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}


def outer(text: str) -> str:
    """Newlines and tabs are blanks, and outer blanks are nothing."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def punctuation(given: str) -> str:
    """Marks removed where one stands beside a blank or the text has a comma between digits, else made blanks."""
    made = given
    for mark in MARKS:
        if mark + " " in given or " " + mark in given or re.search(r"(\d)(,)(\d)", given) is not None:
            made = made.replace(mark, "")
        else:
            made = made.replace(mark, " ")
    # The evaluator means a flag and gives a count, so that no more than re.UNICODE periods go.
    return re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", made, count=int(re.UNICODE))


def words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophes."""
    kept = []
    for word in text.lower().split():
        word = DIGITS.get(word, word)
        if word not in ["a", "an", "the"]:
            kept.append(word)
    for place, word in enumerate(kept):
        if word in CONTRACTIONS:
            kept[place] = CONTRACTIONS[word]
    return " ".join(kept)


@cache
def normalised(text: str) -> str:
    """Both, in the evaluator's order."""
    return words(punctuation(text))


def accuracy(prediction: str, answers: list[str]) -> float:
    """The accuracy of one prediction, as the evaluator has it before it is made a percentage."""
    truths = [{"answer": outer(answer), "answer_id": number} for number, answer in enumerate(answers, 1)]
    found = outer(prediction)
    if len({truth["answer"] for truth in truths}) > 1:
        for truth in truths:
            truth["answer"] = normalised(truth["answer"])
        found = normalised(found)
    each = []
    for truth in truths:
        others = [other for other in truths if other != truth]
        matching = [other for other in others if other["answer"] == found]
        each.append(min(1, float(len(matching)) / 3))
    return float(sum(each)) / len(each)
