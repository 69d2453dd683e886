"""tiny-clip: a real CLIPModel of 245 k parameters that knows digits and question types; about a minute on one CPU core.

Trained on clean images only. It tells smudged images apart all the same (linearly), which is what a policy needs; and
it puts smudged images near each other, which is what misleads plain similarity.
Shapes: I images of a batch, C captions, Q questions, D = 64 the shared embedding.
"""

import json
import random
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from assets_src import codes
from assets_src.digit_images import load_digits, smudge, split_by_image
from assets_src.knowledge import DIGIT_WORDS, NUM_TRAIN_PARAPHRASES, QUESTION_TYPES
from lever_lm.utils.transformers_compat import import_transformers

PIXELS = 28
EMBEDDING = 64
MAX_TOKENS = 48
VOCAB_SIZE = 1100
CAPTIONS = (
    "a photo of the number {}",
    "a handwritten {}",
    "the digit {}",
    "a picture of a {}",
    "an image showing the number {}",
)
CAPTIONS_PER_DIGIT, QUESTIONS_PER_TYPE = 4, 3  # in a batch
QUESTION_SHARPNESS = IMAGE_SHARPNESS = 10.0  # fixed inverse temperatures of the two one-modality losses
IMAGE_WEIGHT = 0.3
WORD_DROPOUT = 0.3  # without it a wording that was not trained on is often taken for another question type
WARMUP_STEPS = 50


class Texts(NamedTuple):
    """What an encoder reads beside the digits: the wordings of each question type, the last of which is held out, what
    its tokenizer should know as well, and of each digit what else is a caption of it."""

    questions: list[tuple[str, ...]]
    corpus: list[str]
    captions: tuple[tuple[str, ...], ...] = ((),) * 10

    @property
    def captions_per_digit(self) -> int:
        """In a batch; more where there are more to see."""
        return CAPTIONS_PER_DIGIT * (2 if any(self.captions) else 1)


_TYPES = QUESTION_TYPES.values()
DIGITS = Texts([t.paraphrases for t in _TYPES], [text for t in _TYPES for text in (*t.paraphrases, *t.answers)])
ANSWERS = DIGITS._replace(captions=tuple(tuple(t.answers[digit] for t in _TYPES) for digit in range(10)))
_CODES = [tuple(wording.format(style) for wording in codes.WORDINGS) for style in codes.STYLES]
CODES = Texts(_CODES, [text for wordings in _CODES for text in wordings])


def digit_captions(texts: Texts) -> list[list[str]]:
    """For each digit its captions: with the word, with the numeral, and those of its own."""
    named = enumerate(DIGIT_WORDS)
    return [[*(c.format(w) for w in (word, d) for c in CAPTIONS), *texts.captions[d]] for d, word in named]


def build_tokenizer(texts: Texts):
    """A CLIP tokenizer (lower-cased BPE with an end-of-word mark, CLIP's own splitting) learnt from our few texts."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    end_of_word = "</w>"
    split = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    bpe = Tokenizer(models.BPE(end_of_word_suffix=end_of_word))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # As in CLIP every byte stands in the vocabulary with and without the mark. Left to itself, the trainer adds the
    # marked ones in the order of a randomly seeded hash table, and no two runs have the same ids.
    fixed_tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(byte + end_of_word for byte in alphabet)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=alphabet,
        end_of_word_suffix=end_of_word,
        special_tokens=fixed_tokens,
        show_progress=False,
    )
    corpus = [caption for captions in digit_captions(texts) for caption in captions]
    bpe.train_from_iterator((corpus + texts.corpus) * 4 + ["Question: Short answer:"] * 10, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def build_processor(texts: Texts):
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}
    )
    return CLIPProcessor(image_processor=image_processor, tokenizer=build_tokenizer(texts))


def build_model(tokenizer):
    from transformers import CLIPConfig, CLIPModel

    widths = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": EMBEDDING}
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"num_hidden_layers": 3, "image_size": PIXELS, "patch_size": 7}
    return CLIPModel(CLIPConfig(text_config=widths | text, vision_config=widths | vision, projection_dim=EMBEDDING))


def unit(output) -> Tensor:
    """(N, D) of length 1; newer transformers return an output object where older ones returned the tensor."""
    return F.normalize(output if torch.is_tensor(output) else output.pooler_output, dim=-1)


def augment(pixels: Tensor) -> Tensor:
    """Rotated, scaled, shifted and noisy copies of normalised images (N, 3, P, P)."""
    uniform = torch.rand(4, len(pixels)) - 0.5
    angle, scale = 0.35 * uniform[0], 1 + 0.3 * uniform[1]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    affine = torch.stack([cos, -sin, 0.2 * uniform[2], sin, cos, 0.2 * uniform[3]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, pixels.shape, align_corners=False)
    moved = F.grid_sample(pixels, grid, align_corners=False, padding_mode="border")
    return moved + 0.05 * torch.randn(len(pixels), 1, *pixels.shape[2:])


def drop_words(text: str, rng: random.Random) -> str:
    return " ".join(word for word in text.split() if rng.random() >= WORD_DROPOUT)


def contrastive_loss(similarity: Tensor, same: Tensor) -> Tensor:
    """Mean over rows of the cross-entropy against all positives of the row, (N, M) both.

    Source: supervised contrastive learning, arXiv:2004.11362 eq. 2.
    """
    log_prob = similarity.log_softmax(dim=1)
    return -((log_prob * same).sum(1) / same.sum(1).clamp(min=1)).mean()


def within_modality_loss(embeddings: Tensor, labels: Tensor, sharpness: float) -> Tensor:
    """contrastive_loss of a batch with itself, each row's own entry excepted."""
    own = torch.eye(len(labels), dtype=torch.bool)
    similarity = (sharpness * embeddings @ embeddings.t()).masked_fill(own, -1e4)
    return contrastive_loss(similarity, ((labels[:, None] == labels[None]) & ~own).float())


def train(
    model, tokenizer, texts: Texts, pixels: Tensor, digits: Tensor, *, steps: int, seed: int, batch_size: int = 256
) -> float:
    """pixels (N, 3, P, P) normalised, digits (N,): the train images. Returns the last loss."""
    rng = random.Random(f"clip-{seed}")
    captions = digit_captions(texts)
    questions = [wordings[:NUM_TRAIN_PARAPHRASES] for wordings in texts.questions]
    caption_digits = torch.arange(10).repeat(texts.captions_per_digit)
    question_types = torch.arange(len(questions)).repeat(QUESTIONS_PER_TYPE)
    peak_lr = 2e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak_lr * min(1, (step + 1) / WARMUP_STEPS) * (1 - 0.98 * step / steps)
        rows = torch.tensor(rng.choices(range(len(pixels)), k=batch_size))
        read = [rng.choice(captions[d]) for d in caption_digits.tolist()]
        read += [drop_words(rng.choice(questions[t]), rng) for t in question_types.tolist()]
        images = unit(model.get_image_features(pixel_values=augment(pixels[rows])))
        tokens = tokenizer(read, padding=True, return_tensors="pt")
        caption_rows, question_rows = unit(model.get_text_features(**tokens)).split(
            [len(caption_digits), len(question_types)]
        )
        similarity = model.logit_scale.exp().clamp(max=50) * images @ caption_rows.t()  # (I, C)
        same = (digits[rows][:, None] == caption_digits[None]).float()
        loss = contrastive_loss(similarity, same) + contrastive_loss(similarity.t(), same.t())
        loss = loss + within_modality_loss(question_rows, question_types, QUESTION_SHARPNESS)
        loss = loss + IMAGE_WEIGHT * within_modality_loss(images, digits[rows], IMAGE_SHARPNESS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.inference_mode()
def image_embeddings(model, processor, greys: np.ndarray) -> Tensor:
    """(N, P, P) uint8 -> (N, D)."""
    pictures = [Image.fromarray(grey).convert("RGB") for grey in greys]
    pixels = processor.image_processor(images=pictures, return_tensors="pt").pixel_values
    return unit(model.get_image_features(pixel_values=torch.as_tensor(np.asarray(pixels))))


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy on test of a least-squares classifier fitted on train; labels are bool."""

    def with_bias(x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones(len(x), 1)], dim=1)

    solution = torch.linalg.lstsq(with_bias(train), train_labels.float()[:, None] - 0.5).solution
    return ((with_bias(test) @ solution)[:, 0].gt(0) == test_labels).float().mean().item()


@torch.inference_mode()
def check(folder: Path, read: Texts) -> dict[str, float]:
    """What a policy can read off the shipped model, measured on val images and held-out wordings."""
    import_transformers()
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    greys, labels = load_digits()
    train_rows, val_rows = split_by_image(labels)
    digits = torch.from_numpy(labels)
    smudged_greys = (smudge(greys / 255, np.random.default_rng(1)) * 255).round().astype(np.uint8)
    clean, smudged = (image_embeddings(model, processor, g) for g in (greys, smudged_greys))

    def nearest_digit(embeddings: Tensor) -> float:
        nearest = (embeddings[val_rows] @ embeddings[train_rows].t()).argmax(dim=1)
        return (digits[train_rows][nearest] == digits[val_rows]).float().mean().item()

    def probe_set(rows: list[int]) -> tuple[Tensor, Tensor]:
        return torch.cat([clean[rows], smudged[rows]]), torch.arange(2 * len(rows)) >= len(rows)

    wordings = [wording for wordings in read.questions for wording in wordings]
    tokens = processor.tokenizer(wordings, padding=True, return_tensors="pt")
    texts = unit(model.get_text_features(**tokens)).unflatten(0, (len(read.questions), -1))  # (types, wordings, D)
    known, held_out = texts[:, :NUM_TRAIN_PARAPHRASES], texts[:, NUM_TRAIN_PARAPHRASES]
    nearest_type = (held_out @ known.flatten(0, 1).t()).argmax(dim=1) // NUM_TRAIN_PARAPHRASES
    return {
        "digit, nearest clean image": nearest_digit(clean),
        "digit, nearest among smudged images": nearest_digit(smudged),
        "question type, nearest wording": (nearest_type == torch.arange(len(texts))).float().mean().item(),
        "smudged or not, linear probe": linear_probe(*probe_set(train_rows), *probe_set(val_rows)),
    }


def build(out: Path, read: Texts, seed: int = 0, steps: int = 600) -> dict:
    import_transformers()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order would make other weights
    torch.manual_seed(seed)
    processor = build_processor(read)
    model = build_model(processor.tokenizer)
    greys, labels = load_digits()
    train_rows, _ = split_by_image(labels)
    pictures = [Image.fromarray(grey).convert("RGB") for grey in greys[train_rows]]
    pixels = torch.as_tensor(np.asarray(processor.image_processor(images=pictures, return_tensors="pt").pixel_values))
    started = time.perf_counter()
    loss = train(model, processor.tokenizer, read, pixels, torch.from_numpy(labels[train_rows]), steps=steps, seed=seed)
    seconds = round(time.perf_counter() - started)
    shutil.rmtree(out, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(out)
    build_processor(read).save_pretrained(
        out
    )  # a fresh one: a tokenizer that has padded a batch saves its padding along
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it private, and an installed asset must be readable
    summary = {"parameters": model.num_parameters(), "steps": steps, "seconds": seconds, "loss": round(loss, 4)}
    summary["accuracy"] = check(out, read)
    torch.set_num_threads(threads)
    return summary
