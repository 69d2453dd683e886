"""Tiny models of the families of `transformers` with random weights, made offline: the library's own classes, the
shipped tokenizer with the tokens of each family, and chat templates in the manner of the real ones."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lever_lm.utils.paths import asset_path
from lever_lm.utils.transformers_compat import import_transformers

HIDDEN = 32
LANGUAGE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HIDDEN // 4,
    "max_position_embeddings": 4096,
}
TOWER = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, "vision_use_head": False, **TOWER}
SPREAD = 1.5  # of activations and logits: enough that answers vary
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass
class Parts:
    """What a family is made of: a tokenizer, a chat template, the values of a config, in which a token stands for its
    id, and a function from (library, tokenizer, template) to its processor. ends: tokens that end its answers beside
    the tokenizer's."""

    tokenizer: object
    template: str
    config: dict
    processor: Callable
    ends: tuple[str, ...] = ()


# ---------------------------------------------------------------------- tokenizers and chat templates


def tokens(*special: str, bos: str | None = None, eos: str = "<|im_end|>", **named: str):
    """Return the shipped tokenizer with further tokens. named: those that a processor asks for, as image_token=…; `bos`
    is put before every text, as Llama's and Gemma's tokenizers do."""
    from tokenizers import processors

    made = import_transformers().PreTrainedTokenizerFast(
        tokenizer_file=str(asset_path("asset:tiny-qwen2.5-vl") / "tokenizer.json"),
        **{"eos_token": eos, "pad_token": "<|endoftext|>", "extra_special_tokens": list(special), **named},
        **({"bos_token": bos} if bos else {}),
    )
    if bos:
        ids = [(bos, made.convert_tokens_to_ids(bos))]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    return made


def chat(turn: str, image: str, end: str, ask: str, *, start: str = "", images_first: bool = False) -> str:
    """Return a chat template. turn: what opens one, as Jinja of `role`; image: what stands for an image; end: what
    closes a turn; ask: what opens the answer. images_first: all images of a turn stand before its texts."""
    end, ask = (piece.replace("\n", "{{ '\\n' }}") for piece in (end, ask))
    texts, shown = "{{ part.text }}", f"{{% if part.type == 'image' %}}{image}{{% endif %}}"
    parts = f"{{% for part in m.content %}}{shown}{{% if part.type == 'text' %}}{texts}{{% endif %}}{{% endfor %}}"
    if images_first:
        written = f"{{% for part in m.content if part.type == 'text' %}}{texts}{{% endfor %}}"
        parts = f"{{% for part in m.content %}}{shown}{{% endfor %}}{written}"
    return (
        f"{start}{{% for m in messages %}}{{% set role = m.role %}}{turn}{parts}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{ask}{{% endif %}}"
    )


def chatml(image: str, **options) -> str:
    return chat("<|im_start|>{{ role }}\n", image, "<|im_end|>\n", "<|im_start|>assistant\n", **options)


SPOKEN = "{{ role.upper() if role != 'system' else '' }}{{ ': ' if role != 'system' else '' }}"
NAMED = "{{ role | capitalize }}:{{ '' if m.content[0].type == 'image' else ' ' }}"
# Gemma has no system turn: its text stands at the head of the first turn, and the model's role has another name.
GEMMA = """{{ bos_token }}{% set ns = namespace(before='') %}
{% for m in messages %}{% if m.role == 'system' %}{% set ns.before = m.content[0].text + '\n\n' %}
{% else %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ ns.before }}{% set ns.before = '' %}
{% for part in m.content %}{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}
{% endfor %}<end_of_turn>
{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}
{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content[0].text }}[/SYSTEM_PROMPT]{% elif m.role == 'user' %}[INST]
{%- for part in m.content %}{% if part.type == 'image' %}[IMG]{% else %}{{ part.text }}{% endif %}
{% endfor %}[/INST]{% else %}{{ m.content[0].text }}{{ eos_token }}{% endif %}{% endfor %}"""


# ---------------------------------------------------------------------- the families


def _qwen(kind: str, vision: dict, rope: dict, patch: int, more: dict | None = None) -> Parts:
    vision = {"patch_size": patch, "num_heads": 2, "depth": 2, **vision}
    language = {**LANGUAGE, "rope_parameters": {**ROPE, **rope}, **(more or {})}
    config = {
        "model_type": kind,
        "text_config": language,
        "vision_config": vision,
        "tie_word_embeddings": False,
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}.get(kind, "Qwen3VL")
    video = "Qwen3VLVideoProcessor" if name == "Qwen3VL" else "Qwen2VLVideoProcessor"

    def processor(library, tokenizer, template):
        images = library.Qwen2VLImageProcessor(patch_size=patch)
        return getattr(library, f"{name}Processor")(images, tokenizer, getattr(library, video)(), template)

    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = tokens("<|vision_start|>", "<|vision_end|>", **named)
    return Parts(tokenizer, chatml("<|vision_start|><|image_pad|><|vision_end|>"), config, processor)


def qwen2_vl() -> Parts:
    return _qwen("qwen2_vl", {"embed_dim": HIDDEN, "hidden_size": HIDDEN}, {"mrope_section": [1, 1, 2]}, 14)


def qwen2_5_vl() -> Parts:
    vision = {"hidden_size": HIDDEN, "out_hidden_size": HIDDEN, "intermediate_size": 64, "fullatt_block_indexes": [1]}
    return _qwen("qwen2_5_vl", vision, {"mrope_section": [1, 1, 2]}, 14)


_DEEP = {
    "hidden_size": HIDDEN,
    "out_hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}


def qwen3_vl() -> Parts:
    return _qwen("qwen3_vl", _DEEP, {"mrope_section": [2, 1, 1], "mrope_interleaved": True}, 16)


def qwen3_vl_moe() -> Parts:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _qwen("qwen3_vl_moe", _DEEP, {"mrope_section": [2, 1, 1], "mrope_interleaved": True}, 16, experts)


def qwen3_5() -> Parts:
    """The second layer is linear attention; its tower has no deeper features."""
    vision = {name: value for name, value in _DEEP.items() if name != "deepstack_visual_indexes"}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    linear |= {"linear_num_value_heads": 4, "layer_types": ["full_attention", "linear_attention"]}
    rope = {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    return _qwen("qwen3_5", vision, rope, 16, linear)


def internvl() -> Parts:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    vision = {**TOWER, "image_size": [56, 56], "patch_size": [14, 14]}
    config = {
        "model_type": "internvl",
        "image_seq_length": 4,
        "vision_config": vision,
        "tie_word_embeddings": False,
        "image_token_id": "<IMG_CONTEXT>",
        "text_config": {"model_type": "qwen2", **LANGUAGE},
    }

    def processor(library, tokenizer, template):
        images = library.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, max_patches=3)
        video = library.InternVLVideoProcessor()
        return library.InternVLProcessor(images, tokenizer, video, image_seq_length=4, chat_template=template)

    return Parts(tokens(**named), chatml("<IMG_CONTEXT>\n"), config, processor)


def gemma3() -> Parts:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    config = {
        "model_type": "gemma3",
        "tie_word_embeddings": False,
        "mm_tokens_per_image": 4,
        "image_token_index": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
        "text_config": {
            **LANGUAGE,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
            "query_pre_attn_scalar": 1,
        },
        "vision_config": {**TOWER, "image_size": 56, "patch_size": 14, "vision_use_head": False},
    }

    def processor(library, tokenizer, template):
        images = library.Gemma3ImageProcessor(size={"height": 56, "width": 56})
        return library.Gemma3Processor(images, tokenizer, template, image_seq_length=4)

    special = ("<start_of_turn>", "<end_of_turn>")
    return Parts(tokens(*special, bos="<bos>", eos="<eos>", **named), GEMMA, config, processor, ("<end_of_turn>",))


def _idefics3(kind: str, image_processor: str) -> Parts:
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
    special = ("<fake_token_around_image>", "<image>", "<global-img>", *rows)
    config = {
        "model_type": kind,
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "image_token_id": "<image>",
        "text_config": {"model_type": "llama", **LANGUAGE},
        "vision_config": {**TOWER, "image_size": 56, "patch_size": 14},
    }

    def processor(library, tokenizer, template):
        edges = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
        images = getattr(library, image_processor)(**edges)
        if kind == "idefics3":
            return library.Idefics3Processor(images, tokenizer, 4, template)
        module = library.models.smolvlm.processing_smolvlm
        module.num2words = module.num2words or str  # a package for the words of videos
        return library.SmolVLMProcessor(images, tokenizer, library.SmolVLMVideoProcessor(), 4, template)

    template = chat(NAMED, "<image>", "<end_of_utterance>\n", "Assistant:", start="<|im_start|>")
    return Parts(tokens(*special, eos="<end_of_utterance>"), template, config, processor)


def idefics3() -> Parts:
    return _idefics3("idefics3", "Idefics3ImageProcessor")


def smolvlm() -> Parts:
    return _idefics3("smolvlm", "SmolVLMImageProcessor")


def idefics2() -> Parts:
    language = {"model_type": "mistral", **LANGUAGE, "sliding_window": None}
    config = {
        "model_type": "idefics2",
        "text_config": language,
        "tie_word_embeddings": False,
        "image_token_id": "<image>",
        "vision_config": {**TOWER, "image_size": 70, "patch_size": 14},
        "perceiver_config": {
            "hidden_size": HIDDEN,
            "resampler_n_latents": 3,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
    }

    def processor(library, tokenizer, template):
        images = library.Idefics2ImageProcessor(
            size={"longest_edge": 70, "shortest_edge": 28}, do_image_splitting=False
        )
        return library.Idefics2Processor(images, tokenizer, 3, template)

    special = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    template = chat(NAMED, "<image>", "<end_of_utterance>\n", "Assistant:")
    return Parts(tokens(*special, bos="<s>", eos="</s>"), template, config, processor, ("<end_of_utterance>",))


_PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def llava_onevision() -> Parts:
    config = {
        "model_type": "llava_onevision",
        "image_grid_pinpoints": _PINPOINTS,
        "tie_word_embeddings": False,
        "image_token_index": "<image>",
        "video_token_index": "<video>",
        "text_config": {"model_type": "qwen2", **LANGUAGE},
        "vision_config": SIGLIP,
    }

    def processor(library, tokenizer, template):
        edges = {"size": {"height": 56, "width": 56}, "image_grid_pinpoints": _PINPOINTS}
        video, images = library.LlavaOnevisionVideoProcessor(), library.LlavaOnevisionImageProcessor(**edges)
        kept = {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "chat_template": template}
        return library.LlavaOnevisionProcessor(images, tokenizer, video, **kept)

    named = {"image_token": "<image>", "video_token": "<video>"}
    return Parts(tokens(**named), chatml("<image>\n", images_first=True), config, processor)


def _llava(kind: str, make: Callable) -> Parts:
    config = {
        "model_type": kind,
        "tie_word_embeddings": False,
        "image_token_index": "<image>",
        "text_config": {"model_type": "llama", **LANGUAGE},
        "vision_config": {"model_type": "clip_vision_model", **TOWER, "image_size": 56, "patch_size": 14},
    }
    if kind == "llava_next":
        config["image_grid_pinpoints"] = _PINPOINTS

    def processor(library, tokenizer, template):
        kept = {"patch_size": 14, "vision_feature_select_strategy": "default", "chat_template": template}
        return make(library)(tokenizer=tokenizer, num_additional_image_tokens=1, **kept)

    template = chat(SPOKEN, "<image>\n", " ", "ASSISTANT:", images_first=True)
    return Parts(tokens(bos="<s>", eos="</s>", image_token="<image>"), template, config, processor)


def llava() -> Parts:
    def make(library):
        edges = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
        return lambda **kept: library.LlavaProcessor(library.CLIPImageProcessor(**edges), **kept)

    return _llava("llava", make)


def llava_next() -> Parts:
    def make(library):
        edges = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
        images = library.LlavaNextImageProcessor(**edges, image_grid_pinpoints=_PINPOINTS)
        return lambda **kept: library.LlavaNextProcessor(images, **kept)

    return _llava("llava_next", make)


def mistral3() -> Parts:
    config = {
        "model_type": "mistral3",
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
        "image_token_index": "[IMG]",
        "text_config": {"model_type": "mistral", **LANGUAGE, "sliding_window": None},
        "vision_config": {"model_type": "pixtral", **TOWER, "head_dim": 16, "image_size": 112, "patch_size": 14},
    }

    def processor(library, tokenizer, template):
        images = library.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
        kept = {"patch_size": 14, "spatial_merge_size": 2, "chat_template": template}
        return library.PixtralProcessor(images, tokenizer, **kept)

    special = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    return Parts(tokens(*special, bos="<s>", eos="</s>"), MISTRAL, config, processor)


def aya_vision() -> Parts:
    language = {"model_type": "cohere2", **LANGUAGE, "sliding_window": 64, "tie_word_embeddings": False}
    config = {
        "model_type": "aya_vision",
        "downsample_factor": 2,
        "text_config": language,
        "tie_word_embeddings": False,
        "image_token_index": "<|IMG_PATCH|>",
        "vision_config": SIGLIP,
    }

    def processor(library, tokenizer, template):
        edges = {"size": {"height": 56, "width": 56}, "max_patches": 3, "crop_to_patches": True}
        kept = {"patch_size": 14, "img_size": 56, "downsample_factor": 2, "chat_template": template}
        return library.AyaVisionProcessor(library.GotOcr2ImageProcessor(**edges), tokenizer, **kept)

    special = (
        *(
            "<|START_OF_IMG|>",
            "<|END_OF_IMG|>",
            "<|IMG_PATCH|>",
            "<|IMG_LINE_BREAK|>",
            "TILE",
            "TILE_GLOBAL",
            "<image>",
        ),
        *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    )
    opens = "<|START_OF_TURN_TOKEN|>{{ '<|CHATBOT_TOKEN|>' if role == 'assistant' else '<|USER_TOKEN|>' }}"
    ask = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    template = chat(opens, "<image>", "<|END_OF_TURN_TOKEN|>", ask, start="{{ bos_token }}")
    return Parts(tokens(*special, bos="<BOS>", eos="<|END_OF_TURN_TOKEN|>"), template, config, processor)


def paddleocr_vl() -> Parts:
    config = {
        "model_type": "paddleocr_vl",
        "tie_word_embeddings": False,
        "image_token_id": "<|IMAGE_PLACEHOLDER|>",
        "vision_start_token_id": "<|IMAGE_START|>",
        "vision_end_token_id": "<|IMAGE_END|>",
        "text_config": {**LANGUAGE, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
        "vision_config": {**TOWER, "image_size": 56, "patch_size": 14},
    }

    def processor(library, tokenizer, template):
        images = library.PaddleOCRVLImageProcessor(min_pixels=28 * 28, max_pixels=112 * 112)
        return library.PaddleOCRVLProcessor(images, tokenizer, template)

    image = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    template = chat(NAMED, image, "\n", "Assistant: ", start="<|begin_of_sentence|>")
    special = ("<|begin_of_sentence|>", "<|IMAGE_START|>", "<|IMAGE_END|>")
    return Parts(tokens(*special, eos="</s>", image_token="<|IMAGE_PLACEHOLDER|>"), template, config, processor)


FAMILIES = {
    made.__name__: made
    for made in (
        *(qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5, internvl, gemma3, smolvlm, idefics3, idefics2),
        *(llava_onevision, llava, llava_next, mistral3, aya_vision, paddleocr_vl),
    )
}


# ---------------------------------------------------------------------- on disk


def write_family(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny model of a family with its processor. Returns the folder."""
    library, parts = import_transformers(), FAMILIES[name]()
    tokenizer = parts.tokenizer
    processor = parts.processor(library, tokenizer, parts.template)
    config = {key: tokenizer.convert_tokens_to_ids(v) if "_token_i" in key else v for key, v in parts.config.items()}
    config["text_config"] = {
        **config["text_config"],
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = library.AutoModelForImageTextToText.from_config(library.AutoConfig.for_model(**config))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:  # as wide as their input is long, so that nothing fades
                inputs = weights.shape[1] if weights.ndim == 3 else weights[0].numel()
                weights.normal_(0, SPREAD / inputs**0.5, generator=draw)
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(parts.ends))]
    model.generation_config = library.GenerationConfig(
        eos_token_id=ends, do_sample=True, temperature=0.7, repetition_penalty=1.5, no_repeat_ngram_size=1
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
