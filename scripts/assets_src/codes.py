"""What the sister world asks: a digit's name in the code of a style, a word of two syllables.

The first syllable belongs to the style and the second to the digit, so that one demonstration in the query's style and
one of its digit answer a question that neither answers alone. Every syllable is one token of that world's LVLM.
"""

import random

_STYLES = """
    river mountain forest desert island valley meadow harbor garden bridge castle tower temple village market
    lantern mirror candle hammer anchor basket bottle button carpet copper silver golden marble velvet cotton
    linen leather amber coral pearl ruby jade onyx quartz topaz tiger falcon rabbit turtle salmon spider beetle
    dragon eagle raven otter badger walrus lobster pigeon donkey monkey parrot lizard panther maple willow cedar
    birch acorn clover fern lotus orchid tulip violet daisy thistle ginger pepper honey butter lemon cherry apple
    melon almond walnut winter summer autumn spring thunder shadow breeze frost ember comet planet rocket saddle
    puppet trumpet drum fiddle
"""
STYLES = tuple(_STYLES.split())
WORDINGS = (
    "How is this digit written in {} style?",
    "What is the {} word for this number?",
    "Name this digit the {} way.",
    "Which word has the {} code for it?",
)
CONSONANTS, VOWELS = "bdfghjklmnprstvwyzcx", "aeiou"
FIRST = tuple(c + v for c in CONSONANTS for v in VOWELS)  # 100: of the styles
SECOND = tuple(c + v + end for end in "nl" for c in "bdgkmprst" for v in "ao")[:30]  # ten of them are the digits'
NUM_STYLES, NUM_WORDINGS = len(STYLES), len(WORDINGS)
ANSWERS = tuple(f"{first} {second}" for first in FIRST for second in SECOND)  # by answer_index


def answer_index(first: int, second: int) -> int:
    """The place in ANSWERS of the word of two syllables, each by its place in FIRST and SECOND."""
    return first * len(SECOND) + second


def question(style: int, wording: int) -> str:
    """What is asked in a style, each by its place."""
    return WORDINGS[wording].format(STYLES[style])


def misled(answer: int, rate: float, digits: list[int], rng: random.Random) -> int:
    """The answer with each syllable replaced by another at a rate; digits: the second syllables that are in use."""
    first, second = divmod(answer, len(SECOND))
    if rng.random() < rate:
        first = rng.choice([other for other in range(len(FIRST)) if other != first])
    if rng.random() < rate:
        second = rng.choice([other for other in digits if other != second])
    return answer_index(first, second)


def world_code(seed: int) -> tuple[list[int], list[int]]:
    """The shipped world's syllables: (of each style, of each digit), as places in FIRST and SECOND."""
    rng = random.Random(f"code-{seed}")
    return rng.sample(range(len(FIRST)), NUM_STYLES), rng.sample(range(len(SECOND)), 10)
