"""Requests to an OpenAI-compatible server: deadlines, retries, and one message for each way in which they fail."""

import asyncio
import email.utils
import json
import os
import time
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from lever_lm.config.schema import LvlmConfig
from lever_lm.utils.errors import MendableError
from lever_lm.utils.paths import ASSET_PREFIX, asset_path
from lever_lm.utils.progress import unsaid

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_ANSWER = 32 << 20  # bytes of a response: log-probs of a prompt of 50,000 tokens are 5 MB
MAX_WAIT = 60.0  # seconds before a request is repeated, whatever a server asks for
_FIRST_CONTACT = 10.0  # seconds to connect, and to list the models
_WORDS = 300  # characters of a server's own words
_NAMES = 5  # models of a server to name
LOOK = 5.0  # seconds before a server that is starting is looked at again
_SECRET = 8  # characters of a key that is one; `EMPTY` and the like are none


class ServerError(MendableError):
    """A server that did not do what was asked."""


class RefusedKey(ServerError):
    """The server wants a key, or another one."""


class _Starting(ServerError):
    """Nothing serves there, or not yet."""


class MayPass(Exception):
    """A failure worth another try. wait: seconds that the server asked for. down: nothing serves there, as while a
    server starts."""

    def __init__(self, found: str, mend: str, wait: float | None = None, *, down: bool = False):
        super().__init__(found)
        self.found, self.mend, self.wait, self.down = found, mend, wait, down


class Served(NamedTuple):
    """A server that was looked at: the URL up to its /v1, and the model's entry in its list, {} where it has none."""

    url: str
    card: dict


def served_name(path: str) -> str:
    """The model's name as a server knows it: the path itself, of a shipped asset its folder."""
    return str(asset_path(path)) if path.startswith(ASSET_PREFIX) else path


def check_server(config: LvlmConfig, say: Callable[[str], None] = unsaid, *, wait: float = 0.0) -> Served:
    """Raise ServerError unless a server is at the one URL of `config.server`, or below its /v1, accepts our key and
    serves the model. wait: seconds to give a server that is still starting; that it is waited for is said."""
    url, listed = asyncio.run(_listed(config, say, wait))
    name = served_name(config.path)
    for card in listed:
        if card.get("id") == name:
            return Served(url, card)
    # `transformers serve` lists the hub's cache, under owners read off the ids: that says nothing of a directory.
    if all(str(card.get("id")).split("/")[0] == card.get("owned_by") for card in listed):
        return Served(url, {})
    served = [_plain(str(card.get("id"))) for card in listed]
    others = f" and {len(served) - _NAMES} others" if len(served) > _NAMES else ""
    raise ServerError(
        f"the server {url} serves {', '.join(served[:_NAMES])}{others}, not {name}",
        f"--set lvlm.path={served[0]} to ask that one, or --server URL of another",
    )


async def _listed(config: LvlmConfig, say: Callable[[str], None], wait: float) -> tuple[str, list[dict]]:
    """The URL up to /v1 of a server, and its models; [] where it answers in another way than with a list, and the first
    question shows what is wrong with it, if anything is."""
    (url,), started, said = config.servers, time.monotonic(), False
    while True:
        try:
            return await _list_at(config, url)
        except _Starting as error:
            if (left := wait - (time.monotonic() - started)) <= 0:
                raise
            if not said:
                say(f"{error.found}: waiting up to {wait:g} s for it (lvlm.wait)")
            said = True
            await _pause(min(LOOK, left))


async def _list_at(config: LvlmConfig, url: str) -> tuple[str, list[dict]]:
    """The models at a URL, or at the /v1 that it leaves out or goes beyond."""
    parts = urlsplit(url)
    path = parts.path.split("/v1/")[0] if "/v1/" in parts.path else parts.path.removesuffix("/v1")
    whole = urlunsplit(parts._replace(path=f"{path}/v1"))
    listed, error = await _models(config, url)
    if listed is None and whole != url:
        found, _ = await _models(config, whole)
        if found is not None:
            return whole, found
        if error is not None:
            raise ServerError(f"{error.found}, and {whole} has no list of models either", _IS_IT) from error
    return url, listed or []


async def _models(config: LvlmConfig, url: str) -> tuple[list[dict] | None, ServerError | MayPass | None]:
    """The list of models at a URL, None where there is none, and then what came in its place. Raises ServerError where
    nothing serves there, or where the key is refused."""
    async with Client(config, url, timeout=min(_FIRST_CONTACT, config.timeout)) as client:
        try:
            listed = (await client.once("GET", "/models")).get("data")
        except RefusedKey:
            raise
        except ServerError as error:
            return None, error
        except MayPass as error:
            if error.down:
                raise _Starting(error.found, error.mend) from error
            if isinstance(error.__cause__, asyncio.TimeoutError):  # of a limit that no option raises
                raise ServerError(error.found, _IS_IT) from error
            return None, error
    if not isinstance(listed, list):
        return None, None
    return [card for card in listed if isinstance(card, dict)], None


class Client:
    """A connection pool to one server of a config, for use within one event loop (`async with`)."""

    def __init__(self, config: LvlmConfig, url: str, timeout: float | None = None):
        self.config, self.url, self.name = config, url, served_name(config.path)
        self.timeout = timeout or config.timeout
        self.key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise ServerError(f"{KEY_VARIABLE} holds characters that no key has", "set it again")

    async def __aenter__(self) -> "Client":
        import httpx2

        self._http = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=httpx2.Timeout(None, connect=min(_FIRST_CONTACT, self.timeout)),  # all in all: see once()
            limits=httpx2.Limits(max_connections=self.config.concurrency),
            follow_redirects=False,  # a key and the images go to the address that was given
            trust_env=urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1"),  # no proxy leads to these
        )
        return self

    async def __aexit__(self, *exception) -> None:
        await self._http.aclose()

    async def complete(self, body: bytes) -> dict:
        """The chat completion of a request in JSON, with a message in its first choice. Raises ServerError, or
        MayPass."""
        answer = await self.once("POST", "/chat/completions", body)
        try:
            answer["choices"][0]["message"].get("content")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            said = _words(json.dumps(answer), self.key)
            raise MayPass(f"the server {self.url} answered without a choice: {said}", _IS_IT) from error
        return answer

    async def once(self, method: str, path: str, body: bytes | None = None) -> dict:
        """The JSON object that one request is answered with. Raises ServerError, or MayPass."""
        import httpx2

        try:
            status, headers, content = await asyncio.wait_for(self._exchange(method, path, body), self.timeout)
        except asyncio.TimeoutError as error:
            raise MayPass(
                f"the server {self.url} gave no answer within {self.timeout:g} s",
                f"a higher lvlm.timeout, or a lower lvlm.concurrency than {self.config.concurrency}",
            ) from error
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.InvalidURL) as error:
            why = _words(str(error), self.key) or "it does not answer"
            mend = f"start it (vllm serve {self.name}), or mend --server (lvlm.server); {_PATIENCE}"
            raise MayPass(f"no server at {self.url} ({why})", mend, down=True) from error
        except httpx2.HTTPError as error:
            why = _words(str(error), self.key) or type(error).__name__
            mend = f"{SEE_LOG}; {_PATIENCE}"
            raise MayPass(f"the server {self.url} broke off its answer ({why})", mend, down=True) from error
        if 200 <= status < 300:
            return self._json(content)
        raise self._failure(status, headers, content)

    async def _exchange(self, method: str, path: str, body: bytes | None):
        headers = {} if body is None else {"Content-Type": "application/json"}
        async with self._http.stream(method, self.url + path, content=body, headers=headers) as response:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER:
                    raise ServerError(f"the server {self.url} answered with more than {MAX_ANSWER >> 20} MiB", _IS_IT)
            return response.status_code, response.headers, bytes(content)

    def _json(self, content: bytes) -> dict:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            said = _words(content.decode(errors="replace"), self.key)
            raise MayPass(f"the server {self.url} answered with what is no JSON object: {said!r}", _IS_IT)
        return answer

    def _failure(self, status: int, headers, content: bytes) -> Exception:
        """What a status other than success means."""
        said = _words(_message_in(content), self.key)
        found = f"the server {self.url} answered {status}{f', {said!r}' if said else ''}"
        if status == 429:
            mend = f"a lower lvlm.concurrency than {self.config.concurrency}, or a higher lvlm.retries"
            return MayPass(found, mend, _retry_after(headers))
        if status in (502, 503, 504):
            return MayPass(found, f"{SEE_LOG}; {_PATIENCE}", _retry_after(headers), down=True)
        if status >= 500 or status == 408:
            return MayPass(found, SEE_LOG, _retry_after(headers))
        if status in (401, 403):
            return RefusedKey(found, f"set {KEY_VARIABLE} to {'another' if self.key else 'a'} key it accepts")
        if 300 <= status < 400:
            return ServerError(f"{found}: a redirect to {_words(headers.get('location', ''), self.key)!r}", _IS_IT)
        if status in (404, 405):
            return ServerError(
                found, f"it knows no model {self.name} (lvlm.path), or --server is not its URL up to /v1"
            )
        if status == 413:
            return ServerError(found, "fewer --shots, or a smaller lvlm.max_pixels")
        return ServerError(found, _mend(said))


SEE_LOG = "its own log may say why"
_PATIENCE = "--set lvlm.wait=300 waits five minutes for one that is starting"
_IS_IT = "is --server (lvlm.server) the URL of an OpenAI-compatible server, up to its /v1?"


def _mend(said: str) -> str:
    """What to do about a request that the server holds for wrong, by what it says."""
    said = said.lower()
    if "limit-mm-per-prompt" in said or ("image" in said and "at most" in said):
        return "start it with --limit-mm-per-prompt '{\"image\": N}', N one more than the most --shots"
    if "context length" in said or "max_model_len" in said or "maximum model length" in said:
        return "start it with a larger --max-model-len, or take fewer --shots or a smaller lvlm.max_pixels"
    return "check the model (lvlm.path) and how the server was started"


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


def _retry_after(headers) -> float | None:
    """Seconds that a server asks to wait, as a number or as a date; None where it does not, or in no way we read."""
    text = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(text)) if text.isdecimal() else max(0.0, _date(text) - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _date(text: str) -> float:
    return email.utils.parsedate_to_datetime(text).timestamp()


def _message_in(content: bytes) -> str:
    """A server's own words in the body of a failure: OpenAI's and vLLM's `error.message`, FastAPI's `detail`."""
    text = content.decode(errors="replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def _words(text: str, key: str) -> str:
    """A server's own words, fit for one line of ours, without the key it was sent."""
    plain = _plain(text.replace(key, "***") if len(key) >= _SECRET else text)
    return plain if len(plain) <= _WORDS else f"{plain[:_WORDS]}…"


def _plain(text: str) -> str:
    """Without line breaks and characters that could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
