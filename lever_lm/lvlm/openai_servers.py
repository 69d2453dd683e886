"""The servers of a config: looked at before the work; then each prompt goes to the least busy one, with retries."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from lever_lm.config.schema import LvlmConfig
from lever_lm.lvlm.openai_client import FIRST_CONTACT, IS_IT, Client, ServerError, plain, served_name
from lever_lm.utils.progress import unsaid

MAX_WAIT = 60.0  # seconds before a request is repeated, whatever a server asks for
LOOK = 5.0  # seconds before a server that is starting is looked at again
_REST = 10.0  # seconds in which a server that nothing serves at is passed over, while there is another
_NAMES = 5  # models of a server to name

# ---------------------------------------------------------------------- the first look


class Served(NamedTuple):
    """A server that was looked at: the URL up to its /v1, and the model's entry in its list, {} where it has none."""

    url: str
    card: dict


def check_server(config: LvlmConfig, say: Callable[[str], None] = unsaid, *, wait: float = 0.0) -> Served:
    """Raise ServerError unless a server is at the one URL of `config.server`, or below its /v1, accepts our key and
    serves the model. wait: seconds to give a server that is still starting, which `say` is told of."""
    url, listed = asyncio.run(_listed_in_time(config, say, wait))
    name = served_name(config.path)
    for card in listed:
        if card.get("id") == name:
            return Served(url, card)
    # `transformers serve` lists the hub's cache, under owners read off the ids: that says nothing of a directory.
    if all(str(card.get("id")).split("/")[0] == card.get("owned_by") for card in listed):
        return Served(url, {})
    served = [plain(str(card.get("id"))) for card in listed]
    others = f" and {len(served) - _NAMES} others" if len(served) > _NAMES else ""
    raise ServerError(
        f"the server {url} serves {', '.join(served[:_NAMES])}{others}, not {name}",
        f"--set lvlm.path={served[0]} to ask that one, or --server URL of another",
    )


async def _listed_in_time(config: LvlmConfig, say: Callable[[str], None], wait: float) -> tuple[str, list[dict]]:
    """Return what `_listed` does, of a server that may need `wait` seconds to start."""
    (url,), started, said = config.servers, time.monotonic(), False
    while True:
        try:
            return await _listed(config, url)
        except ServerError as error:
            if error.kind != "down" or (left := wait - (time.monotonic() - started)) <= 0:
                raise
            if not said:
                say(f"{error.found}: waiting up to {wait:g} s for it (lvlm.wait)")
            said = True
            await _pause(min(LOOK, left))


async def _listed(config: LvlmConfig, url: str) -> tuple[str, list[dict]]:
    """Return the URL up to /v1 of a server, which the given one may leave out or go beyond, and its models. No models
    where it answers with anything but a list: the first question shows what is wrong with it, if anything is."""
    parts = urlsplit(url)
    path = parts.path.split("/v1/")[0] if "/v1/" in parts.path else parts.path.removesuffix("/v1")
    whole = urlunsplit(parts._replace(path=f"{path}/v1"))
    listed, error = await _models(config, url)
    if listed is None and whole != url:
        found, _ = await _models(config, whole)
        if found is not None:
            return whole, found
        if error is not None:
            raise ServerError(f"{error.found}, and {whole} has no list of models either", IS_IT) from error
    return url, listed or []


async def _models(config: LvlmConfig, url: str) -> tuple[list[dict] | None, ServerError | None]:
    """Return the list of models at a URL, or None and the error that came in its place, if any. Raises ServerError
    where nothing serves there or answers in time, or where the key is refused."""
    async with Client(config, url, timeout=min(FIRST_CONTACT, config.timeout)) as client:
        try:
            listed = (await client.once("GET", "/models")).get("data")
        except ServerError as error:
            if error.kind == "late":  # of a limit that no option raises
                raise ServerError(error.found, IS_IT) from error
            if error.kind in ("down", "key"):
                raise
            return None, error
    return [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else None, None


# ---------------------------------------------------------------------- the work


@dataclass
class _Place:
    """A server: how many requests are under way or waiting for it, and how it does."""

    client: Client
    free: asyncio.Semaphore
    asked: int = 0
    rests_until: float = 0.0
    waited_for: bool = False


class Servers:
    """Connections to the servers at `urls`, for use within one event loop (`async with`). `say` is told of one that is
    waited for."""

    def __init__(self, config: LvlmConfig, urls: Sequence[str], say: Callable[[str], None]):
        self.config, self.say = config, say
        self._places = [_Place(Client(config, url), asyncio.Semaphore(config.concurrency)) for url in urls]
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "Servers":
        for place in self._places:
            await self._stack.enter_async_context(place.client)
        return self

    async def __aexit__(self, *exception) -> None:
        await self._stack.aclose()

    async def complete(self, body: bytes) -> dict:
        """Return the chat completion of a request in JSON, with a message in its first choice. Raises ServerError.

        Failures that may pass are repeated `lvlm.retries` times, and for `lvlm.wait` seconds where nothing serves:
        after a wait that doubles from a second, or as long as the server asks for.
        """
        started, number = time.monotonic(), 0
        while True:
            number += 1
            try:
                return await self._try(body)
            except ServerError as error:
                waited_for = error.kind == "down" and time.monotonic() - started < self.config.wait
                if not error.may_pass or (number > self.config.retries and not waited_for):
                    times = f", {number} times" if error.may_pass and number > 1 else ""
                    raise ServerError(f"{error.found}{times}", error.mend) from error
                pause = min(2 ** (number - 1) + random.random(), MAX_WAIT / 2)
                if error.wait is not None:
                    pause = min(error.wait, MAX_WAIT)
                elif error.kind == "down" and self.config.wait:
                    pause = min(pause, LOOK)
            await _pause(pause)

    async def _try(self, body: bytes) -> dict:
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
                if self.config.wait and not place.waited_for:
                    place.waited_for = True
                    self.say(f"{error.found}: asked again for up to {self.config.wait:g} s (lvlm.wait)")
            raise
        finally:
            place.asked -= 1
        place.rests_until, place.waited_for = 0.0, False
        return answer


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)
