"""VQA answer normalisation and accuracy, number for number those of the official VQA evaluator.

Source: VQA, arXiv:1505.00468 §3.4, and the rules of its public evaluation code. One deviation is kept on purpose
because published scores contain it: nothing is normalised for a question on which all annotators wrote the same.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

ARTICLES = frozenset({"a", "an", "the"})
NUMBER_WORDS = dict(
    zip(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        map(str, range(11)),
        strict=True,
    )
)
NUMBER_WORDS["none"] = "0"
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# Words the evaluator respells, as "written respelled" pairs.
_CONTRACTIONS = """
aint ain't|arent aren't|cant can't|couldve could've|couldnt couldn't|couldn'tve couldn't've|couldnt've couldn't've
didnt didn't|doesnt doesn't|dont don't|hadnt hadn't|hadnt've hadn't've|hadn'tve hadn't've|hasnt hasn't|havent haven't
hed he'd|hed've he'd've|he'dve he'd've|hes he's|howd how'd|howll how'll|hows how's|Id've I'd've|I'dve I'd've|Im I'm
Ive I've|isnt isn't|itd it'd|itd've it'd've|it'dve it'd've|itll it'll|maam ma'am|mightnt mightn't
mightnt've mightn't've|mightn'tve mightn't've|mightve might've|mustnt mustn't|mustve must've|neednt needn't
notve not've|oclock o'clock|oughtnt oughtn't|ow's'at 'ow's'at|'ows'at 'ow's'at|'ow'sat 'ow's'at|shant shan't
shed've she'd've|she'dve she'd've|shouldve should've|shouldnt shouldn't|shouldnt've shouldn't've
shouldn'tve shouldn't've|somebody'd somebodyd|somebodyd've somebody'd've|somebody'dve somebody'd've
somebodyll somebody'll|somebodys somebody's|someoned someone'd|someoned've someone'd've|someone'dve someone'd've
someonell someone'll|someones someone's|somethingd something'd|somethingd've something'd've
something'dve something'd've|somethingll something'll|thats that's|thered there'd|thered've there'd've
there'dve there'd've|therere there're|theres there's|theyd they'd|theyd've they'd've|they'dve they'd've
theyll they'll|theyre they're|theyve they've|twas 'twas|wasnt wasn't|wed've we'd've|we'dve we'd've|weve we've
werent weren't|whatll what'll|whatre what're|whats what's|whatve what've|whens when's|whered where'd|wheres where's
whereve where've|whod who'd|whod've who'd've|who'dve who'd've|wholl who'll|whos who's|whove who've|whyll why'll
whyre why're|whys why's|wont won't|wouldve would've|wouldnt wouldn't|wouldnt've wouldn't've|wouldn'tve wouldn't've
yall y'all|yall'll y'all'll|y'allll y'all'll|yall'd've y'all'd've|y'alld've y'all'd've|y'all'dve y'all'd've
youd you'd|youd've you'd've|you'dve you'd've|youll you'll|youre you're|youve you've
"""
CONTRACTIONS = dict(pair.split() for pair in _CONTRACTIONS.strip().replace("\n", "|").split("|"))

_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def _strip_punctuation(text: str) -> str:
    """A mark beside a space vanishes, one inside a word becomes a space; with `1,000` anywhere all of them vanish."""
    out = text
    has_digit_comma = _DIGIT_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or has_digit_comma else " ")
    return _PERIOD.sub("", out, count=32)  # the evaluator passes a flag where the count goes: 32 periods at most


def _strip_articles(text: str) -> str:
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)  # the same ten references are compared with every answer to their question
def normalize_answer(text: str) -> str:
    """Return an answer as the official evaluator compares it: punctuation, case, articles, number words,
    contractions."""
    return _strip_articles(_strip_punctuation(_clean(text)))


def vqa_accuracy(prediction: str, answers: Sequence[str], *, always_normalize: bool = False) -> float:
    """Return the official accuracy of one prediction in [0, 1]: mean over the leave-one-out sets of min(1, matches /
    3).

    answers: what the annotators wrote, ten as a rule. Returns 0.0 where there are none. Where all answers are the same
    string, outer blanks aside, the evaluator normalises neither them nor the prediction: `Yes` scores 0 against ten
    `yes`. always_normalize: normalise there too, as rewards do; the accuracy is then not the official one.
    """
    compared, references = _references(tuple(answers), always_normalize)
    prediction = compared(prediction)
    if prediction not in references:
        return 0.0
    hits = [reference == prediction for reference in references]
    total = sum(hits)
    return sum(min(1.0, (total - hit) / 3) for hit in hits) / len(hits)


@lru_cache(maxsize=1 << 16)
def _references(answers: tuple[str, ...], always_normalize: bool) -> tuple[Callable[[str], str], list[str]]:
    """Return how answers to a question are compared, and the references in that form."""
    references = [_clean(answer) for answer in answers]
    if always_normalize or len(set(references)) > 1:
        return normalize_answer, [normalize_answer(answer) for answer in references]
    return _clean, references


def relevance(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Return how near a prediction comes to its references: (best token F1, best edit similarity), both in [0, 1].

    Over normalised strings; edit similarity is difflib's ratio. (0, 0) where there is no reference.
    """
    words = normalize_answer(prediction)
    references = {normalize_answer(answer) for answer in answers}
    if not references:
        return 0.0, 0.0
    edit = max(difflib.SequenceMatcher(None, words, reference).ratio() for reference in references)
    return max(_token_f1(words.split(), reference.split()) for reference in references), edit


def _token_f1(ours: list[str], theirs: list[str]) -> float:
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0
