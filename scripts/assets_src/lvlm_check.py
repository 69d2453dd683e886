"""Measures a tiny Qwen's folder as its users meet it: from_pretrained, processor, pixels, `generate`.

Accuracy here is the share of answers equal to the canonical one of the digit in the picture. Query images come from the
val split, ICD images from the train split; half of the queries use the wording that the world's ICDs never have.
"""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from assets_src import codes
from assets_src.digit_images import load_digits, smudge, split_by_image
from assets_src.knowledge import NUM_TRAIN_PARAPHRASES, TYPE_NAMES
from assets_src.lvlm_model import encode_images, hidden_states, patchify
from assets_src.lvlm_processor import STYLES, chat_messages
from assets_src.lvlm_sequences import CODE_NOISE, Cell, Encoder, Sequence, World, collate, sample_codes
from lever_lm.utils.transformers_compat import import_transformers

HELD_OUT = NUM_TRAIN_PARAPHRASES
BATCH_SIZE = 50


def _other_cell(query: Cell, rng: random.Random) -> Cell:
    while (cell := (rng.randrange(len(TYPE_NAMES)), rng.randrange(10))) == query:
        pass
    return cell


def _same_type(query: Cell, rng: random.Random) -> Cell:
    return query[0], rng.choice([d for d in range(10) if d != query[1]])


def _same_digit(query: Cell, rng: random.Random) -> Cell:
    return rng.choice([t for t in range(len(TYPE_NAMES)) if t != query[0]]), query[1]


def conditions() -> dict[str, tuple[int, int | None, Callable[[Cell, random.Random], Cell]]]:
    """name -> (shots, place of the matching ICD if any, what the other ICDs are)."""
    table = {"zero-shot": (0, None, _other_cell), "match 1": (1, 0, _other_cell), "no match 1": (1, None, _other_cell)}
    table["no match 4"] = (4, None, _other_cell)
    for name, filler in (("random", _other_cell), ("same type", _same_type), ("same digit", _same_digit)):
        for place in range(4):
            table[f"match at {place} of 4, others {name}"] = (4, place, filler)
    return table


def sample_sequences(condition, rows: dict[str, list[list[int]]], style: str, count: int, seed: str) -> list[Sequence]:
    num_shots, place, filler = condition
    rng = random.Random(seed)
    sequences = []
    for _ in range(count):
        query = (rng.randrange(len(TYPE_NAMES)), rng.randrange(10))
        cells = [query if shot == place else filler(query, rng) for shot in range(num_shots)]
        images = [rng.choice(rows["train"][digit]) for _, digit in cells] + [rng.choice(rows["val"][query[1]])]
        wording = HELD_OUT if rng.random() < 0.5 else rng.randrange(NUM_TRAIN_PARAPHRASES)
        paraphrases = [rng.randrange(NUM_TRAIN_PARAPHRASES) for _ in cells] + [wording]
        cells.append(query)
        sequences.append(Sequence(style, cells, paraphrases, [digit for _, digit in cells], images))
    return sequences


CODE_SHOTS = {
    "nothing": "",
    "one of the style": "s",
    "one of the digit": "d",
    "two of the style": "ss",
    "two of the digit": "dd",
    "style and digit": "sd",
    "digit and style": "ds",
    "two of each": "sdsd",
    "three of the style, one of the digit": "sssd",
    "three of each": "sdsdsd",
    "one of each among four": "nsdn",
    "four of neither": "nnnn",
}


def code_conditions() -> dict[str, tuple[str, float]]:
    """name -> (what each shot shares with the query: style, digit or neither; how often a syllable of it is wrong)."""
    noises = {"": 0.0, f", {CODE_NOISE:.0%} wrong": CODE_NOISE}
    return {name + text: (shots, noise) for name, shots in CODE_SHOTS.items() for text, noise in noises.items()}


def sample_code_sequences(condition, rows: dict[str, list[list[int]]], style: str, count: int, seed: str):
    shots, noise = condition
    rng = random.Random(seed)
    first, second = codes.world_code(seed=1)
    sequences = []
    for _ in range(count):
        query = (rng.randrange(codes.NUM_STYLES), rng.randrange(10))
        styles = [t for t in range(codes.NUM_STYLES) if t != query[0]]
        digits = [d for d in range(10) if d != query[1]]
        cells = [
            (query[0] if shot == "s" else rng.choice(styles), query[1] if shot == "d" else rng.choice(digits))
            for shot in shots
        ] + [query]
        answers = [codes.answer_index(first[t], second[d]) for t, d in cells]
        answers[:-1] = [codes.misled(answer, noise, second, rng) for answer in answers[:-1]]
        images = [rng.choice(rows["train"][digit]) for _, digit in cells[:-1]] + [rng.choice(rows["val"][query[1]])]
        sequences.append(Sequence(style, cells, [rng.randrange(codes.NUM_WORDINGS) for _ in cells], answers, images))
    return sequences


def _texts(sequence: Sequence, world: World) -> tuple[list[tuple[str, str]], str, str]:
    """Shots as (question, answer), the query's question, the right answer."""
    asked = zip(sequence.cells, sequence.paraphrases, strict=True)
    questions = [world.questions[t][wording] for (t, _), wording in asked]
    answers = [world.answers[t][a] for (t, _), a in zip(sequence.cells, sequence.answers, strict=True)]
    return list(zip(questions[:-1], answers[:-1], strict=True)), questions[-1], answers[-1]


@torch.inference_mode()
def generate_answers(
    model, processor, world: World, encoder: Encoder, sequences: list[Sequence], pictures: list[Image.Image]
) -> list[str]:
    """Greedy answers through the library alone; also asserts that our pre-tokenised prompts equal the processor's."""
    answers = []
    for begin in range(0, len(sequences), BATCH_SIZE):
        part = sequences[begin : begin + BATCH_SIZE]
        chats = [chat_messages(*_texts(s, world)[:2], s.style) for s in part]
        prompts = [processor.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        images = [[pictures[row] for row in s.images] for s in part]
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt").to(model.device)
        for row, mask, sequence in zip(inputs.input_ids, inputs.attention_mask, part, strict=True):
            encoded = encoder.encode(sequence)
            if row[mask.bool()].tolist() != encoded.ids[: encoded.answer_starts[-1]]:
                raise AssertionError(f"training prompt and rendered chat differ for {sequence}")
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        new_tokens = tokens[:, inputs.input_ids.shape[1] :]
        answers += [a.strip() for a in processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
    return answers


@torch.inference_mode()
def fast_first_words(model, tokenizer, encoder: Encoder, sequences: list[Sequence], greys: np.ndarray) -> list[str]:
    """The first greedy token of each answer by the training path (lvlm_model.py)."""
    batch = collate(sequences, encoder).to(model.device)
    used = sorted({row for s in sequences for row in s.images})
    place = {row: i for i, row in enumerate(used)}
    image_rows = torch.tensor([place[row] for s in sequences for row in s.images], device=model.device)
    images = torch.from_numpy(greys[used]).to(model.device).float() / 255
    features = encode_images(model.model.visual, patchify(images))
    states = hidden_states(model, batch.ids, batch.positions, features, image_rows).flatten(0, 1)
    last_segments = np.cumsum([len(s.cells) for s in sequences]) - 1
    before_answer = batch.probe_at[2 * torch.from_numpy(last_segments)]
    return [tokenizer.decode([token]).strip() for token in model.lm_head(states[before_answer]).argmax(-1).tolist()]


def check(folder: Path, world: World, count: int = 200, device: str = "cpu", smudged: bool = False) -> dict[str, float]:
    """Accuracy by condition and style; `agreement` is how often library and training path begin with the same word."""
    import_transformers()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    greys, labels = load_digits()
    if smudged:
        greys = (smudge(greys / 255, np.random.default_rng(0)) * 255).round().astype(np.uint8)
    pictures = [Image.fromarray(grey).convert("RGB") for grey in greys]
    splits = dict(zip(("train", "val"), split_by_image(labels), strict=True))
    rows = {name: [[r for r in split if labels[r] == d] for d in range(10)] for name, split in splits.items()}
    encoder, result, agreements = Encoder(processor.tokenizer, world), {}, []
    of_codes = world.sample is sample_codes
    sampled = sample_code_sequences if of_codes else sample_sequences
    for name, condition in (code_conditions() if of_codes else conditions()).items():
        for style in STYLES:
            sequences = sampled(condition, rows, style, count, seed=f"{name}-{style}")
            answers = generate_answers(model, processor, world, encoder, sequences, pictures)
            right = [answer == _texts(s, world)[2] for answer, s in zip(answers, sequences, strict=True)]
            result[f"{style}: {name}"] = float(np.mean(right))
            firsts = fast_first_words(model, processor.tokenizer, encoder, sequences, greys)
            agreements += [answer.startswith(first) for answer, first in zip(answers, firsts, strict=True)]
    return {**result, "agreement": float(np.mean(agreements))}
