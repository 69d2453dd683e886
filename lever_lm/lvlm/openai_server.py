"""A vision-language model behind an OpenAI-compatible server: images as data URLs, many requests at once.

What the server does itself: chat template, tokenizer, vision tower, batching. Ours are the conversation, the image
budget and greedy decoding. Log-probs of an answer need a server that scores a prompt's tokens; vLLM does.
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from queue import Empty, SimpleQueue

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.data import open_image
from lever_lm.lvlm.images import TOKEN_EDGE, DataUrls, image_tokens
from lever_lm.lvlm.openai_client import NO_LOG_PROBS, SCORING, SEE_LOG, TOO_LONG, ServerError, served_name
from lever_lm.lvlm.openai_servers import Servers, check_server, in_background
from lever_lm.lvlm.prompt import Prompt, holder, to_messages, wording
from lever_lm.lvlm.protocol import Answers, Backend, Batches, Parts, Prompts
from lever_lm.utils.errors import LeverError
from lever_lm.utils.fingerprint import CODE, fingerprint
from lever_lm.utils.progress import unsaid
from lever_lm.utils.transformers_compat import import_transformers

_ROUNDS = 8  # prompts in a batch for each request under way: the processes of a job are dealt neighbours
_CHARACTERS = 6  # of text in a token: more than there are, so that no prompt is refused that fits
_BROKEN_OFF = ("abort", "error", "content_filter")  # a finish_reason of these leaves half an answer
_IMAGE_TOKEN, _END_OF_TURN = "<|image_pad|>", "<|im_end|>"


class ServerLvlm(Backend):
    """The `Backend` of the model `config.path` at `config.server`. Raises LeverError when no server is there, or one of
    another model.

    The API key is read from OPENAI_API_KEY and goes nowhere but into the requests.
    """

    def __init__(self, config: LvlmConfig, prompt: PromptConfig, say: Callable[[str], None] = unsaid):
        import_transformers()  # qwen_vl_utils needs torchvision
        self.config, self.prompt, self.say = config, prompt, say
        served = [check_server(replace(config, server=url), say, wait=config.wait) for url in config.servers]
        self.servers = [one.url for one in served]
        self._urls = DataUrls(config)
        limits = [(one.card.get("max_model_len"), one.url) for one in served]
        self._context = min((pair for pair in limits if type(pair[0]) is int and pair[0] > 0), default=None)
        self._image_tokens = cache(lambda image: image_tokens(open_image(image), config))
        # Qwen's generation_config has a repetition penalty, which servers apply by default: it punishes what is copied
        # from a demonstration. The standard field clears it in `transformers serve`, the other sets it in vLLM and
        # SGLang.
        self._decoding = {"model": served_name(config.path), "temperature": 0, "frequency_penalty": 0}
        if all(one.card.get("owned_by") in ("vllm", "sglang") for one in served):
            self._decoding["repetition_penalty"] = config.repetition_penalty
        elif config.repetition_penalty != 1:
            raise ServerError(
                f"the server {config.server} is neither vLLM nor SGLang, which take lvlm.repetition_penalty "
                f"{config.repetition_penalty:g}",
                "--set lvlm.repetition_penalty=1, or drop --server to answer in this process",
            )

    def ask(self, prompts: Prompts, batches: Batches, answers: Answers = None, *, end: bool = False) -> Parts:
        """See `Backend`. Raises LeverError for an empty answer, and with a server that scores no prompt, once what came
        before has been yielded."""
        self._check_room(prompts)
        request, read = self._writing(prompts) if answers is None else self._scoring(prompts, answers, end)
        yield from self._asked([i for batch in batches for i in batch], request, read)

    def _writing(self, prompts: Sequence[Prompt]) -> tuple[Callable, Callable]:
        """Return how the i-th prompt is asked for an answer, and how that is read."""

        def request(i: int) -> dict:
            return {"messages": self._messages(prompts[i]), "max_tokens": self.config.max_new_tokens}

        return request, lambda i, answer: self._text(prompts[i], answer)

    def _scoring(self, prompts: Sequence[Prompt], answers: Sequence[str], end: bool) -> tuple[Callable, Callable]:
        """Return how the i-th answer's log-prob is asked for, and how it is read.

        The answer is sent as the assistant's turn, left open or with `end` closed; vLLM then gives a log-prob for every
        token of the prompt, and the answer's are those at its end that spell it.
        """
        for prompt, answer in zip(prompts, answers, strict=True):
            if not answer.strip():
                raise LeverError(f"question {prompt.query.question_id}: cannot score an empty answer")
        answers = [unicodedata.normalize("NFC", answer) for answer in answers]  # as Qwen's tokenizer composes them
        scoring = {**SCORING, "continue_final_message": not end}

        def request(i: int) -> dict:
            turn = {"role": "assistant", "content": answers[i]}
            return {"messages": [*self._messages(prompts[i]), turn], "max_tokens": 1, **scoring}

        def read(i: int, answer: dict) -> float:
            if not answer.get("prompt_logprobs"):
                raise ServerError(f"the server {self.config.server} left out prompt_logprobs", NO_LOG_PROBS)
            score = log_prob_at_end(answer["prompt_logprobs"], answers[i], _END_OF_TURN if end else "")
            if score is None:
                raise LeverError(
                    f"question {prompts[i].query.question_id}: the tokens that the server {self.config.server} scored "
                    f"do not end in the answer {answers[i]!r}{f' and {_END_OF_TURN}' if end else ''} after a line "
                    f"break, as Qwen's chat template has it"
                    f"{': rollout.gt_prob_end=false leaves the end out' if end else ''}"
                )
            return round(score, 6)

        return request, read

    def batches(self, prompts: Sequence[Prompt], answers: Sequence[str] | None = None) -> list[list[int]]:
        """See `Backend`: in the order of the prompts, as rollouts of one query share images. Raises LeverError for a
        prompt that the server has no room for, before any is asked."""
        self._check_room(prompts)
        size = _ROUNDS * self.config.concurrency * len(self.servers)
        return [list(range(start, min(start + size, len(prompts)))) for start in range(0, len(prompts), size)]

    def _check_room(self, prompts: Sequence[Prompt]) -> None:
        """Raise ServerError for a prompt that leaves the answer no room in the least `max_model_len` that a server
        gives, as vLLM does. Image tokens are counted, the images being opened only where the largest would not fit;
        texts are taken for a little shorter than they are: the server itself refuses what is too long by less."""
        if self._context is None:
            return
        (most, url), written = self._context, self.config.max_new_tokens
        room, largest = most - written, self.config.max_pixels // TOKEN_EDGE**2
        for prompt in prompts:
            parts = [part for turn in to_messages(prompt, self.prompt) for part in turn["content"]]
            text, shown = sum(len(part.get("text", "")) for part in parts) // _CHARACTERS, len(prompt.images)
            if text + largest * shown > room and (tokens := text + sum(map(self._image_tokens, prompt.images))) > room:
                raise ServerError(
                    f"question {prompt.query.question_id}: its prompt of {shown} images has at least {tokens} tokens, "
                    f"and the server {url} has room for {room} beside an answer of {written}",
                    TOO_LONG,
                )

    # ------------------------------------------------------------------ asking

    def _asked(
        self, order: Sequence[int], request: Callable[[int], dict], read: Callable[[int, dict], object]
    ) -> Iterator[tuple[list[int], list]]:
        """Yield (some i of `order`, read(i, a server's answer to request(i)) of each) as they come, `lvlm.concurrency`
        of them at each server at once. The requests go on while the caller has what came."""
        arrived: SimpleQueue = SimpleQueue()
        asking = Servers(self.config, self.servers, self.say).ask(
            order,
            lambda i: json.dumps({**self._decoding, **request(i)}).encode(),
            lambda i, answer: arrived.put((i, read(i, answer))),
        )
        with in_background(asking, at_end=lambda: arrived.put(None)) as asked:
            more = True
            while more:
                found = [arrived.get()]
                with suppress(Empty):
                    while True:
                        found.append(arrived.get_nowait())
                more = None not in found
                if pairs := [pair for pair in found if pair is not None]:
                    yield tuple(map(list, zip(*pairs, strict=True)))
            asked.result()

    def _messages(self, prompt: Prompt) -> list[dict]:
        """Return the conversation with its images in it; turns of text alone are plain strings, which every server
        takes."""
        messages = to_messages(prompt, self.prompt, self._urls.part)
        for turn in messages:
            texts = [part.get("text", "") for part in turn["content"]]
            if any(_IMAGE_TOKEN in text for text in texts):
                raise LeverError(f"{holder(prompt, _IMAGE_TOKEN)}: {_IMAGE_TOKEN} must not stand there")
            if len(texts) == 1:
                turn["content"] = texts[0]
        return messages

    def _text(self, prompt: Prompt, answer: dict) -> str:
        choice, usage = answer["choices"][0], answer.get("usage")
        text, ended = choice["message"].get("content"), choice.get("finish_reason")
        written = usage.get("completion_tokens") if isinstance(usage, dict) else None
        most, asked = self.config.max_new_tokens, f"question {prompt.query.question_id}"
        if not isinstance(text, str):
            found, mend = f"answered {asked} without text", "serve the model without a reasoning or tool parser"
        elif ended == "length" and isinstance(written, int) and written < most:
            found = f"cut its answer to {asked} after {written} of {most} tokens: the prompt leaves no room for more"
            mend = TOO_LONG
        elif ended in _BROKEN_OFF:
            found, mend = f"broke off its answer to {asked}: {ended}", SEE_LOG
        else:
            return text.encode(errors="replace").decode()  # half a surrogate pair is JSON and can be stored nowhere
        raise ServerError(f"the server {self.config.server} {found}", mend)


def log_prob_at_end(places: list, answer: str, end: str = "") -> float | None:
    """Return the sum of the log-probs of the tokens that spell the answer at the end of a prompt, after a line break,
    and of the token `end` that closes its turn, where one is named; None where no tokens do.

    places: of each token of the prompt {id: {"logprob": float, "decoded_token": str}}, null for the first, as vLLM
    gives them. The tokens of a character that is split over several decode to nothing, or to U+FFFD.
    """
    try:
        longest = len(answer.encode())  # a token is a byte or more
        last = [next(iter(place.values())) for place in places[1:][-longest - 3 :]]
        tokens = [(token["decoded_token"], float(token["logprob"])) for token in last]
        closing = 0.0
        if end:
            while tokens[-1][0].isspace():  # the template's line break after a turn
                tokens.pop()
            text, closing = tokens.pop()
            if text != end:
                return None
        for count in range(1, len(tokens)):
            text = "".join(text for text, _ in tokens[-count:])
            pattern = ".+".join(map(re.escape, re.split("\ufffd+", text)))
            if tokens[-count - 1][0].endswith("\n") and re.fullmatch(pattern, answer, re.DOTALL):
                total = sum(score for _, score in tokens[-count:]) + closing
                return total if math.isfinite(total) else None
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError, StopIteration):
        pass  # the field means something else here
    return None


def server_fingerprint(config: LvlmConfig, prompt: PromptConfig) -> str:
    """Return a fingerprint of everything an answer of a server depends on but the question, as far as it is known here:
    the model's name, decoding, image budget, prompt style. The server's address is no part of it. It never equals that
    of a local model, whose precision and weights are known."""
    names = ("path", "repetition_penalty", "max_new_tokens", "min_pixels", "max_pixels")
    return fingerprint("server", CODE["answers"], *(getattr(config, name) for name in names), wording(prompt))
