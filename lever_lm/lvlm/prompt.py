"""From chosen ICDs and a query to a conversation, and from what the model wrote back to an answer."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lever_lm.config.schema import PromptConfig
from lever_lm.data import Example, Image

# Where the model goes on with the next turn, in any case: no answer holds one of these words with its colon.
_NEXT_TURN = r"(?:question|(?:short )?answer):"
_END = {
    True: re.compile(rf"\n|, |{_NEXT_TURN}", re.IGNORECASE),  # an answer holds no comma and blank
    False: re.compile(rf"\n|{_NEXT_TURN}", re.IGNORECASE),
}
_HEADING = re.compile(r"(?:\s*(?:short )?answer:)*\s*", re.IGNORECASE)
_CLASSIC_END = re.compile(r"\n|Question|Answer|Short|, ")


@dataclass(frozen=True)
class Prompt:
    """ICDs in the order they stand in the prompt, then the query; an example may be shown without an image. bare: the
    query's question stands alone, without the words of the template."""

    icds: tuple[Example, ...]
    query: Example
    bare: bool = False

    @property
    def images(self) -> list[Image]:
        """Return the images in the order of the prompt; the query's is the last."""
        return [example.image for example in (*self.icds, self.query) if example.image is not None]


def build_prompt(picks: Sequence[Example], query: Example, config: PromptConfig) -> Prompt:
    """Return the prompt of a sequence of picks, first pick first.

    By default the first pick stands nearest the query: the model trusts that place most, and a policy that never sees
    its earlier picks cannot learn to put its best last.
    """
    return Prompt(tuple(in_prompt_order(picks, config)), query)


def in_prompt_order(picks: Sequence, config: PromptConfig) -> list:
    """Return picks, first pick first, in the order in which they stand in the prompt."""
    return list(reversed(picks)) if config.order == "first_pick_last" else list(picks)


def wording(config: PromptConfig) -> dict:
    """Return the options that change what a model is asked: all but the rule that cuts its answer. No system text is
    None: before 0.2 it was a turn without text, whose answers are others."""
    return {name: value for name, value in vars(config).items() if name != "cut"} | {"system": config.system or None}


def holder(prompt: Prompt, token: str) -> str:
    """Name the question of a prompt whose text or answer holds a token of the model's own; for a message."""
    examples = (*prompt.icds, prompt.query)
    named = (f"question {e.question_id}" for e in examples if token in e.question or token in e.answer)
    return next(named, "prompt.template, prompt.system")


def _placeholder(image: Image) -> dict:
    return {"type": "image"}


def to_messages(prompt: Prompt, config: PromptConfig, show: Callable[[Image], dict] = _placeholder) -> list[dict]:
    """Return the conversation of a prompt for a chat template. show: returns the part of a message for an image."""
    before, rest = config.template.split("{question}")  # a question itself is never parsed for braces
    between = rest.removesuffix("{answer}")

    def shown(example: Example, after: str | None = None) -> list[dict]:
        image = [] if example.image is None else [show(example.image)]
        text = f"{before}{example.question}{between}"
        if after is None:
            text = example.question if prompt.bare and example is prompt.query else text.rstrip()
        return [*image, _text(text + (after or ""))]

    messages = [{"role": "system", "content": [_text(config.system)]}] if config.system else []
    if config.style == "interleaved":
        demonstrations = [part for icd in prompt.icds for part in shown(icd, icd.answer + config.separator)]
        return [*messages, {"role": "user", "content": [*demonstrations, *shown(prompt.query)]}]
    for icd in prompt.icds:
        messages.append({"role": "user", "content": shown(icd)})
        messages.append({"role": "assistant", "content": [_text(icd.answer)]})
    return [*messages, {"role": "user", "content": shown(prompt.query)}]


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def cut_answer(text: str, rule: str = PromptConfig.cut) -> str:
    """Return the answer in what the model wrote, stripped.

    rule `turn`: a heading `Answer:` or `Short answer:` is dropped; the answer ends at a line break, where the model
    goes on with the next turn (`Question:`, `Answer:`, `Short answer:`), and at `, `, which no answer of VQA holds.
    `line` is the same without the comma. `classic`, the rule of Lever-Plus: it ends at a line break, at `, `, and at
    Question, Answer or Short with a capital, even within a word: nothing is left of `Shorts`.
    """
    if rule == "classic":
        return _CLASSIC_END.split(text.lstrip(), maxsplit=1)[0].strip()
    return _END[rule == "turn"].split(text[_HEADING.match(text).end() :], maxsplit=1)[0].strip()
