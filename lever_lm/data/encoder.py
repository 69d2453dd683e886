"""The encoder: a model of `transformers` that makes vectors of images and of texts which can be compared.

Whatever has `get_image_features` and `get_text_features` is one: CLIP, SigLIP, SigLIP 2, Chinese-CLIP, AltCLIP, …
N images or texts, B of them in a batch, D numbers in a vector.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lever_lm.utils.checks import Check, check_model
from lever_lm.utils.device import resolve_device
from lever_lm.utils.errors import LeverError, MendableError
from lever_lm.utils.hub import fetch_model, model_folder, state_of
from lever_lm.utils.progress import WORTH_A_WORD, Track, Work, untracked
from lever_lm.utils.safe_parse import read_object
from lever_lm.utils.terminal import shown
from lever_lm.utils.transformers_compat import first_line, import_transformers, load_whole, quiet

_OPTION = "features.encoder"
_OTHER = f"--set {_OPTION}=DIR or OWNER/NAME of a CLIP, SigLIP, SigLIP 2, Chinese-CLIP or AltCLIP"
_FUNCTIONS = ("get_image_features", "get_text_features")
# model_type of the models that learnt from texts padded to one length: SigLIP's vector is that of the last place.
_PADDED = ("siglip", "siglip2", "tipsv2")
_POSITIONS = 512  # of a text model that names no number of them


def check_encoder(path: str) -> Check:
    """Check that an encoder's files are here, and that the library knows it as one. No weights are read."""
    folder = model_folder(path)
    try:
        if folder:
            _encoder_class(path, folder)  # before its files: a model of another kind lacks none
        check = check_model(_OPTION, path)
        if check.status == "ok":
            _load_processors(path, folder)
    except MendableError as error:
        return Check(_OPTION, "missing", error.found, error.mend)
    return check


def fetch_encoder(path: str) -> Path:
    """Return the folder of an encoder, downloaded where it is not here. Raises LeverError where it is not to be had or
    no encoder."""
    if here := model_folder(path):
        _encoder_class(path, here)
    folder = fetch_model(path, _OPTION)
    _encoder_class(path, folder)
    return folder


def _encoder_class(path: str, folder: Path) -> type | None:
    """Return the library's class of the model in a folder, None without a config.json. Raises MendableError where it
    has not both functions."""
    return _class_of(path, folder, state_of(folder)) if (folder / "config.json").is_file() else None


@lru_cache(2)  # it is checked before any work, and again when it is loaded
@quiet()
def _class_of(path: str, folder: Path, state: tuple) -> type:
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the library can fail on an untrusted file in any way
        described, why = read_object(folder / "config.json"), first_line(error)
        if "auto_map" in described:
            kind = shown(described.get("model_type"))
            why = f"{kind} is known to code that comes with it alone, and such code is not run"
        raise MendableError(f"the encoder {path} cannot be used: {why}", _OTHER) from error
    made = transformers.MODEL_MAPPING.get(type(config), None)
    lacks = [name for name in _FUNCTIONS if not hasattr(made, name)]
    if lacks:
        name = getattr(made, "__name__", config.model_type)
        raise MendableError(f"{path} is a {name}, which has no {' and no '.join(lacks)}", _OTHER)
    return made


def _load_processors(path: str, folder: Path) -> tuple:
    """Return an encoder's tokenizer and its image processor. Raises MendableError where one cannot be loaded."""
    return _processors_of(path, folder, state_of(folder))


@lru_cache(2)
@quiet()
def _processors_of(path: str, folder: Path, state: tuple) -> tuple:
    transformers = import_transformers()
    loaders = {"tokenizer": transformers.AutoTokenizer, "image processor": transformers.AutoImageProcessor}
    loaded = {}
    for what, loader in loaders.items():
        try:
            loaded[what] = loader.from_pretrained(str(folder), trust_remote_code=False)
            if what == "tokenizer" and len(loaded[what]) <= len(set(loaded[what].all_special_ids)):
                raise ValueError("its vocabulary is empty")
        except Exception as error:
            mend = "pip install what it names" if isinstance(error, ImportError) else "fetch its files again"
            why = first_line(error).split(". ")[0]
            raise MendableError(
                f"cannot load the {what} of the encoder {path}: {why}", f"{mend}, or {_OTHER}"
            ) from error
    return tuple(loaded.values())


class FeatureEncoder:
    """A model with its tokenizer and image processor. Raises LeverError when it cannot be loaded, or makes no vectors
    of one size."""

    def __init__(self, path: str, device: str, batch_size: int):
        self.path, self.device, self.batch_size = path, resolve_device(device), batch_size
        folder = fetch_encoder(path)
        self.tokenizer, self.image_processor = _load_processors(path, folder)
        try:
            with quiet():
                self.model = load_whole(_encoder_class(path, folder), str(folder), torch.float32).to(self.device)
            self.form = _form(self.tokenizer, self.model)
            self._try_out()
        except Exception as error:  # the library can fail on an untrusted directory in any way
            raise LeverError(f"cannot load the encoder {path}: {first_line(error)}; {_OTHER}") from error

    @torch.inference_mode()
    def images(self, images: Iterable) -> Tensor:
        """RGB `PIL.Image`s → unit embeddings (N, D), in batches."""
        rows = []
        for batch in _batches(images, self.batch_size):
            pixels = self.image_processor(images=batch, return_tensors="pt")
            rows.append(self._vectors(self.model.get_image_features, pixels))
        return torch.cat(rows)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], track: Track = untracked, what: str = "texts") -> Tensor:
        """Texts → unit embeddings (N, D); each distinct text is encoded once. A text that is longer than the model
        reads is cut."""
        distinct = sorted(set(texts))
        row, rows = {text: i for i, text in enumerate(distinct)}, []
        followed = track(Work(distinct, "questions", after=WORTH_A_WORD), what, len(distinct))
        for batch in _batches(followed, self.batch_size):
            tokens = self.tokenizer(batch, truncation=True, return_tensors="pt", **self.form)
            rows.append(self._vectors(self.model.get_text_features, tokens))
        return torch.cat(rows)[[row[text] for text in texts]]

    def _vectors(self, function: Callable, inputs) -> Tensor:
        """Return unit vectors (B, D): all that the processor made is given to the model. Its features are a tensor, or
        the pooled ones of an output, as the versions of the library have it."""
        output = function(**inputs.to(self.device))
        rows = output if isinstance(output, Tensor) else output.pooler_output
        if getattr(rows, "ndim", 0) != 2:
            found = "none" if rows is None else f"a tensor of shape {tuple(rows.shape)}"
            raise ValueError(f"its {function.__name__} is to make one vector of each, and makes {found}")
        return F.normalize(rows.float(), dim=-1).cpu()

    def _try_out(self) -> None:
        """Raise ValueError where the vectors of an image and of a text cannot be compared."""
        from PIL import Image

        image, text = self.images([Image.new("RGB", (64, 48))]), self.texts(["What is this?", "this"])
        if image.shape[1] != text.shape[1]:
            raise ValueError(f"its images have {image.shape[1]} dimensions, its texts {text.shape[1]}")


def _form(tokenizer, model) -> dict:
    """Return how texts are padded and how many tokens of one are read: as many as the tokenizer says, and not more
    than the model has positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _POSITIONS
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # RoBERTa's are counted from there
    padding = "max_length" if model.config.model_type in _PADDED else True
    return {"padding": padding, "max_length": min(tokenizer.model_max_length, positions)}


def _batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
