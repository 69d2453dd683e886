"""The processor of any image-text-to-text model: its options, and what its chat template and pixels must be able to do,
tried on a prompt of two demonstrations before any weights are loaded."""

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.data import Example
from lever_lm.lvlm.families import FAST, OTHER, check_model_type, model_type
from lever_lm.lvlm.prompt import Prompt, to_messages
from lever_lm.utils.errors import MendableError
from lever_lm.utils.hub import is_hub_id
from lever_lm.utils.terminal import shown
from lever_lm.utils.transformers_compat import first_line, import_transformers

# What an image processor takes beside the options of how an image is shown.
_PLUMBING = {"return_tensors", "device", "disable_grouping", "data_format", "input_data_format"}
_PLUMBING |= {"return_row_col_info", "image_seq_length"}
_BUDGET = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
_EXAMPLES = tuple(Example(i, i, f"Which one is number {i}?", (f"one of {i}",), (), f"image {i}") for i in range(3))
PROBE = Prompt(_EXAMPLES[:2], _EXAMPLES[2])
_SIZES = ((64, 48), (48, 64), (80, 80))


def load_generic_processor(config: LvlmConfig, prompt: PromptConfig, folder: Path):
    """Return the processor of the model in a folder, and the options with which it is to be called. Raises
    MendableError where the library has none, where its chat template or pixels are not for prompts of several images,
    and for an option that it does not take."""
    check_model_type(config.path, folder)
    library = import_transformers()
    try:
        processor = library.AutoProcessor.from_pretrained(str(folder), trust_remote_code=False)
        tokenizer, images = processor.tokenizer, processor.image_processor
        known = set(images.valid_kwargs.__annotations__) - _PLUMBING
    except Exception as error:  # the library can fail in any way on such a directory
        fetch = f"hf download {config.path}" if is_hub_id(config.path) else "they come with the weights"
        mend = "install it" if isinstance(error, ImportError) else f"fetch its processor's files again ({fetch})"
        found = f"cannot load the processor of the LVLM {config.path}: {first_line(error)}"
        raise MendableError(found, f"{mend}, or {OTHER}") from error
    options = _options(config, model_type(folder), dict(getattr(images, "size", None) or {}), known)
    try:
        if options:  # as its own, for what counts its tokens by them, and in every call, where a processor has others
            load = library.AutoImageProcessor.from_pretrained
            processor.image_processor = load(str(folder), trust_remote_code=False, **options)
        processor.chat_template = processor.chat_template or tokenizer.chat_template
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        _check_template(config.path, processor, prompt)
        _check_beams(config, model_type(folder), _try_pixels(processor, prompt, options))
    except MendableError:
        raise
    except Exception as error:
        given = ", ".join(f"lvlm.processor.{name}={value}" for name, value in config.processor.items())
        mend = f"another value of {given}" if given else OTHER
        raise _unfit(
            config.path, f"its processor fails on a prompt of three images: {first_line(error)}", mend
        ) from error
    return processor, options


def rendered(processor, prompt: Prompt, config: PromptConfig) -> str:
    """Return a prompt in the model's own chat template, up to where its answer begins."""
    return processor.apply_chat_template(to_messages(prompt, config), tokenize=False, add_generation_prompt=True)


def processed(processor, texts: Sequence[str], images: Sequence[list], options: dict):
    """Return what the model is given of rendered prompts and their images, padded on the left. Images stay nested by
    prompt: a processor may show one alone larger than one of several."""
    bos = processor.tokenizer.bos_token
    once = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}
    call = {"padding": True, "padding_side": "left", "return_tensors": "pt", "images_kwargs": options, **once}
    return processor(text=list(texts), images=list(images) if any(images) else None, **call)


def blank(size: tuple[int, int]):
    """Return a black `PIL.Image` of a width and height."""
    import PIL.Image

    return PIL.Image.new("RGB", size)


def without_images(prompt: Prompt) -> Prompt:
    """Return a prompt with all its images left out."""
    icds = tuple(replace(icd, image=None) for icd in prompt.icds)
    return replace(prompt, icds=icds, query=replace(prompt.query, image=None))


# ---------------------------------------------------------------------- options


def _options(config: LvlmConfig, kind: str, size: dict, known: set[str]) -> dict:
    """Return the options of a processor that takes the `known` ones: those of lvlm.processor over the budget of pixels,
    which is a part of its `size`. The budget's defaults are Qwen's, and so are meant for no other model."""
    for name in config.processor:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
            found = f"the processor of {config.path} has no option {shown(name)} (lvlm.processor)"
            raise MendableError(found, f"it has {', '.join(near or sorted(known))}")
    budget = {name: getattr(config, name) for name in _BUDGET}
    asked = {name: value for name, value in budget.items() if value != getattr(LvlmConfig, name)}
    bounded = budget.keys() <= known and {*_BUDGET.values()} <= size.keys()
    if asked and not bounded:
        found = f"the processor of {config.path} has no budget of pixels, found lvlm.{next(iter(asked))}"
        raise MendableError(found, f"leave it out, and bound images by lvlm.processor: {', '.join(sorted(known))}")
    options = {**(budget if kind in FAST else asked), **config.processor}
    edges = {_BUDGET[name]: options.pop(name) for name in _BUDGET if bounded and name in options}
    return {**({"size": {**size, **edges}} if edges else {}), **options}


# ---------------------------------------------------------------------- prompts of several images


def _check_template(path: str, processor, config: PromptConfig) -> None:
    """Raise MendableError unless the chat template writes the system text, and every image before its own question."""
    if processor.chat_template is None:
        mend = f"put one beside its config.json as chat_template.jinja, or take its chat version, or {OTHER}"
        raise _unfit(path, "it has no chat template, as base models have none", mend)
    silent = "--set prompt.system="
    try:
        text = rendered(processor, PROBE, config)
    except Exception as error:  # a template is a program
        if config.system and _renders(processor, replace(config, system="")):
            raise _unfit(path, f"its chat template refuses a system turn: {first_line(error)}", silent) from error
        raise _unfit(path, f"its chat template fails: {first_line(error)}", OTHER) from error
    if config.system.strip() not in text:
        raise _unfit(path, "its chat template leaves the system text out", silent)
    if "'type':" in text:
        raise _unfit(path, "its chat template takes messages of one text, not of parts", OTHER)
    apart = replace(config, style="dialogue")
    split = _renders(processor, apart) and _images_in_place(processor, apart) == len(PROBE.images)
    turns = "--set prompt.style=dialogue" if split else OTHER
    if any(words not in text for words in (*(e.question for e in _EXAMPLES), *(e.answer for e in PROBE.icds))):
        raise _unfit(path, "its chat template leaves texts of a turn out", turns)
    if (placed := _images_in_place(processor, config)) == len(PROBE.images):
        return
    alone = replace(without_images(PROBE), query=PROBE.query)
    if placed and len(rendered(processor, alone, config)) < len(text):
        found = "its chat template puts the images of a turn before all its texts, and not each before its question"
        raise _unfit(path, found, turns)
    raise _unfit(path, f"its chat template shows {'one image only' if placed else 'no image'}", turns)


def _renders(processor, config: PromptConfig) -> bool:
    try:
        return bool(rendered(processor, PROBE, config))
    except Exception:
        return False


def _images_in_place(processor, config: PromptConfig) -> int:
    """Return how many images of the probe stand between their own question and the one before it."""
    before = []
    for prompt in (PROBE, without_images(PROBE)):
        text, parts = rendered(processor, prompt, config), []
        for example in _EXAMPLES:
            part, _, text = text.partition(example.question)
            parts.append(len(part))
        before.append(parts)
    return sum(shown > bare for shown, bare in zip(*before, strict=True))


def _try_pixels(processor, config: PromptConfig, options: dict):
    """Return what the model is given of two prompts, of three images of different sizes and of one. The processor may
    fail in any way."""
    alone = replace(PROBE, icds=())
    texts = [rendered(processor, prompt, config) for prompt in (PROBE, alone)]
    return processed(processor, texts, [list(map(blank, _SIZES)), [blank(_SIZES[0])]], options)


def _check_beams(config: LvlmConfig, kind: str, made) -> None:
    """Raise MendableError where the library would show the beams of two prompts, `made`, images in a wrong order: older
    versions repeat each image, and not all of a prompt in turn, where a model lacks what orders them."""
    library, name = import_transformers(), "_expand_inputs_for_generation"
    model = library.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[library.CONFIG_MAPPING[kind]]
    ordered = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    repeats = not ordered and getattr(model, name) is getattr(library.GenerationMixin, name)
    if config.num_beams > 1 and repeats and any(len(tensor) != 2 for tensor in made.values()):  # not a row a prompt
        found = (
            f"lvlm.num_beams={config.num_beams}: transformers {library.__version__} mixes up the images that its beams"
        )
        raise _unfit(config.path, f"{found} are shown", "pip install -U transformers, or --set lvlm.num_beams=1")


def _unfit(path: str, found: str, mend: str) -> MendableError:
    return MendableError(f"cannot load the LVLM {path}: {found}", mend)
