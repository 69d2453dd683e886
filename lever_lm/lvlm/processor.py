"""The processor of a model: tokenizer, chat template and image processor, refused where one of them is missing."""

from copy import copy
from functools import lru_cache
from pathlib import Path

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.lvlm.families import family_of
from lever_lm.lvlm.generic_processor import load_generic_processor
from lever_lm.utils.errors import MendableError
from lever_lm.utils.hub import is_hub_id, state_of
from lever_lm.utils.safe_parse import read_object
from lever_lm.utils.transformers_compat import first_line, import_transformers

_FILES = "tokenizer.json, tokenizer_config.json, chat_template.jinja, processor_config.json, preprocessor_config.json"
_PROBE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


def processor_of(config: LvlmConfig, prompt: PromptConfig, folder: Path):
    """Return the processor of the model in a folder, checked for what its family needs. Raises MendableError."""
    if family_of(config, folder) == "generic":
        return load_generic_processor(config, prompt, folder)[0]
    return load_processor(config.path, folder)


def load_processor(path: str, folder: Path):
    """Return the processor of the Qwen `path`, whose files are in `folder`, with a chat template that shows images.

    A template that stands in the tokenizer's config alone is used too. Raises MendableError, naming the files to fetch
    again, where the library knows no such processor, or where its parts are missing or of different models.
    """
    made = copy(_load_processor(path, folder, state_of(folder)))
    made.image_processor = copy(made.image_processor)  # whose sizes are the caller's to set
    return made


@lru_cache(2)  # it is checked before any work, and loaded with the model
def _load_processor(path: str, folder: Path, state: tuple):
    transformers = import_transformers()
    try:
        processor = transformers.AutoProcessor.from_pretrained(str(folder), trust_remote_code=False)
        if not hasattr(getattr(processor, "image_processor", None), "merge_size"):
            raise ValueError(f"transformers {transformers.__version__} finds no class of it that a Qwen2.5-VL has")
        token = read_object(folder / "config.json").get("image_token_id", getattr(processor, "image_token_id", None))
        processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
        text = processor.apply_chat_template(_PROBE, tokenize=False, add_generation_prompt=True)
        found = processor.tokenizer(text, add_special_tokens=False).input_ids.count(token)
        if found != 1:
            raise ValueError(f"its chat template and tokenizer make {found} image tokens of one image")
    except Exception as error:  # the library can fail in any way on such a directory, and a template is a program
        fetch = f"hf download {path}" if is_hub_id(path) else "they come with the weights"
        raise MendableError(
            f"cannot load the processor of the LVLM {path}: {first_line(error)}",
            f"fetch {_FILES}, those that its repository has, again ({fetch}), or name another model (--lvlm, "
            "lvlm.path)",
        ) from error
    return processor
