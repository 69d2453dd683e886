"""Training sequences that can only be answered from their demonstrations, and their batches.

In every sequence the answers of a question type are permuted over the digits, so an answer can be copied from an ICD
with the same digit and type and cannot be known otherwise (some cells excepted, which give the model a weak prior).
An ICD is right less often the farther it stands from the query, so the model learns to trust the nearest one most.
Shapes: B sequences, L tokens after right padding; indices into a batch are flat, over B * L.
"""

import random
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from assets_src import codes
from assets_src.knowledge import NUM_PARAPHRASES, QUESTION_TYPES, TYPE_NAMES
from assets_src.lvlm_model import TOKENS_PER_IMAGE, rope_positions
from assets_src.lvlm_processor import STYLES, codes_corpus, digits_corpus, question_text

NUM_TYPES = len(TYPE_NAMES)
SHOT_COUNTS = (0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6)
RELIABILITY = (1, 0.85, 0.6, 0.35, 0.2, 0.1)  # of an ICD, by its distance from the query
LAST_ANSWER_RATE = 0.3  # how often the target is the last same-type ICD's answer, whatever its digit
CODE_SHOT_COUNTS = (1, 2, 2, 3, 4, 4, 5, 6)
CODE_STRANGERS = (0, 0, 1, 1, 2, 3)  # shots that share neither; without them no style is ever matched with another
CODE_RANDOM_RATE, CODE_NOISE = 0.25, 0.15
KNOWN_CELLS, KNOWN_RATE = 18, 0.5  # cells that keep their true answer, and in how many sequences
SHOT_WEIGHT, QUERY_WEIGHT = 0.1, 2.0  # of an answer's tokens in the loss

Cell = tuple[int, int]  # (question type, digit)


class Sequence(NamedTuple):
    """S shots and a query. Lists of S + 1 have the query last."""

    style: str
    cells: list[Cell]  # S + 1: what is asked, about which digit
    paraphrases: list[int]  # S + 1
    answers: list[int]  # S + 1: index among the type's answers; the last one is the target
    images: list[int]  # S + 1: rows of the images


class Encoded(NamedTuple):
    ids: list[int]
    answer_starts: list[int]  # S + 1: where each answer's first token stands
    supervised: list[int]  # positions of all answer tokens with their terminator


class Batch(NamedTuple):
    ids: Tensor  # (B, L)
    positions: Tensor  # (3, B, L)
    image_rows: Tensor  # (images of the whole batch,)
    predict_at: Tensor  # flat positions whose next token is supervised
    labels: Tensor  # those next tokens
    weights: Tensor  # and their weight in the loss
    probe_at: Tensor  # flat positions of, and just before, each answer's first token
    probe_types: Tensor  # what is asked there,
    probe_digits: Tensor  # and about which digit

    def to(self, device: str) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def known_cells() -> set[Cell]:
    """A fixed 18 of the 120 cells: the "pretrained knowledge" behind the zero-shot accuracy."""
    cells = [(t, d) for t in range(NUM_TYPES) for d in range(10)]
    random.Random(7).shuffle(cells)
    return set(cells[:KNOWN_CELLS])


def _distractor(cell: Cell, rng: random.Random) -> Cell:
    """Half share the type, a fifth the digit; these are what the model must not copy from."""
    kind = rng.random()
    if kind < 0.5:
        return cell[0], rng.choice([d for d in range(10) if d != cell[1]])
    if kind < 0.7:
        return rng.choice([t for t in range(NUM_TYPES) if t != cell[0]]), cell[1]
    return rng.randrange(NUM_TYPES), rng.randrange(10)


def _sample_cells(rng: random.Random) -> list[Cell]:
    """S + 1 cells: bursty (few cells, repeated), or one match at a random place, or random."""
    num_shots = rng.choice(SHOT_COUNTS)
    query = (rng.randrange(NUM_TYPES), rng.randrange(10))
    kind = rng.random()
    if kind < 0.55:
        cells = [query] + [_distractor(query, rng) for _ in range(rng.choice((0, 1, 1, 2, 2, 3)))]
        return [rng.choice(cells) for _ in range(num_shots + 1)]
    if kind < 0.85:
        shots = [_distractor(query, rng) for _ in range(num_shots)]
        if shots:
            shots[rng.randrange(num_shots)] = query
        return [*shots, query]
    return [(rng.randrange(NUM_TYPES), rng.randrange(10)) for _ in range(num_shots)] + [query]


def _permutation(question_type: int, known: set[Cell], rng: random.Random) -> list[int]:
    """Which answer each digit has in this sequence."""
    answers = list(range(10))
    rng.shuffle(answers)
    for digit in range(10):
        if (question_type, digit) in known and rng.random() < KNOWN_RATE:
            other = answers.index(digit)
            answers[other], answers[digit] = answers[digit], digit
    return answers


def sample_sequence(rows_by_digit: list[list[int]], rng: random.Random, known: set[Cell]) -> Sequence:
    cells = _sample_cells(rng)
    num_shots = len(cells) - 1
    mapping = {t: _permutation(t, known, rng) for t in sorted({t for t, _ in cells})}
    answers = [mapping[t][digit] for t, digit in cells]
    for shot in range(num_shots):
        if rng.random() > RELIABILITY[num_shots - 1 - shot]:
            answers[shot] = rng.choice([a for a in range(10) if a != answers[shot]])
    same_type = [a for (t, _), a in zip(cells[:-1], answers[:-1], strict=True) if t == cells[-1][0]]
    if same_type and rng.random() < LAST_ANSWER_RATE:
        answers[-1] = same_type[-1]
    return _sequence(cells, answers, rows_by_digit, rng)


def _sequence(cells: list[Cell], answers: list[int], rows_by_digit: list[list[int]], rng: random.Random) -> Sequence:
    """A sequence in either style, with an image of its own for each cell."""
    images: list[int] = []
    for _, digit in cells:
        images.append(rng.choice([row for row in rng.sample(rows_by_digit[digit], 8) if row not in images]))
    # All four wordings: those that the world holds out are new to a policy, and an LVLM has read more than a policy.
    paraphrases = [rng.randrange(NUM_PARAPHRASES) for _ in cells]
    return Sequence(rng.choice(STYLES), cells, paraphrases, answers, images)


# ---------------------------------------------------------------------- the sister world


def _code_cells(rng: random.Random) -> list[Cell]:
    """S + 1 cells: as many shots in the query's style as of its digit, beside some that share neither; or at random."""
    num_shots, query = rng.choice(CODE_SHOT_COUNTS), (rng.randrange(codes.NUM_STYLES), rng.randrange(10))
    strangers = min(rng.choice(CODE_STRANGERS), num_shots - 1)
    kinds = ["neither"] * strangers + [("style", "digit")[i % 2] for i in range(num_shots - strangers)]
    if rng.random() < CODE_RANDOM_RATE:
        kinds = [rng.choice(("style", "digit", "neither")) for _ in kinds]
    rng.shuffle(kinds)
    styles = rng.sample([style for style in range(codes.NUM_STYLES) if style != query[0]], num_shots)
    digits = [digit for digit in range(10) if digit != query[1]]
    cells = [
        (query[0] if kind == "style" else rng.choice(styles), query[1] if kind == "digit" else rng.choice(digits))
        for kind in kinds
    ]
    return [*cells, query]


def sample_codes(rows_by_digit: list[list[int]], rng: random.Random) -> Sequence:
    """A sequence of the sister world: both codes are drawn anew, and a syllable of a shot is wrong now and then, so
    that the query's are read off like styles and like digits, by majority."""
    cells = _code_cells(rng)
    first = rng.sample(range(len(codes.FIRST)), codes.NUM_STYLES)
    second = rng.sample(range(len(codes.SECOND)), 10)
    answers = [codes.answer_index(first[style], second[digit]) for style, digit in cells]
    shots = [codes.misled(answer, CODE_NOISE, second, rng) for answer in answers[:-1]]
    return _sequence(cells, [*shots, answers[-1]], rows_by_digit, rng)


# ---------------------------------------------------------------------- tokens


class World(NamedTuple):
    """What a model is trained to answer. Of each type its wordings, and its answers by their index."""

    questions: list[tuple[str, ...]]
    answers: list[tuple[str, ...]]
    corpus: list[str]  # of the tokenizer
    sample: Callable[[list[list[int]], random.Random], Sequence]  # (rows of the images of each digit, generator)


def digits_world() -> World:
    types, sample = QUESTION_TYPES.values(), partial(sample_sequence, known=known_cells())
    return World([t.paraphrases for t in types], [t.answers for t in types], digits_corpus(), sample)


def codes_world() -> World:
    questions = [tuple(w.format(style) for w in codes.WORDINGS) for style in codes.STYLES]
    return World(questions, [codes.ANSWERS] * codes.NUM_STYLES, codes_corpus(), sample_codes)


class Encoder:
    """Joins pre-tokenised pieces: equal to tokenising the rendered chat, and fast enough to train on."""

    def __init__(self, tokenizer, world: World) -> None:
        @cache
        def tokens(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        self.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.pad_token_id = tokenizer.pad_token_id
        self.system = tokens("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
        self.image = tokens("<|vision_start|>" + "<|image_pad|>" * TOKENS_PER_IMAGE + "<|vision_end|>")
        self.user, self.assistant = tokens("<|im_start|>user\n"), tokens("<|im_start|>assistant\n")
        self.end, self.newline = tokens("<|im_end|>"), tokens("\n")
        self.questions = [[tokens(question_text(q)) for q in wordings] for wordings in world.questions]
        self.answers = [[tokens(a) for a in answers] for answers in world.answers]
        self.spaced_answers = [[tokens(" " + a) for a in answers] for answers in world.answers]

    def encode(self, sequence: Sequence) -> Encoded:
        """Ids of prompt, target and closing `<|im_end|>`; the prompt alone ends at answer_starts[-1]."""
        interleaved = sequence.style == "interleaved"
        ids = list(self.system)
        starts: list[int] = []
        supervised: list[int] = []
        last = len(sequence.cells) - 1
        for i, (question_type, _) in enumerate(sequence.cells):
            if not interleaved or i == 0:
                ids += self.user
            ids += self.image + self.questions[question_type][sequence.paraphrases[i]]
            own_turn = not interleaved or i == last
            if own_turn:
                ids += self.end + self.newline + self.assistant
            starts.append(len(ids))
            ids += (self.answers if own_turn else self.spaced_answers)[question_type][sequence.answers[i]]
            ids += self.end if own_turn else self.newline
            supervised += range(starts[-1], len(ids))
            if own_turn and i != last:
                ids += self.newline
        return Encoded(ids, starts, supervised)


def collate(sequences: list[Sequence], encoder: Encoder) -> Batch:
    encoded = [encoder.encode(sequence) for sequence in sequences]
    width = max(len(e.ids) for e in encoded)
    ids = np.full((len(encoded), width), encoder.pad_token_id)
    predict_at, labels, weights, probe_at, probe_cells = [], [], [], [], []
    for b, (sequence, e) in enumerate(zip(sequences, encoded, strict=True)):
        ids[b, : len(e.ids)] = e.ids
        for position in e.supervised:
            predict_at.append(b * width + position - 1)
            labels.append(e.ids[position])
            weights.append(QUERY_WEIGHT if position >= e.answer_starts[-1] else SHOT_WEIGHT)
        for start, cell in zip(e.answer_starts, sequence.cells, strict=True):
            probe_at += [b * width + start - 1, b * width + start]
            probe_cells += [cell, cell]
    return Batch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(rope_positions(ids, encoder.image_token_id)),
        image_rows=torch.tensor([row for sequence in sequences for row in sequence.images]),
        predict_at=torch.tensor(predict_at),
        labels=torch.tensor(labels),
        weights=torch.tensor(weights),
        probe_at=torch.tensor(probe_at),
        probe_types=torch.tensor([t for t, _ in probe_cells]),
        probe_digits=torch.tensor([d for _, d in probe_cells]),
    )


class TrainingBatches(torch.utils.data.Dataset):
    """Item i is batch i, seeded by i alone: the same batches whatever the number of workers."""

    def __init__(self, encoder: Encoder, sample, labels: np.ndarray, steps: int, batch_size: int, seed: int) -> None:
        self.encoder, self.sample = encoder, sample
        self.rows_by_digit = [np.flatnonzero(labels == digit).tolist() for digit in range(10)]
        self.steps, self.batch_size, self.seed = steps, batch_size, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"batch-{self.seed}-{step}")
        sequences = [self.sample(self.rows_by_digit, rng) for _ in range(self.batch_size)]
        return collate(sequences, self.encoder)
