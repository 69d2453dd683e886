"""The processor of a Qwen2.5-VL: tokenizer, chat template and image processor, refused where one of them is missing."""

from pathlib import Path

from lever_lm.utils.errors import MendableError
from lever_lm.utils.hub import is_hub_id
from lever_lm.utils.safe_parse import read_object
from lever_lm.utils.terminal import shown
from lever_lm.utils.transformers_compat import first_line, import_transformers

_TEMPLATE = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")  # where a chat template can stand
_CLASS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")  # where its class is named
_PROBE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


def load_processor(path: str, folder: Path):
    """Return the processor of the model `path`, whose files are in `folder`, with a chat template that shows images.

    A template that stands in the tokenizer's config alone is used too. Raises MendableError, naming the files to fetch
    again, where the library knows no such processor, or where its parts are missing or of different models.
    """
    transformers = import_transformers()
    try:
        processor = transformers.AutoProcessor.from_pretrained(str(folder))
    except Exception as error:  # the library can fail in any way on a directory that is no such model
        raise _refused(path, first_line(error), (*_CLASS[:2], "tokenizer.json", "tokenizer_config.json")) from error
    if not hasattr(processor, "tokenizer") or not hasattr(getattr(processor, "image_processor", None), "merge_size"):
        named = next(filter(None, (read_object(folder / name).get("processor_class") for name in _CLASS)), None)
        what = f"its processor class is {shown(named)}" if named else "it names no processor class"
        what += f", which transformers {transformers.__version__} does not have for a Qwen2.5-VL"
        raise _refused(path, what, _CLASS)
    if not processor.chat_template:
        processor.chat_template = processor.tokenizer.chat_template
    if not processor.chat_template:
        raise _refused(path, "it has no chat template", _TEMPLATE[:2])
    token = read_object(folder / "config.json").get("image_token_id", getattr(processor, "image_token_id", None))
    try:
        text = processor.apply_chat_template(_PROBE, tokenize=False, add_generation_prompt=True)
        found = processor.tokenizer(text, add_special_tokens=False).input_ids.count(token)
    except Exception as error:  # a template is a program
        raise _refused(path, f"its chat template fails ({first_line(error)})", _TEMPLATE) from error
    if found != 1:
        what = f"its chat template and tokenizer make {found} image tokens (id {shown(token)}) of one image"
        raise _refused(path, what, (*_TEMPLATE, "tokenizer.json"))
    return processor


def _refused(path: str, what: str, files: tuple[str, ...]) -> MendableError:
    fetch = f"hf download {path}" if is_hub_id(path) else "they come with the weights"
    return MendableError(
        f"cannot load the processor of the LVLM {path}: {what}",
        f"fetch {', '.join(files[:-1])} or {files[-1]}, whichever its repository has, again ({fetch}), or name another "
        "model (--lvlm, lvlm.path)",
    )
