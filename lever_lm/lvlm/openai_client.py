"""One request to an OpenAI-compatible server: its deadline, its size, one message for each way to fail."""

import asyncio
import email.utils
import json
import os
import time
from urllib.parse import urlsplit

from lever_lm.config.schema import LvlmConfig
from lever_lm.utils.errors import MendableError
from lever_lm.utils.paths import ASSET_PREFIX, asset_path

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_ANSWER = 32 << 20  # bytes of a response: log-probs of a prompt of 50,000 tokens are 5 MB
FIRST_CONTACT = 10.0  # seconds to connect, and to list the models
_WORDS = 300  # characters of a server's own words
_SECRET = 8  # characters of a key that is one; `EMPTY` and the like are none
SEE_LOG = "its own log may say why"
TOO_LONG = "start it with a larger --max-model-len, or take fewer --shots or a smaller lvlm.max_pixels"
IS_IT = "is --server (lvlm.server) the URL of an OpenAI-compatible server, up to its /v1?"
_PATIENCE = "--set lvlm.wait=300 waits five minutes for one that is starting"


class ServerError(MendableError):
    """A server did not do what was asked.

    kind: `down`, nothing serves there, as while a server starts; `late`, no answer within the deadline; `busy`, another
    failure that may pass; `key`, it wants a key or another one; empty for what no other try mends. wait: seconds to
    wait before the next try, where the server names them.
    """

    def __init__(self, found: str, mend: str, kind: str = "", wait: float | None = None):
        super().__init__(found, mend)
        self.kind, self.wait = kind, wait

    @property
    def may_pass(self) -> bool:
        """Return True where another try may succeed."""
        return self.kind in ("down", "late", "busy")


def served_name(path: str) -> str:
    """Return the model's name as a server knows it: the path itself, of a shipped asset its folder."""
    return str(asset_path(path)) if path.startswith(ASSET_PREFIX) else path


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
            timeout=httpx2.Timeout(None, connect=min(FIRST_CONTACT, self.timeout)),  # all in all: see once()
            limits=httpx2.Limits(max_connections=self.config.concurrency),
            follow_redirects=False,  # a key and the images go to the address that was given
            trust_env=urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1"),  # no proxy leads to these
        )
        return self

    async def __aexit__(self, *exception) -> None:
        await self._http.aclose()

    async def complete(self, body: bytes) -> dict:
        """Return the chat completion of a request in JSON, with a message in its first choice. Raises ServerError."""
        answer = await self.once("POST", "/chat/completions", body)
        try:
            answer["choices"][0]["message"].get("content")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            said = self._words(json.dumps(answer))
            raise ServerError(f"the server {self.url} answered without a choice: {said}", IS_IT, "busy") from error
        return answer

    async def once(self, method: str, path: str, body: bytes | None = None) -> dict:
        """Return the JSON object that one request is answered with. Raises ServerError."""
        import httpx2

        try:
            status, headers, content = await asyncio.wait_for(self._exchange(method, path, body), self.timeout)
        except asyncio.TimeoutError as error:
            mend = f"a higher lvlm.timeout, or a lower lvlm.concurrency than {self.config.concurrency}"
            found = f"the server {self.url} gave no answer within {self.timeout:g} s"
            raise ServerError(found, mend, "late") from error
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.InvalidURL) as error:
            why = self._words(str(error)) or "it does not answer"
            mend = f"start it (vllm serve {self.name}), or mend --server (lvlm.server); {_PATIENCE}"
            raise ServerError(f"no server at {self.url} ({why})", mend, "down") from error
        except httpx2.HTTPError as error:
            why = self._words(str(error)) or type(error).__name__
            found = f"the server {self.url} broke off its answer ({why})"
            raise ServerError(found, f"{SEE_LOG}; {_PATIENCE}", "down") from error
        if not 200 <= status < 300:
            raise self._failure(status, headers, content)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            said = self._words(content.decode(errors="replace"))
            raise ServerError(f"the server {self.url} answered with what is no JSON object: {said!r}", IS_IT, "busy")
        return answer

    async def _exchange(self, method: str, path: str, body: bytes | None):
        headers = {} if body is None else {"Content-Type": "application/json"}
        async with self._http.stream(method, self.url + path, content=body, headers=headers) as response:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER:
                    raise ServerError(f"the server {self.url} answered with more than {MAX_ANSWER >> 20} MiB", IS_IT)
            return response.status_code, response.headers, bytes(content)

    def _failure(self, status: int, headers, content: bytes) -> ServerError:
        """Return the error that a status other than success means."""
        said = self._words(_message_in(content))
        found = f"the server {self.url} answered {status}{f', {said!r}' if said else ''}"
        if status == 429:
            mend = f"a lower lvlm.concurrency than {self.config.concurrency}, or a higher lvlm.retries"
            return ServerError(found, mend, "busy", _retry_after(headers))
        if status in (502, 503, 504):
            return ServerError(found, f"{SEE_LOG}; {_PATIENCE}", "down", _retry_after(headers))
        if status >= 500 or status == 408:
            return ServerError(found, SEE_LOG, "busy", _retry_after(headers))
        if status in (401, 403):
            return ServerError(found, f"set {KEY_VARIABLE} to {'another' if self.key else 'a'} key it accepts", "key")
        if 300 <= status < 400:
            return ServerError(f"{found}: a redirect to {self._words(headers.get('location', ''))!r}", IS_IT)
        unknown = f"it knows no model {self.name} (lvlm.path), or --server is not its URL up to /v1"
        mends = {404: unknown, 405: unknown, 413: "fewer --shots, or a smaller lvlm.max_pixels"}
        return ServerError(found, mends.get(status) or _mend(said))

    def _words(self, text: str) -> str:
        """Return a server's own words, fit for one line of ours, without the key it was sent."""
        text = plain(text.replace(self.key, "***") if len(self.key) >= _SECRET else text)
        return text if len(text) <= _WORDS else f"{text[:_WORDS]}…"


def plain(text: str) -> str:
    """Return a text without line breaks and characters that could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def _mend(said: str) -> str:
    """Return what to do about a request that the server refuses, by what it says."""
    said = said.lower()
    if "limit-mm-per-prompt" in said or ("image" in said and "at most" in said):
        return "start it with --limit-mm-per-prompt '{\"image\": N}', N one more than the most --shots"
    if "context length" in said or "max_model_len" in said or "maximum model length" in said:
        return TOO_LONG
    return "check the model (lvlm.path) and how the server was started"


def _retry_after(headers) -> float | None:
    """Return the seconds that a server asks to wait, as a number or as a date; None where it names none."""
    text = headers.get("retry-after", "").strip()
    try:
        if text.isdecimal():
            return float(text)
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _message_in(content: bytes) -> str:
    """Return a server's own words in the body of a failure: OpenAI's and vLLM's `error.message`, FastAPI's `detail`."""
    text = content.decode(errors="replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
