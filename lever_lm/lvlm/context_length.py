"""The context of a server: a prompt that leaves no room for its answer is refused before anything is asked."""

from collections.abc import Sequence

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.data import Image, open_image
from lever_lm.lvlm.images import TOKEN_EDGE, image_tokens
from lever_lm.lvlm.openai_client import TOO_LONG, ServerError
from lever_lm.lvlm.openai_servers import Served
from lever_lm.lvlm.processor import load_processor
from lever_lm.lvlm.prompt import Prompt, to_messages
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import model_folder

_CHARACTERS = 6  # of text in a token: more than there are, so that no prompt is refused that fits
_TURN = 32  # tokens that a chat template puts around a turn and its images: more than there are


class Room:
    """The room of the servers that were looked at: the least `max_model_len` that one of them gives, as vLLM does.

    Image tokens are counted. Texts are counted where the model's tokenizer is here; else they are taken for a little
    shorter than they are, and the server itself refuses a prompt that is too long by less than that.
    """

    def __init__(self, config: LvlmConfig, prompt: PromptConfig, served: Sequence[Served]):
        self.config, self.prompt = config, prompt
        limits = [(one.card.get("max_model_len"), one.url) for one in served]
        self.most, self.url = min(
            ((limit, url) for limit, url in limits if type(limit) is int and limit > 0), default=(None, "")
        )
        folder = None if self.most is None else model_folder(config.path)
        try:
            self._processor = None if folder is None else load_processor(config.path, folder)
        except LeverError:  # the server has its own
            self._processor = None
        self._images: dict[Image, int] = {}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise LeverError for a prompt that leaves the answer no room. Images are opened and texts are counted only
        where the largest images and the longest texts would not fit."""
        if self.most is None:
            return
        room, largest = self.most - self.config.max_new_tokens, self.config.max_pixels // TOKEN_EDGE**2
        for prompt in prompts:
            messages, shown = to_messages(prompt, self.prompt), len(prompt.images)
            text = "".join(part.get("text", "") for turn in messages for part in turn["content"])
            if len(text.encode()) + _TURN * len(messages) + largest * shown <= room:
                continue
            tokens = self._text_tokens(messages, text) + sum(map(self._image_tokens, prompt.images))
            if tokens > room:
                count = tokens if self._processor else f"at least {tokens}"
                raise ServerError(
                    f"question {prompt.query.question_id}: its prompt of {shown} images has {count} tokens, and the "
                    f"server {self.url} has room for {room} beside an answer of {self.config.max_new_tokens}",
                    TOO_LONG,
                )

    def _text_tokens(self, messages: list[dict], text: str) -> int:
        """Return the tokens of a prompt beside those of its images."""
        if self._processor is None:
            return len(text) // _CHARACTERS
        whole = self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self._processor.tokenizer(whole, add_special_tokens=False).input_ids
        return len(ids) - sum(part["type"] == "image" for turn in messages for part in turn["content"])

    def _image_tokens(self, image: Image) -> int:
        if image not in self._images:
            self._images[image] = image_tokens(open_image(image), self.config)
        return self._images[image]
