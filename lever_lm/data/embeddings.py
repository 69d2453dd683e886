"""Embeddings of every example, computed once and cached; the features of queries and ICDs made from them.

N examples of a split, D the encoder's projection size. Rows are unit vectors.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lever_lm.config.schema import FeatureConfig
from lever_lm.data import Example, VqaData, open_image
from lever_lm.data.encoder import FeatureEncoder, fetch_encoder
from lever_lm.utils.atomic_io import open_regular, write_tensors
from lever_lm.utils.errors import LeverError
from lever_lm.utils.fingerprint import changed, changes, stamp
from lever_lm.utils.hub import content_digests, model_folder, weights_digest
from lever_lm.utils.progress import Track, Work, loaded, unsaid
from lever_lm.utils.safe_parse import loads
from lever_lm.utils.safe_torch_load import load_torch
from lever_lm.utils.terminal import shown
from lever_lm.utils.transformers_compat import first_line

DEFAULT_WIDTH = 768  # dimensions of the default encoder's features, for estimates before it is there
_SPLITS = {"train": "training", "val": "evaluation"}


@dataclass(frozen=True)
class Embeddings:
    """One split: image (N, D), zero where there is none, and text (N, D); answer (N, D), that of the shown answers,
    where it is asked for."""

    image: Tensor
    text: Tensor
    answer: Tensor | None = None

    def take(self, rows) -> "Embeddings":
        """Return the embeddings of some rows, a slice or a list."""
        return Embeddings(self.image[rows], self.text[rows], None if self.answer is None else self.answer[rows])

    def part(self, name: str) -> Tensor:
        """Return the embeddings (N, D) of the images (`img`), the questions (`text`) or the shown answers (`ans`)."""
        return {"img": self.image, "text": self.text, "ans": self.answer}[name]

    def combine(self, parts: frozenset[str]) -> Tensor:
        """Return the feature of each example, (N, D): the normalised sum of the embeddings that `parts` names."""
        return F.normalize(torch.stack([self.part(name) for name in sorted(parts)]).sum(0), dim=-1)


@dataclass(frozen=True)
class Features:
    """Embeddings of both splits, and what they were made with and of: encoder, setting (`name`), data. columns (N, F):
    what a policy is told of the training examples beside them, see selectors/candidate_features.py."""

    train: Embeddings
    val: Embeddings
    encoder: str
    name: str
    fingerprint: str
    columns: Tensor | None = None

    def queries(self, split: str, config: FeatureConfig) -> Tensor:
        """Return the features (N, D) of a split's examples as queries."""
        return getattr(self, split).combine(config.parts()[0])

    def icds(self, config: FeatureConfig) -> Tensor:
        """Return the features (N, D) of the training examples as ICDs."""
        return self.train.combine(config.parts()[1])

    def learnt_from(self, config: FeatureConfig) -> tuple[Tensor, Tensor]:
        """Return the features of the training examples as queries and as ICDs, as a policy sees them."""
        return with_columns((self.queries("train", config), self.icds(config)), self.columns)


def with_columns(features: tuple[Tensor, Tensor], columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return features of queries (Q, D) and ICDs (N, D) as a policy sees them: the ICDs with their columns (N, F), the
    queries with zeros there, (Q, D + F) and (N, D + F)."""
    if columns is None:
        return features
    queries, icds = features
    return F.pad(queries, (0, columns.shape[1])), torch.cat([icds, columns], 1)


def compute_features(
    data: VqaData, config: FeatureConfig, path: Path, device: str, track: Track, say: Callable[[str], None] = unsaid
) -> Features:
    """Return the features of a dataset, from the cache file `path` for each split that it holds of the same data and
    encoder. What has changed is reported to `say`, and the features that depend on it are made again."""
    fetch_encoder(config.encoder)
    kept, why = _read_cache(path, data, config)
    if why:
        say(f"{path} is made again: {changes(why)}")
    if len(kept) < len(_SPLITS):
        encoder = loaded(
            track, "loading the encoder", lambda: FeatureEncoder(config.encoder, device, config.batch_size)
        )
        kept |= {
            split: encode(encoder, data, split, track, _answers(config, split))
            for split in _SPLITS
            if split not in kept
        }
        named = ((f"{split}_{part}", rows) for split, found in kept.items() for part, rows in vars(found).items())
        tensors = {name: rows for name, rows in named if rows is not None}
        header = {split: json.dumps(_stamp(data, config, split)) for split in _SPLITS}
        write_tensors(path, tensors, {**header, "encoder": config.encoder})
    return _features(kept, data, config)


def cached_features(data: VqaData, config: FeatureConfig, path: Path) -> Features | None:
    """Return the features in the cache file; None where it lacks a split with this data and encoder."""
    kept, _ = _read_cache(path, data, config)
    return _features(kept, data, config) if len(kept) == len(_SPLITS) else None


def _features(kept: dict[str, Embeddings], data: VqaData, config: FeatureConfig) -> Features:
    whole = features_fingerprint(data, config)
    return Features(encoder=encoder_fingerprint(config.encoder), name=config.name, fingerprint=whole, **kept)


def features_fingerprint(data: VqaData, config: FeatureConfig) -> str:
    """Return what identifies the features of the training split, from which a policy learns, made or not."""
    return _stamp(data, config, "train")["fingerprint"]


def _stamp(data: VqaData, config: FeatureConfig, split: str) -> dict[str, str]:
    folder = model_folder(config.encoder)
    kinds = ("*.json", "vocab.txt", "spiece.model")  # the last two are a tokenizer without a tokenizer.json
    how = content_digests([file for kind in kinds for file in sorted(folder.glob(kind))]) if folder else []
    parts = {f"{_SPLITS[split]}_data": data.stamp(split), "encoder": [encoder_fingerprint(config.encoder), how]}
    return stamp("features", **parts)


def encoder_fingerprint(encoder: str) -> str:
    """Return what identifies an encoder: its name and the digest of its weights, or `hub` where these are missing."""
    folder = model_folder(encoder)
    name = Path(encoder.removeprefix("asset:").rstrip("/")).name
    return f"{name}@{weights_digest(folder) if folder else 'hub'}"


def same_encoder(one: str, other: str) -> bool:
    """Return whether two fingerprints can be of one encoder: by their names where the weights of one are missing."""
    if one.endswith("@hub") or other.endswith("@hub"):
        return one.split("@")[0] == other.split("@")[0]
    return one.split("@")[1:] == other.split("@")[1:]


def _answers(config: FeatureConfig, split: str) -> bool:
    """Return whether the features of a split are made of its answers, too: those of ICDs alone can be."""
    return split == "train" and "ans" in config.parts()[1]


def _read_cache(path: Path, data: VqaData, config: FeatureConfig) -> tuple[dict[str, Embeddings], list[str]]:
    """Return the splits that the cache file holds for this data and encoder, and the inputs that have changed since the
    others were made. A file that is missing or broken is made again without a message."""
    from safetensors import SafetensorError, safe_open

    kept, why = {}, []
    if not path.is_file():
        return kept, why
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            for split in _SPLITS:
                here, there = _stamp(data, config, split), loads(header.get(split, "null"))
                if there == here:
                    # Copies: a file that is cut while it is mapped would take the process with it.
                    parts = ("image", "text", "answer") if _answers(config, split) else ("image", "text")
                    if not {f"{split}_{part}" for part in parts} <= {*file.keys()}:
                        continue  # made when answers were no features
                    rows = Embeddings(*(file.get_tensor(f"{split}_{part}").clone() for part in parts))
                    if _fits(rows, len(data.examples(split))):
                        kept[split] = rows
                else:
                    why += [name for name in changed(there, here) if name not in why]
    except (OSError, ValueError, SafetensorError):
        pass  # missing, cut by a full disk, or of another kind
    if len({rows.image.shape[1] for rows in kept.values()}) > 1:
        kept.clear()
    return kept, why


def _fits(rows: Embeddings, count: int) -> bool:
    """Return whether stored rows can be the embeddings of so many examples."""
    parts = [part for part in vars(rows).values() if part is not None]
    sound = all(part.dtype == torch.float32 and part.shape == rows.image.shape for part in parts)
    return sound and rows.image.ndim == 2 and len(rows.image) == count and all(bool(p.isfinite().all()) for p in parts)


def encode(encoder: FeatureEncoder, data: VqaData, split: str, track: Track, answers: bool = False) -> Embeddings:
    """Return the embeddings of a split's examples, with `answers` those of their shown answers, too. Raises LeverError
    at one that is no unit vector."""
    examples = data.examples(split)
    asked = {example.image: example for example in reversed(examples)}  # each image and its first question
    asked.pop(None, None)
    row = {image: i for i, image in enumerate(asked)}
    images = Work(asked.values(), "images")
    of_image = encoder.images(_opened(track(images, f"features, {split}: {len(asked)} images", len(asked))))
    text = encoder.texts([example.question for example in examples], track, f"features, {split}")
    nothing = text.new_zeros(1, text.shape[1])  # the last row, of examples without an image
    of_image = torch.cat([of_image, nothing]) if asked else nothing
    image = of_image[[row.get(example.image, -1) for example in examples]].contiguous()
    shown = torch.tensor([example.image is not None for example in examples])
    answer = encoder.texts([example.answer for example in examples], track, f"features, {split}") if answers else None
    for part, rows in (("image", image), ("text", text), ("answer", answer)):
        if rows is None:
            continue
        bad = ~(rows.norm(dim=-1) > 0.5)  # NaN, infinite or zero
        bad = (bad & shown if part == "image" else bad).nonzero()
        if len(bad):
            question = examples[int(bad[0])].question_id
            raise LeverError(
                f"question {question}: {encoder.path} gives its {part} a feature that is zero, NaN or infinite, as in "
                f"{len(bad)} of {len(rows)} questions: its weights may be broken (features.encoder)"
            )
    return Embeddings(image, text, answer)


def _opened(examples: Iterable[Example]) -> Iterator:
    """The image of each example; an error names the question too."""
    for example in examples:
        try:
            yield open_image(example.image)
        except LeverError as error:
            raise LeverError(f"question {example.question_id}: {error}") from error


# ---------------------------------------------------------------------- features that a user brings


def read_embeddings(path: Path) -> Tensor:
    """Read an (N, D) matrix, float32: from `.safetensors` or `.npy`, or a torch file (`.pt`, `.pth`) of a tensor or a
    numpy array, alone or the only one of a dict. Raises LeverError on anything else; nothing in a file is executed."""
    if path.suffix in (".safetensors", ".npy"):
        content = _read_matrix(path)
    else:
        content = load_torch(path, expect=(Tensor, np.ndarray, dict), what="file of embeddings")
    if isinstance(content, dict):
        if len(content) != 1:
            raise LeverError(f"{path} holds {len(content)} tensors, expected one (N, D) matrix")
        (content,) = content.values()
    if isinstance(content, np.ndarray) and content.dtype.kind == "f":
        # What float32 cannot hold becomes infinite, and is refused as such.
        with np.errstate(over="ignore", invalid="ignore"):
            content = torch.from_numpy(np.array(content, dtype=np.float32))
    if not isinstance(content, Tensor) or content.ndim != 2 or not content.is_floating_point():
        shape = f" {content.dtype} of shape {tuple(content.shape)}" if hasattr(content, "shape") else ""
        raise LeverError(f"{path} holds a {type(content).__name__}{shape}, expected (N, D) floats")
    return content.float()


def _read_matrix(path: Path) -> dict[str, Tensor] | np.ndarray:
    from safetensors.torch import load_file

    with open_regular(path, "the embeddings") as file:
        start = file.read(12)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        header = int.from_bytes(start[8:12] if start[6:7] > b"\x01" else start[8:10], "little")
        if header > path.stat().st_size:  # numpy makes room for all of it
            raise ValueError(f"its header claims {header} bytes")
        # Mapped, an array cannot be larger than its file; an array of objects is refused, and what numpy warns of.
        with np.errstate(over="ignore"), warnings.catch_warnings():
            warnings.simplefilter("error")
            return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # an untrusted header, or tensors of a type that torch does not have
        raise LeverError(f"cannot read the embeddings {path}: {shown(first_line(error), 200)}") from error
