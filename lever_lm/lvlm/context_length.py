"""The context of a server: a prompt that leaves no room for its answer is refused before anything is asked."""

from collections.abc import Sequence

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.data import Image, open_image
from lever_lm.lvlm.images import TOKEN_EDGE, image_tokens
from lever_lm.lvlm.openai_client import TOO_LONG, ServerError
from lever_lm.lvlm.openai_servers import Served
from lever_lm.lvlm.prompt import Prompt, to_messages

_CHARACTERS = 6  # of text in a token: more than there are, so that no prompt is refused that fits


class Room:
    """The room of the servers that were looked at: the least `max_model_len` that one of them gives, as vLLM does.

    Image tokens are counted. Texts are taken for a little shorter than they are: the server itself refuses a prompt
    that is too long by less than that.
    """

    def __init__(self, config: LvlmConfig, prompt: PromptConfig, served: Sequence[Served]):
        self.config, self.prompt = config, prompt
        limits = [(one.card.get("max_model_len"), one.url) for one in served]
        limits = [(limit, url) for limit, url in limits if type(limit) is int and limit > 0]
        self.most, self.url = min(limits, default=(None, ""))
        self._images: dict[Image, int] = {}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ServerError for a prompt that leaves the answer no room. Images are opened only where the largest ones
        would not fit."""
        if self.most is None:
            return
        room, largest = self.most - self.config.max_new_tokens, self.config.max_pixels // TOKEN_EDGE**2
        for prompt in prompts:
            turns = to_messages(prompt, self.prompt)
            text = sum(len(part.get("text", "")) for turn in turns for part in turn["content"]) // _CHARACTERS
            if text + largest * len(prompt.images) <= room:
                continue
            tokens = text + sum(map(self._image_tokens, prompt.images))
            if tokens > room:
                raise ServerError(
                    f"question {prompt.query.question_id}: its prompt of {len(prompt.images)} images has at least "
                    f"{tokens} tokens, and the server {self.url} has room for {room} beside an answer of "
                    f"{self.config.max_new_tokens}",
                    TOO_LONG,
                )

    def _image_tokens(self, image: Image) -> int:
        if image not in self._images:
            self._images[image] = image_tokens(open_image(image), self.config)
        return self._images[image]
