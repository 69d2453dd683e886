"""The servers of a config: looked at before the work; then each prompt goes to the least busy one, with retries."""

import asyncio
import contextlib
import functools
import json
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit, urlunsplit

from lever_lm.config.schema import LvlmConfig
from lever_lm.lvlm.openai_client import FIRST_CONTACT, IS_IT, NO_LOG_PROBS, SCORING, Client, ServerError, served_name
from lever_lm.utils.progress import unsaid
from lever_lm.utils.terminal import one_line

MAX_WAIT = 60.0  # seconds before a request is repeated, whatever a server asks for
LOOK = 5.0  # seconds before a server that is starting is looked at again
_REST = 10.0  # seconds in which a server that nothing serves at is passed over, while there is another
_NAMES = 200  # characters of the names of a server's models
Answer = TypeVar("Answer")


async def repeated(
    attempt: Callable[[], Awaitable[Answer]], say: Callable[[str], None], *, retries: int, wait: float
) -> Answer:
    """Return what `attempt` returns. Failures that may pass are repeated `retries` times, and for `wait` seconds where
    nothing serves, which `say` is told of: after a pause that doubles from a second, or as long as the server asks for.
    """
    started, number = time.monotonic(), 0
    while True:
        number += 1
        try:
            return await attempt()
        except ServerError as error:
            waited_for = error.kind == "down" and time.monotonic() - started < wait
            if error.kind not in ("down", "busy") or (number > retries and not waited_for):
                times = f", {number} times" if number > 1 else ""
                raise ServerError(f"{error.found}{times}", error.mend, error.kind) from error
            pause = min(2 ** min(number - 1, 5) + random.random(), MAX_WAIT / 2)
            if waited_for:
                say(f"{error.found}: waiting up to {wait:g} s for it (lvlm.wait)")
                pause = min(pause, LOOK)
            elif error.wait is not None:
                pause = min(error.wait, MAX_WAIT)
        await _pause(pause)


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


# ---------------------------------------------------------------------- the first look


class Served(NamedTuple):
    """A server that was looked at: the URL up to its /v1, and the model's entry in its list, {} where it has none."""

    url: str
    card: dict


def check_server(config: LvlmConfig, say: Callable[[str], None] = unsaid, *, wait: float = 0.0) -> Served:
    """Raise ServerError unless a server is at the one URL of `config.server`, or below its /v1, accepts our key and
    serves the model. wait: seconds to give a server that is still starting, which `say` is told of."""
    look = functools.partial(_listed, config)
    url, listed = asyncio.run(repeated(look, functools.cache(say), retries=0, wait=wait))
    name = served_name(config.path)
    for card in listed:
        if card.get("id") == name:
            return Served(url, card)
    # `transformers serve` lists the hub's cache, under owners read off the ids: that says nothing of a directory.
    if all(str(card.get("id")).split("/")[0] == card.get("owned_by") for card in listed):
        return Served(url, {})
    served = [str(card.get("id")) for card in listed]
    raise ServerError(
        f"the server {url} serves {one_line(', '.join(served))[:_NAMES]}, not {name}",
        f"--set lvlm.path={one_line(served[0])[:_NAMES]} to ask that one, or --server URL of another",
    )


async def _listed(config: LvlmConfig) -> tuple[str, list[dict]]:
    """Return the URL up to /v1 of a server, which the given one may leave out or go beyond, and its models. No models
    where it answers with anything but a list: the first question shows what is wrong with it, if anything is."""
    (url,) = config.servers
    parts = urlsplit(url)
    path = parts.path.split("/v1/")[0] if "/v1/" in parts.path else parts.path.removesuffix("/v1")
    whole = urlunsplit(parts._replace(path=f"{path}/v1"))
    failure = None
    for at in dict.fromkeys((url, whole)):
        async with Client(config, at, timeout=min(FIRST_CONTACT, config.timeout)) as client:
            try:
                listed = await client.models()
            except ServerError as error:
                if error.kind in ("down", "key"):
                    raise
                failure = failure or error
            else:
                if listed is not None:
                    return at, listed
    if failure is not None and whole != url:
        raise ServerError(f"{failure.found}, and {whole} has no list of models either", IS_IT) from failure
    return url, []


def scores_prompts(config: LvlmConfig, url: str) -> bool | None:
    """Return whether a server gives log-probs of a prompt's tokens, by one short question; None where it fails for
    another reason, which the work itself will show."""
    turns = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]
    body = {"model": served_name(config.path), "messages": turns, "temperature": 0, "max_tokens": 1, **SCORING}

    async def ask() -> dict:
        async with Client(config, url, timeout=min(FIRST_CONTACT, config.timeout)) as client:
            return await client.complete(json.dumps(body).encode())

    try:
        return bool(asyncio.run(ask()).get("prompt_logprobs"))
    except ServerError as error:
        return False if error.mend == NO_LOG_PROBS else None


# ---------------------------------------------------------------------- the work


@dataclass
class _Place:
    """A server: how many requests are under way or waiting for it, and until when it is passed over."""

    client: Client
    free: asyncio.Semaphore
    asked: int = 0
    rests_until: float = 0.0


class Servers:
    """The servers at `urls`. `say` is told of one that is waited for."""

    def __init__(self, config: LvlmConfig, urls: Sequence[str], say: Callable[[str], None]):
        self.config, self._say = config, functools.cache(say)  # once, and not for every request
        self._places = [_Place(Client(config, url), asyncio.Semaphore(config.concurrency)) for url in urls]

    async def ask(self, order: Iterable[int], body: Callable[[int], bytes], read: Callable[[int, dict], None]) -> None:
        """Give each answer to body(i), a request for a chat completion in JSON, to read(i, answer), for each i in
        order: as many at once as the servers take. Raises ServerError, and what `body` and `read` raise."""
        rest, patience = iter(order), {"retries": self.config.retries, "wait": self.config.wait}

        async def ask() -> None:
            for i in rest:
                content = await asyncio.to_thread(body, i)
                read(i, await repeated(lambda content=content: self._complete(content), self._say, **patience))

        async with contextlib.AsyncExitStack() as stack:
            for place in self._places:
                await stack.enter_async_context(place.client)
            at_once = self.config.concurrency * len(self._places)
            tasks = [asyncio.create_task(ask()) for _ in range(at_once)]
            try:
                await asyncio.gather(*tasks)
            finally:  # the first failure, or Ctrl-C, ends the others
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _complete(self, body: bytes) -> dict:
        """Send one request to the server with the least to do."""
        now = time.monotonic()
        place = min(self._places, key=lambda place: (place.rests_until > now, place.asked))
        place.asked += 1
        try:
            async with place.free:
                answer = await place.client.complete(body)
        except ServerError as error:
            if error.kind == "down":
                place.rests_until = time.monotonic() + _REST
            raise
        finally:
            place.asked -= 1
        place.rests_until = 0.0
        return answer


@contextlib.contextmanager
def in_background(work: Coroutine, at_end: Callable[[], None]) -> Iterator[Future]:
    """Run `work` in a thread, and call at_end() there when it has ended. Yields the future of it; leaving the block
    before it is done cancels it."""
    begun: Future = Future()

    async def run() -> None:
        begun.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        await work

    with ThreadPoolExecutor(1, "servers") as thread:
        done = thread.submit(asyncio.run, run())
        done.add_done_callback(lambda _: at_end())
        try:
            yield done
        finally:
            loop, task = begun.result()
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has come to its end
                loop.call_soon_threadsafe(task.cancel)
