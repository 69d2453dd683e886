"""Tokenizer, chat template and processor of the tiny Qwens, and the prompts it is trained on.

The prompt styles are those of `lever_lm`: "interleaved", one user turn that holds every ICD and the query, and
"dialogue", one user/assistant exchange per ICD.
"""

import json

from assets_src import codes
from assets_src.digit_images import IMAGE_SIZE
from assets_src.knowledge import DIGIT_WORDS, QUESTION_TYPES

PATCH_SIZE, MERGE_SIZE = 14, 2  # Qwen2.5-VL's own
VOCAB_SIZE = 1024
STYLES = ("interleaved", "dialogue")
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_CHAT_CORPUS = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "Describe the image."] * 20
CHAT_TEMPLATE = r"""
{%- macro turn(role, content) -%}
    {{- '<|im_start|>' + role + '\n' -}}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception("a prompt holds parts of type 'image' and 'text', not '" ~ part.type ~ "'") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endmacro -%}
{%- if messages[0].role != 'system' -%}
    {{- turn('system', 'You are a helpful assistant.') -}}
{%- endif -%}
{%- for message in messages -%}
    {{- turn(message.role, message.content) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""".lstrip()


def question_text(question: str) -> str:
    return f"Question: {question} Short answer:"


def chat_messages(shots: list[tuple[str, str]], question: str, style: str) -> list[dict]:
    """The chat of a prompt: shots are (question, answer) pairs in prompt order; images are left to the processor."""

    def segment(text: str) -> list[dict]:
        return [{"type": "image"}, {"type": "text", "text": text}]

    if style == "interleaved":
        parts = [part for q, a in shots for part in segment(f"{question_text(q)} {a}\n")]
        return [{"role": "user", "content": parts + segment(question_text(question))}]
    messages = []
    for q, a in shots:
        messages += [{"role": "user", "content": segment(question_text(q))}, {"role": "assistant", "content": a}]
    return [*messages, {"role": "user", "content": segment(question_text(question))}]


def codes_corpus() -> list[str]:
    """The same for the sister world, with every style and every syllable as one token, after a blank and without."""
    corpus = [question_text(w.format(style)) for w in codes.WORDINGS for style in codes.STYLES]
    for syllable in (*codes.FIRST, *codes.SECOND):
        corpus += [f" {syllable} {syllable}\n", f"{syllable} {syllable}"] * 40
    corpus += [f" {style}" for style in codes.STYLES] * 40
    return corpus + _CHAT_CORPUS


def digits_corpus() -> list[str]:
    """Text whose pieces BPE should merge: answers weigh more than questions, so that every answer word is one token."""
    corpus = []
    for question_type in QUESTION_TYPES.values():
        corpus += [question_text(q) for q in question_type.paraphrases] * 4
        for digit, answer in enumerate(question_type.answers):
            for text in [answer] * 4 + list(question_type.synonyms.get(digit, ())):
                corpus += [f" {text}\n", text, f"answer: {text}"] * 4
    corpus += _CHAT_CORPUS
    for word in (*DIGIT_WORDS, "yes", "no"):
        corpus += [word, " " + word] * 3
    return corpus


def build_tokenizer(corpus: list[str]):
    """A Qwen2 tokenizer (byte-level BPE, Qwen's own pre-tokenisation and special tokens) of 1,024 entries."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    learned = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        model_max_length=4096,
        padding_side="left",
    )


def build_processor(corpus: list[str], family: str):
    """The real processor of a family around the tiny tokenizer; needs `import_transformers()` before."""
    import transformers

    patches = {"patch_size": PATCH_SIZE, "merge_size": MERGE_SIZE}
    pixels = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": 1280 * (PATCH_SIZE * MERGE_SIZE) ** 2}
    processor, video = {
        "qwen2_5_vl": (transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor),
        "qwen3_vl": (transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor),
    }[family]
    return processor(
        image_processor=transformers.Qwen2VLImageProcessorPil(size=pixels, **patches),
        tokenizer=build_tokenizer(corpus),
        video_processor=video(**patches),
        chat_template=CHAT_TEMPLATE,
    )
