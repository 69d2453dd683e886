"""HTTP servers on the loopback for the tests of the server backend: one that does as it is told, and one that answers
chat completions as vLLM does, with the shipped model driven by the library alone."""

import base64
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO


@dataclass(frozen=True)
class Request:
    """What came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict | None


@dataclass
class Reply:
    """What goes out. cut: the connection ends after half of the body."""

    status: int = 200
    body: object = ""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False


def said(text: str | None) -> Reply:
    """A chat completion."""
    return Reply(body={"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})


def models(*names: str, owner: str = "vllm") -> Reply:
    """A list of models."""
    return Reply(
        body={"object": "list", "data": [{"id": name, "object": "model", "owned_by": owner} for name in names]}
    )


class Loopback:
    """A running server: its URL, and every request it got."""

    def __init__(self, answer: Callable[[Request], Reply]):
        self.answer = answer
        self.requests: list[Request] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                self.do_POST()

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                request = Request(self.command, self.path, dict(self.headers), json.loads(body) if body else None)
                outer.requests.append(request)
                reply = answer(request)
                content = reply.body if isinstance(reply.body, (str, bytes)) else json.dumps(reply.body)
                content = content.encode() if isinstance(content, str) else content
                with contextlib.suppress(ConnectionError):  # a client that went away
                    self.send_response(reply.status)
                    for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2] if reply.cut else content)
                self.close_connection = self.close_connection or reply.cut

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, address):
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def asked(self) -> list[dict]:
        """The bodies of the chat completions that were asked for."""
        return [request.body for request in self.requests if request.path == "/v1/chat/completions"]

    @contextlib.contextmanager
    def running(self) -> Iterator["Loopback"]:
        """Serve within the block."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class TinyChat:
    """Answers as vLLM would with a Qwen2.5-VL directory: the library's processor, `generate` and one plain forward pass
    over pixels; one prompt at a time, float32."""

    def __init__(self, folder: str, name: str):
        import torch

        from lever_lm.utils.transformers_compat import import_transformers

        transformers = import_transformers()
        self.name = name
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Reply:
        if request.path == "/v1/models":
            return models(self.name)
        if request.path != "/v1/chat/completions":
            return Reply(404, {"detail": "Not Found"})
        body = request.body
        if body["model"] != self.name:
            return Reply(404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}})
        with self._lock:
            return self._complete(body)

    def _complete(self, body: dict) -> Reply:
        import torch

        assert body["temperature"] == 0
        inputs = self._inputs(body)
        ids = inputs["input_ids"][0]
        with torch.inference_mode():
            decoding = {"max_new_tokens": body["max_tokens"], "repetition_penalty": float(body["repetition_penalty"])}
            written = self.model.generate(**inputs, do_sample=False, **decoding)[0, len(ids) :]
            reply = said(self.processor.tokenizer.decode(written, skip_special_tokens=True))
            if body.get("prompt_logprobs") is not None:
                reply.body["prompt_logprobs"] = [None, *self._scores(inputs, ids)]
        return reply

    def _inputs(self, body: dict):
        import PIL.Image

        images, messages = [], []
        for message in body["messages"]:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for i, part in enumerate(parts):
                if part["type"] == "image_url":
                    head, data = part["image_url"]["url"].split(",")
                    assert head == "data:image/png;base64"
                    images.append(PIL.Image.open(BytesIO(base64.b64decode(data))))
                    parts[i] = {"type": "image"}
            messages.append({"role": message["role"], "content": parts})
        text = self.processor.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=body.get("add_generation_prompt", True),
            continue_final_message=body.get("continue_final_message", False),
        )
        return self.processor(text=[text], images=images or None, return_tensors="pt")

    def _scores(self, inputs, ids) -> list[dict]:
        scores = self.model(**inputs).logits[0, :-1].float().log_softmax(-1)
        texts, waiting = [], []  # of a character split over tokens, the last has it and the others nothing
        for token in ids[1:].tolist():
            text = self.processor.tokenizer.decode([*waiting, token])
            waiting = [*waiting, token] if text.endswith("\ufffd") else []
            texts.append("" if waiting else text)
        return [
            {str(token): {"logprob": float(row[token]), "rank": 1, "decoded_token": text}}
            for row, token, text in zip(scores, ids[1:].tolist(), texts, strict=True)
        ]
