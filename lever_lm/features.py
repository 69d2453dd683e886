"""CLIP embeddings of every example, computed once and cached; the features of queries and ICDs made from them.

N examples of a split, D the encoder's projection size. Rows are unit vectors.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lever_lm.checkpoint import load_torch
from lever_lm.compat import first_line, import_transformers, load_whole, resolve_device
from lever_lm.config import FeatureConfig, fingerprint
from lever_lm.data import Example, VqaData, open_image
from lever_lm.errors import LeverError
from lever_lm.hub import fetch_model, model_folder, weights_digest
from lever_lm.runs import write_tensors

Track = Callable[[Iterable, str, int], Iterable]


@dataclass(frozen=True)
class Embeddings:
    """One split: image (N, D) and text (N, D)."""

    image: Tensor
    text: Tensor

    def take(self, rows) -> "Embeddings":
        """Those of some rows: a slice or a list."""
        return Embeddings(self.image[rows], self.text[rows])

    def combine(self, parts: frozenset[str]) -> Tensor:
        """The feature of each example: the normalised sum of the embeddings that `parts` names, (N, D)."""
        chosen = [self.image] * ("img" in parts) + [self.text] * ("text" in parts)
        return F.normalize(torch.stack(chosen).sum(0), dim=-1)


@dataclass(frozen=True)
class Features:
    """Embeddings of both splits, and under which encoder, setting and data they hold."""

    train: Embeddings
    val: Embeddings
    encoder: str
    name: str
    fingerprint: str

    def queries(self, split: str, config: FeatureConfig) -> Tensor:
        """Features of the examples of a split as queries, (N, D)."""
        return getattr(self, split).combine(config.parts()[0])

    def icds(self, config: FeatureConfig) -> Tensor:
        """Features of the training examples as ICDs, (N, D)."""
        return self.train.combine(config.parts()[1])


def compute_features(data: VqaData, config: FeatureConfig, path: Path, device: str, track: Track) -> Features:
    """The features of a dataset, from the cache file `path` if it holds those of the same data and encoder."""
    fetch_model(config.encoder, "features.encoder")
    features = cached_features(data, config, path)
    if features is None:
        tensors = _encode_splits(data, config, device, track)
        write_tensors(path, tensors, {"fingerprint": _stamp(data, config), "encoder": config.encoder})
        features = cached_features(data, config, path)
    return features


def cached_features(data: VqaData, config: FeatureConfig, path: Path) -> Features | None:
    """The features in the cache file, None where it holds none of this data and encoder."""
    stamp = _stamp(data, config)
    tensors = _read_cache(path, stamp)
    if tensors is None:
        return None
    splits = {split: Embeddings(tensors[f"{split}_image"], tensors[f"{split}_text"]) for split in ("train", "val")}
    return Features(encoder=encoder_fingerprint(config.encoder), name=config.name, fingerprint=stamp, **splits)


def _stamp(data: VqaData, config: FeatureConfig) -> str:
    return fingerprint(data.fingerprint, list(data.skipped), encoder_fingerprint(config.encoder))


def encoder_fingerprint(encoder: str) -> str:
    """What identifies an encoder: its name and the digest of its weights; `hub` where they are not here yet."""
    folder = model_folder(encoder)
    name = Path(encoder.removeprefix("asset:").rstrip("/")).name
    return f"{name}@{weights_digest(folder) if folder else 'hub'}"


def same_encoder(one: str, other: str) -> bool:
    """Whether two fingerprints can be of one encoder: weights that are not here are taken at their name."""
    if one.endswith("@hub") or other.endswith("@hub"):
        return one.split("@")[0] == other.split("@")[0]
    return one.split("@")[1:] == other.split("@")[1:]


def _read_cache(path: Path, stamp: str) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") == stamp:
                # Copies: a file that is cut while it is mapped would take the process with it.
                return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError):
        return None  # missing, or cut by a full disk: made again
    return None


def _encode_splits(data: VqaData, config: FeatureConfig, device: str, track: Track) -> dict[str, Tensor]:
    encoder = ClipEncoder(config.encoder, device, config.batch_size)
    tensors = {}
    for split, examples in (("train", data.train_examples), ("val", data.val_examples)):
        asked = {example.image: example for example in reversed(examples)}  # each image and its first question
        row = {image: i for i, image in enumerate(asked)}
        of_image = encoder.images(_opened(track(asked.values(), f"CLIP, {split}: {len(asked)} images", len(asked))))
        tensors[f"{split}_image"] = of_image[[row[example.image] for example in examples]].contiguous()
        tensors[f"{split}_text"] = encoder.texts([example.question for example in examples])
    return tensors


def _opened(examples: Iterable[Example]) -> Iterator:
    """The image of each example; an error names the question too."""
    for example in examples:
        try:
            yield open_image(example.image)
        except LeverError as error:
            raise LeverError(f"question {example.question_id}: {error}") from error


class ClipEncoder:
    """A CLIPModel with its processor. Raises LeverError when it cannot be loaded."""

    def __init__(self, path: str, device: str, batch_size: int):
        transformers = import_transformers()
        self.device, self.batch_size = resolve_device(device), batch_size
        where = str(fetch_model(path, "features.encoder"))
        try:
            self.model = load_whole(transformers.CLIPModel, where, torch.float32).to(self.device)
            self.processor = transformers.CLIPProcessor.from_pretrained(where)
        except Exception as error:  # a directory of anybody's making: the library can fail on it in any way
            raise LeverError(
                f"cannot load the CLIP encoder {path}: {first_line(error)} (features.encoder: a cached hub id or a "
                "directory of a CLIPModel)"
            ) from error

    @torch.inference_mode()
    def images(self, images: Iterable) -> Tensor:
        """RGB `PIL.Image`s → unit embeddings (N, D), in batches."""
        rows = []
        for batch in _batches(images, self.batch_size):
            pixels = self.processor.image_processor(images=batch, return_tensors="pt")
            rows.append(self._unit(self.model.get_image_features(pixel_values=pixels["pixel_values"].to(self.device))))
        return torch.cat(rows)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts → unit embeddings (N, D); each distinct text is encoded once."""
        distinct = sorted(set(texts))
        row, rows = {text: i for i, text in enumerate(distinct)}, []
        for batch in _batches(distinct, self.batch_size):
            tokens = self.processor.tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            rows.append(self._unit(self.model.get_text_features(**tokens.to(self.device))))
        return torch.cat(rows)[[row[text] for text in texts]]

    @staticmethod
    def _unit(output) -> Tensor:
        embedding = output if isinstance(output, Tensor) else output.pooler_output
        return F.normalize(embedding.float(), dim=-1).cpu()


def _batches(items: Iterable, size: int) -> Iterable[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ---------------------------------------------------------------------- features of somebody's own


def read_embeddings(path: Path) -> Tensor:
    """An (N, D) matrix, float32: from `.safetensors` or `.npy`, or a torch file (`.pt`, `.pth`) of a tensor or a numpy
    array, alone or the only one of a dict. Raises LeverError on anything else; nothing in a file is executed."""
    if path.suffix == ".safetensors":
        content = _read_safetensors(path)
    elif path.suffix == ".npy":
        content = _read_npy(path)
    else:
        content = load_torch(path, expect=(Tensor, np.ndarray, dict), what="file of embeddings")
    if isinstance(content, dict):
        if len(content) != 1:
            raise LeverError(f"{path} holds {len(content)} tensors, expected one (N, D) matrix")
        (content,) = content.values()
    if isinstance(content, np.ndarray) and content.dtype.kind == "f":
        content = torch.from_numpy(content.astype(np.float32))
    if not isinstance(content, Tensor) or content.ndim != 2 or not content.is_floating_point():
        shape = f" {content.dtype} of shape {tuple(content.shape)}" if hasattr(content, "shape") else ""
        raise LeverError(f"{path} holds a {type(content).__name__}{shape}, expected (N, D) floats")
    return content.float()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise LeverError(f"cannot read the embeddings {path}: {error}") from error


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise LeverError(f"cannot read the embeddings {path}: {first_line(error)}") from error
