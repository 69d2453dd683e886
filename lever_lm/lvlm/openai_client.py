"""One request to an OpenAI-compatible server: its deadline, its size, one message for each way to fail."""

import asyncio
import json
import os
from functools import lru_cache
from urllib.parse import urlsplit

from lever_lm.config.schema import LvlmConfig
from lever_lm.utils.errors import MendableError
from lever_lm.utils.paths import ASSET_PREFIX, asset_path
from lever_lm.utils.terminal import shown

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_ANSWER = 32 << 20  # bytes of a response: log-probs of a prompt of 50,000 tokens are 5 MB
FIRST_CONTACT = 10.0  # seconds to connect, and to list the models
_WORDS = 300  # characters of a server's own words
_SECRET = 8  # characters of a key that is one; `EMPTY` and the like are none
SEE_LOG = "its own log may say why"
TOO_LONG = "start it with a larger --max-model-len, or take fewer --shots or a smaller lvlm.max_pixels"
IS_IT = "is --server (lvlm.server) the URL of an OpenAI-compatible server, up to its /v1?"
NO_LOG_PROBS = (
    "it gives no log-probs of a prompt's tokens, as vLLM does; leave out what scores reference answers "
    "(rollout.gt_prob, reward modes with gtprob, rollout.infoscore), or drop --server to score them in this process"
)
PATIENCE = f"{SEE_LOG}; --set lvlm.wait=300 waits five minutes for one that is starting"
# Request fields that ask for log-probs. A server that does not have one of them may refuse the request for it.
SCORING = {"prompt_logprobs": 0, "add_generation_prompt": False, "continue_final_message": True}
# What mends a failure, and its kind, by the status; else, where a server refuses a request, by its words.
_KEY = f"set {KEY_VARIABLE} to a key it accepts", "key"
_UNKNOWN = "it knows no model {name} (lvlm.path), or --server is not its URL up to /v1", ""
_BY_STATUS = {
    401: _KEY,
    403: _KEY,
    404: _UNKNOWN,
    405: _UNKNOWN,
    408: (SEE_LOG, "busy"),
    413: ("fewer --shots, or a smaller lvlm.max_pixels", ""),
    429: ("a lower lvlm.concurrency, or a higher lvlm.retries", "busy"),
    **dict.fromkeys((502, 503, 504), (PATIENCE, "down")),
}
_BY_WORDS = {
    "limit-mm-per-prompt": "start it with --limit-mm-per-prompt '{\"image\": N}', N one more than the most --shots",
    **dict.fromkeys(("context length", "max_model_len", "maximum model length"), TOO_LONG),
    **dict.fromkeys(SCORING, NO_LOG_PROBS),
    "": "check the model (lvlm.path) and how the server was started",
}


class ServerError(MendableError):
    """A server did not do what was asked.

    kind: `down`, nothing serves there, as while a server starts; `busy`, another failure that may pass; `key`, it wants
    a key or another one; empty for what no other try mends. wait: seconds to wait before the next try, where the server
    names them.
    """

    def __init__(self, found: str, mend: str, kind: str = "", wait: float | None = None):
        super().__init__(found, mend)
        self.kind, self.wait = kind, wait


def served_name(path: str) -> str:
    """Return the model's name as a server knows it: the path itself, of a shipped asset its folder."""
    return str(asset_path(path)) if path.startswith(ASSET_PREFIX) else path


@lru_cache
def _certificates(trust_env: bool):
    """Return the authorities that a server's certificate is checked by: reading them takes 40 ms each time."""
    import httpx2

    return httpx2.create_ssl_context(trust_env=trust_env)


class Client:
    """A connection pool to one server of a config, for use within one event loop (`async with`)."""

    def __init__(self, config: LvlmConfig, url: str, timeout: float | None = None):
        self.url, self.timeout, self.name = url, timeout or config.timeout, served_name(config.path)
        self.concurrency = config.concurrency
        self.key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise ServerError(f"{KEY_VARIABLE} holds characters that no key has", "set it again")

    async def __aenter__(self) -> "Client":
        import httpx2

        trusted = urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1")  # no proxy leads to these
        self._http = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=httpx2.Timeout(None, connect=min(FIRST_CONTACT, self.timeout)),  # all in all: see once()
            limits=httpx2.Limits(max_connections=self.concurrency),
            follow_redirects=False,  # a key and the images go to the address that was given
            trust_env=trusted,
            verify=_certificates(trusted),
        )
        return self

    async def __aexit__(self, *exception) -> None:
        await self._http.aclose()

    async def models(self) -> list[dict] | None:
        """Return the server's list of models, None where it answers with none. Raises ServerError."""
        listed = (await self.once("GET", "/models")).get("data")
        return [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else None

    async def complete(self, body: bytes) -> dict:
        """Return the chat completion of a request in JSON, with a message in its first choice. Raises ServerError."""
        answer = await self.once("POST", "/chat/completions", body)
        try:
            answer["choices"][0]["message"].get("content")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._error(f"answered without a choice: {self._words(json.dumps(answer))}", IS_IT, "busy") from error
        return answer

    async def once(self, method: str, path: str, body: bytes | None = None) -> dict:
        """Return the JSON object that one request is answered with. Raises ServerError."""
        import httpx2

        try:
            status, headers, content = await asyncio.wait_for(self._exchange(method, path, body), self.timeout)
        except asyncio.TimeoutError as error:
            # No option raises the limit of a first look: what does not list its models in time is not there yet.
            mend = ("a higher lvlm.timeout, or a lower lvlm.concurrency", "busy") if body else (IS_IT, "down")
            raise self._error(f"gave no answer within {self.timeout:g} s", *mend) from error
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.InvalidURL) as error:
            mend = f"start it (vllm serve {self.name}), or mend --server (lvlm.server); {PATIENCE}"
            raise ServerError(f"no server at {self.url} ({self._words(str(error))})", mend, "down") from error
        except httpx2.HTTPError as error:
            raise self._error(f"broke off its answer ({self._words(repr(error))})", PATIENCE, "down") from error
        if not 200 <= status < 300:
            raise self._failure(status, headers, content)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            said = self._words(content.decode(errors="replace"))
            raise self._error(f"answered with what is no JSON object: {said}", IS_IT, "busy")
        return answer

    async def _exchange(self, method: str, path: str, body: bytes | None):
        headers = {} if body is None else {"Content-Type": "application/json"}
        async with self._http.stream(method, self.url + path, content=body, headers=headers) as response:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER:
                    raise self._error(f"answered with more than {MAX_ANSWER >> 20} MiB", IS_IT)
            return response.status_code, response.headers, bytes(content)

    def _failure(self, status: int, headers, content: bytes) -> ServerError:
        """Return the error that a status other than success means."""
        message = _message_in(content)
        if status in _BY_STATUS:
            mend, kind = _BY_STATUS[status]
        elif 300 <= status < 400:
            message, mend, kind = f"a redirect to {headers.get('location', '')}", IS_IT, ""
        elif status >= 500:
            mend, kind = SEE_LOG, "busy"
        else:
            mend, kind = next(mend for word, mend in _BY_WORDS.items() if word in message.lower()), ""
        found = f"answered {status}{f', {self._words(message)}' if message else ''}"
        wait = headers.get("retry-after", "").strip()
        return self._error(found, mend.replace("{name}", self.name), kind, float(wait) if wait.isdecimal() else None)

    def _error(self, found: str, mend: str, *kind) -> ServerError:
        return ServerError(f"the server {self.url} {found}", mend, *kind)

    def _words(self, text: str) -> str:
        """Return a server's own words in quotes, fit for one line of ours, without the key it was sent."""
        return shown(text.replace(self.key, "***") if len(self.key) >= _SECRET else text, _WORDS)


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
