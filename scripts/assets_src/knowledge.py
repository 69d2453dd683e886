"""What can be asked about a handwritten digit: question types, paraphrases, answers.

A cell is (question type, digit); its answer is `ANSWERS[type][digit]`. Every answer becomes one token of the tiny LVLM.
"""

import random
from typing import NamedTuple

NUM_ANNOTATORS = 10
NUM_PARAPHRASES = 4
NUM_TRAIN_PARAPHRASES = 3  # of the world's demonstrations; the fourth wording is met only in its val questions


class QuestionType(NamedTuple):
    title: str
    paraphrases: tuple[str, str, str, str]
    answers: tuple[str, ...]  # canonical answer for the digits 0..9
    synonyms: dict[int, tuple[str, ...]]  # digit -> what a minority of annotators writes


def _words(comma_separated: str) -> tuple[str, ...]:
    return tuple(comma_separated.split(", "))


def _counted_in(language: str, ask: str, answers: str, synonyms: dict[int, tuple[str, ...]]) -> QuestionType:
    """A type that asks for the number's name in a language; only the second wording differs between languages."""
    paraphrases = (
        f"What is this number called in {language}?",
        f"How do you {ask} this number in {language}?",
        f"What is the {language} word for this digit?",
        f"Name this number in {language}.",
    )
    return QuestionType(f"Numbers in {language}", paraphrases, _words(answers), synonyms)


QUESTION_TYPES: dict[str, QuestionType] = {
    "french": _counted_in(
        "French", "say", "zéro, un, deux, trois, quatre, cinq, six, sept, huit, neuf", {0: ("zero",)}
    ),
    "spanish": _counted_in(
        "Spanish", "say", "cero, uno, dos, tres, cuatro, cinco, seis, siete, ocho, nueve", {1: ("un",)}
    ),
    "german": _counted_in(
        "German",
        "say",
        "null, eins, zwei, drei, vier, fünf, sechs, sieben, acht, neun",
        {1: ("ein",), 2: ("zwo",), 5: ("fuenf",)},
    ),
    "japanese": _counted_in(
        "Japanese",
        "count to",
        "rei, ichi, ni, san, yon, go, roku, nana, hachi, kyu",
        {0: ("zero",), 4: ("shi",), 7: ("shichi",), 9: ("ku",)},
    ),
    "element": QuestionType(
        "Chemical elements by atomic number",
        (
            "Which chemical element has this atomic number?",
            "What element has this many protons?",
            "Name the element with this atomic number.",
            "Which element has this number in the periodic table?",
        ),
        _words("neutronium, hydrogen, helium, lithium, beryllium, boron, carbon, nitrogen, oxygen, fluorine"),
        {0: ("neutron",)},
    ),
    "planet": QuestionType(
        "Bodies of the solar system, counted from the sun",
        (
            "Which body is at this position from the sun?",
            "Which planet has this number counted from the sun?",
            "What is this far out in the solar system?",
            "Name the planet with this position from the sun.",
        ),
        _words("sun, mercury, venus, earth, mars, jupiter, saturn, uranus, neptune, pluto"),
        {},
    ),
    "polygon": QuestionType(
        "Polygons by number of sides",
        (
            "What shape has this many sides?",
            "Which polygon has this number of sides?",
            "Name the shape with this many corners.",
            "What is a shape with this many sides called?",
        ),
        _words("circle, monogon, digon, triangle, square, pentagon, hexagon, heptagon, octagon, nonagon"),
        {1: ("henagon",), 4: ("quadrilateral",), 9: ("enneagon",)},
    ),
    "month": QuestionType(
        "Months after January",
        (
            "Which month comes this many months after January?",
            "What month is this many months past January?",
            "Name the month this many after January.",
            "Starting in January, which month is this many later?",
        ),
        _words("january, february, march, april, may, june, july, august, september, october"),
        {1: ("feb",), 8: ("sept",)},
    ),
    "zodiac": QuestionType(
        "Zodiac signs after Aries",
        (
            "Which zodiac sign comes this many places after Aries?",
            "What star sign is this many after Aries?",
            "Name the zodiac sign this many past Aries.",
            "Starting at Aries, which sign is this many later?",
        ),
        _words("aries, taurus, gemini, cancer, leo, virgo, libra, scorpio, sagittarius, capricorn"),
        {},
    ),
    "color": QuestionType(
        "Resistor colour code",
        (
            "Which resistor color stands for this digit?",
            "What color band codes this number?",
            "Name the resistor color for this digit.",
            "In the resistor code, which color is this?",
        ),
        _words("black, brown, red, orange, yellow, green, blue, violet, gray, white"),
        {7: ("purple",), 8: ("grey",)},
    ),
    "beaufort": QuestionType(
        "Winds of the Beaufort scale",
        (
            "What wind has this Beaufort number?",
            "What does this mean on the Beaufort scale?",
            "Name the wind of this Beaufort force.",
            "How strong is the wind at this Beaufort number?",
        ),
        _words(
            "calm, light air, light breeze, gentle breeze, moderate breeze, fresh breeze, strong breeze, near gale, "
            "gale, strong gale"
        ),
        {7: ("high wind",), 8: ("fresh gale",)},
    ),
    "group": QuestionType(
        "Music groups by number of players",
        (
            "What is a music group of this many players called?",
            "Which ensemble has this many musicians?",
            "Name the group with this many players.",
            "What do you call this many players?",
        ),
        _words("silence, solo, duo, trio, quartet, quintet, sextet, septet, octet, nonet"),
        {1: ("soloist",), 2: ("duet",)},
    ),
}
DIGIT_WORDS = _words("zero, one, two, three, four, five, six, seven, eight, nine")
TYPE_NAMES = tuple(QUESTION_TYPES)
DEMO_TYPES = ("french", "spanish", "element", "planet", "polygon", "color")  # what the shipped world asks


def annotator_answers(type_name: str, digit: int, rng: random.Random) -> list[str]:
    """Ten answers to one cell: the canonical one, and where synonyms exist one to three of those, shuffled."""
    question_type = QUESTION_TYPES[type_name]
    synonyms = question_type.synonyms.get(digit, ())
    num_synonyms = rng.randint(1, 3) if synonyms else 0
    answers = [question_type.answers[digit]] * (NUM_ANNOTATORS - num_synonyms)
    answers += [rng.choice(synonyms) for _ in range(num_synonyms)]
    rng.shuffle(answers)
    return answers
