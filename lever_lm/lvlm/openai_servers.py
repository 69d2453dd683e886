"""The servers of a config: each prompt goes to the one with the least to do, and to another where that one fails."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from lever_lm.config.schema import LvlmConfig
from lever_lm.lvlm import openai_client as clients
from lever_lm.lvlm.openai_client import LOOK, MAX_WAIT, Client, MayPass, Served, ServerError, check_server

_REST = 10.0  # seconds in which a server that nothing serves at is passed over, while there is another


def check_servers(config: LvlmConfig, say: Callable[[str], None], *, wait: float) -> list[Served]:
    """Raise ServerError unless every server of a config is there and serves the model; see `check_server`."""
    return [check_server(replace(config, server=url), say, wait=wait) for url in config.servers]


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
        """The chat completion of a request in JSON, with a message in its first choice. Failures that may pass are
        repeated `lvlm.retries` times, and for `lvlm.wait` seconds where nothing serves: after a wait that doubles from
        a second, or as long as the server asks for. Raises ServerError."""
        from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential_jitter

        doubling = wait_exponential_jitter(initial=1, max=MAX_WAIT / 2, jitter=1)

        def wait(state) -> float:
            error = state.outcome.exception()
            if error.wait is not None:
                return min(error.wait, MAX_WAIT)
            return min(doubling(state), LOOK) if error.down and self.config.wait else doubling(state)

        def stop(state) -> bool:
            waiting = state.outcome.exception().down and state.seconds_since_start < self.config.wait
            return state.attempt_number > self.config.retries and not waiting

        tries = AsyncRetrying(
            retry=retry_if_exception_type(MayPass), stop=stop, wait=wait, sleep=clients._pause, reraise=True
        )
        try:
            return await tries(self._try, body)
        except MayPass as error:
            number = tries.statistics["attempt_number"]
            raise ServerError(f"{error.found}{f', {number} times' if number > 1 else ''}", error.mend) from error

    async def _try(self, body: bytes) -> dict:
        """Send one request to the server with the least to do."""
        now = time.monotonic()
        place = min(self._places, key=lambda place: (place.rests_until > now, place.asked))
        place.asked += 1
        try:
            async with place.free:
                answer = await place.client.complete(body)
        except MayPass as error:
            if error.down:
                place.rests_until = time.monotonic() + _REST
                if self.config.wait and not place.waited_for:
                    place.waited_for = True
                    self.say(f"{error.found}: asked again for up to {self.config.wait:g} s (lvlm.wait)")
            raise
        finally:
            place.asked -= 1
        place.rests_until, place.waited_for = 0.0, False
        return answer


class _Place:
    """A server: requests that are under way or waiting for it, and how it does."""

    def __init__(self, client: Client, free: asyncio.Semaphore):
        self.client, self.free, self.asked = client, free, 0
        self.rests_until, self.waited_for = 0.0, False
