"""The server backend: the local model's answers and log-probs over HTTP, and one message for every way it can fail."""

import asyncio
import base64
import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from io import BytesIO
from pathlib import Path

import PIL.Image
import pytest
from helpers import CHECKOUT, answers_in, clean_environment, track
from loopback import Loopback, Reply, TinyChat, models, said
from lvlm_helpers import without_images

from lever_lm.config.schema import LvlmConfig, PromptConfig
from lever_lm.lvlm import build_prompt, load_lvlm
from lever_lm.lvlm import images as images_module
from lever_lm.lvlm import openai_client as client
from lever_lm.lvlm import openai_servers as servers_module
from lever_lm.lvlm.backend import load_local
from lever_lm.lvlm.images import DataUrls
from lever_lm.lvlm.local import LocalLvlm, local_fingerprint
from lever_lm.lvlm.openai_server import ServerLvlm, log_prob_at_end, server_fingerprint
from lever_lm.lvlm.openai_servers import check_server
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.paths import asset_path

TINY = "asset:tiny-qwen2.5-vl"
NAME = "tiny"
EPOCHS = ("--rce-epochs", "1", "--grpo-epochs", "1")
FEW = [part for kind in ("beam", "sample", "retrieval", "random") for part in ("--set", f"rollout.{kind}=1")]
FEW += ["--set", "rollout.temperatures=[1.0]"]
KEY = "sk-this-is-a-secret-0123456789"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(client.KEY_VARIABLE, raising=False)


@pytest.fixture
def waits(monkeypatch):
    """Waits before a repeated request are noted and not waited for."""
    noted = []

    async def pause(seconds):
        noted.append(seconds)

    monkeypatch.setattr(servers_module, "_pause", pause)
    return noted


@pytest.fixture(scope="module")
def prompts(digits):
    rng = random.Random(11)
    picks = [(rng.sample(digits.train_examples, i % 6), rng.choice(digits.val_examples)) for i in range(24)]
    return [build_prompt(icds, query, PromptConfig()) for icds, query in picks]


@pytest.fixture(scope="module")
def tiny():
    """The shipped model behind a loopback server that gives log-probs."""
    with Loopback(TinyChat(str(asset_path(TINY)), NAME)).running() as server:
        yield server


@pytest.fixture
def serve():
    """serve(answer) → a running server that is asked for NAME; answer(request) gives the replies of its completions,
    listed, a reply or a function of the request, its list of models."""
    running = []

    def start(answer, listed=None):
        list_ = listed if callable(listed) else lambda request: listed or models(NAME)
        replies = {"/v1/models": list_, "/v1/chat/completions": answer}
        server = Loopback(
            lambda request: replies.get(request.path, lambda _: Reply(404, {"detail": "Not Found"}))(request)
        )
        context = server.running()
        running.append(context)
        return context.__enter__()

    yield start
    for context in running:
        context.__exit__(None, None, None)


def make(url: str, style: str = "interleaved", **settings) -> ServerLvlm:
    return ServerLvlm(config_of(url, **settings), PromptConfig(style=style))


def config_of(url: str, **settings) -> LvlmConfig:
    return LvlmConfig(**{"path": NAME, "server": url, **settings})


def local(style: str = "interleaved", **settings) -> LocalLvlm:
    return load_local(LvlmConfig(path=TINY, dtype="float32", **settings), PromptConfig(style=style), "cpu")


# ---------------------------------------------------------------------- the same as the local model


@pytest.mark.parametrize("style", ["interleaved", "dialogue"])
def test_answers_are_those_of_the_local_model(tiny, prompts, style):
    answers = make(tiny.url, style).generate(prompts)
    assert answers == local(style).generate(prompts)
    assert len(set(answers)) >= 8, "prompts that all get the same answer prove nothing"


@pytest.mark.parametrize("style", ["interleaved", "dialogue"])
def test_log_probs_are_those_of_the_local_model(tiny, prompts, style):
    # `end` and `im` also stand in the token that closes the turn; the last is split into bytes
    texts = ("three", "twenty one", "end", "im", "a blue circle, of paper", "1", "né – ✓ 3")
    answers, chosen = [text for text in texts for _ in range(2)], prompts[: 2 * len(texts)]
    for end in (False, True):
        scores = make(tiny.url, style).answer_log_prob(chosen, answers, end=end)
        assert scores == pytest.approx(local(style).answer_log_prob(chosen, answers, end=end), abs=1e-4)
        assert all(score < 0 and round(score, 6) == score for score in scores)
        assert tiny.asked[-1]["continue_final_message"] is not end


def test_an_answer_that_is_typed_in_parts_is_scored_as_the_composed_one(serve, prompts):
    reply = said("")
    reply.body["prompt_logprobs"] = places(("\n", -1), ("caf", -1), ("é", -2))
    server = serve(lambda request: reply)
    assert make(server.url).answer_log_prob(prompts[:1], ["cafe\u0301"]) == [-3.0]
    assert server.asked[0]["messages"][-1]["content"] == "caf\xe9"


def test_a_repetition_penalty_is_sent_and_gives_the_local_answers(tiny, prompts):
    few = prompts[:12]
    answers = make(tiny.url, repetition_penalty=20.0).generate(few)
    assert tiny.asked[-1]["repetition_penalty"] == 20
    assert answers == local(repetition_penalty=20.0).generate(few)
    assert answers != local().generate(few)


@pytest.mark.parametrize("owner", ["another", ["vllm"], None])
def test_a_server_that_may_not_take_a_repetition_penalty_is_refused(serve, prompts, owner):
    server = serve(lambda request: said("three"), listed=models(NAME, owner=owner))
    with pytest.raises(LeverError, match=r"neither vLLM nor SGLang.*--set lvlm\.repetition_penalty=1"):
        make(server.url, repetition_penalty=1.05)
    assert not server.asked
    make(server.url).generate(prompts[:1])  # standard fields only
    assert set(server.asked[0]) == {"model", "messages", "max_tokens", "temperature", "frequency_penalty"}


# ---------------------------------------------------------------------- requests


def test_a_request_holds_the_conversation_and_asks_greedily(serve, prompts):
    server = serve(lambda request: said("three"))
    prompt = next(prompt for prompt in prompts if len(prompt.icds) == 2)
    make(server.url, max_new_tokens=7).generate([prompt])
    (body,) = server.asked
    settings = {name: value for name, value in body.items() if name != "messages"}
    greedy = {"temperature": 0, "frequency_penalty": 0, "repetition_penalty": 1.0}
    assert settings == {"model": NAME, "max_tokens": 7, **greedy}
    system, user = body["messages"]
    assert system == {"role": "system", "content": "You are a helpful assistant."}
    assert [part["type"] for part in user["content"]] == ["image_url", "text"] * 3
    assert user["content"][1]["text"].endswith(f"Short answer: {prompt.icds[0].answer}\n")


@pytest.mark.parametrize("style", ["interleaved", "dialogue"])
def test_prompts_without_images_of_demonstrations_and_bare_ones_are_sent_as_they_are(tiny, serve, prompts, style):
    some = [prompt for prompt in prompts if len(prompt.icds) == 2]
    changed = [*map(without_images, some), *(dataclasses.replace(prompt, icds=(), bare=True) for prompt in some)]
    assert make(tiny.url, style).generate(changed) == local(style).generate(changed)
    server = serve(lambda request: said("three"))
    make(server.url, style).generate([changed[0]])
    make(server.url, style).generate([changed[-1]])
    blind, bare = (body["messages"][1:] for body in server.asked)
    images = [part for turn in blind if isinstance(turn["content"], list) for part in turn["content"]]
    assert sum(part["type"] == "image_url" for part in images) == 1
    ((image, text),) = (turn["content"] for turn in bare)
    assert (image["type"], text["text"]) == ("image_url", changed[-1].query.question)


@pytest.mark.parametrize("kind", ["CMYK", "turned", "see-through", "large"])
def test_images_go_out_upright_resized_and_without_loss(tmp_path, kind):
    from qwen_vl_utils import fetch_image

    from lever_lm.data import open_image

    rng, size = random.Random(3), (300, 120)
    picture = PIL.Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
    path = tmp_path / ("image.png" if kind == "see-through" else "image.jpg")
    if kind == "CMYK":
        picture.convert("CMYK").save(path)
    elif kind == "see-through":
        picture.putalpha(100)
        picture.save(path)
    else:
        exif = PIL.Image.Exif()
        exif[0x0112] = 6 if kind == "turned" else 1  # orientation: on its side
        picture.resize((2000, 1500) if kind == "large" else size).save(path, exif=exif)
    config = LvlmConfig()
    url = DataUrls(config).get(str(path))
    sent = PIL.Image.open(BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    assert sent.tobytes() == fetch_image({"image": open_image(str(path)), **limits}).tobytes()
    assert (sent.mode, sent.width % 28, sent.height % 28) == ("RGB", 0, 0)
    assert sent.width * sent.height <= config.max_pixels
    assert (sent.width < sent.height) == (kind == "turned")


def test_each_image_is_encoded_once_and_no_more_are_kept_than_fit(serve, prompts, monkeypatch):
    encoded, opened = [], images_module.open_image
    monkeypatch.setattr(images_module, "open_image", lambda image: encoded.append(image) or opened(image))
    lvlm = make(serve(lambda request: said("three")).url)
    lvlm.generate([*prompts, *prompts])
    assert sorted(encoded) == sorted({image for prompt in prompts for image in prompt.images})
    monkeypatch.setattr(images_module, "_URL_MEMORY", 2 * 4 * LvlmConfig.max_pixels)
    urls, (first, second, third) = DataUrls(LvlmConfig()), encoded[:3]
    encoded.clear()
    for image in (first, second, third, third, first):
        assert urls.get(image) == lvlm._urls.get(image)
    assert encoded == [first, second, third, first]


def test_a_question_that_holds_an_image_placeholder_is_refused_by_name(tiny, prompts):
    prompt = next(prompt for prompt in prompts if prompt.icds)
    spoilt = dataclasses.replace(prompt.icds[0], question_id=424242, question="what is <|image_pad|> here?")
    with pytest.raises(LeverError, match=r"question 424242: <\|image_pad\|>"):
        make(tiny.url).generate([dataclasses.replace(prompt, icds=(spoilt, *prompt.icds[1:]))])


def test_batches_keep_the_order_and_are_a_few_rounds_of_requests(serve, prompts):
    lvlm = make(serve(lambda request: said("")).url, concurrency=2)
    assert lvlm.batches(prompts) == [list(range(16)), list(range(16, 24))]
    assert lvlm.batches([]) == []


# ---------------------------------------------------------------------- many at once


def test_as_many_requests_as_asked_for_are_under_way_and_never_more(serve, prompts):
    together, lock = threading.Barrier(6, timeout=20), threading.Lock()
    under_way = []
    now = [0]

    def answer(request):
        with lock:
            now[0] += 1
            under_way.append(now[0])
        together.wait()  # no request is answered before six are here
        with lock:
            now[0] -= 1
        return said("three")

    assert make(serve(answer).url, concurrency=6).generate(prompts) == ["three"] * 24
    assert max(under_way) == 6


# ---------------------------------------------------------------------- failures


ERROR = {"error": {"message": "boom\n\x1b[31m happened", "type": "X", "code": 0}}
LIMIT = {"error": {"message": "At most 4 image(s) may be provided in one prompt. Set `--limit-mm-per-prompt` to …"}}
LENGTH = {"error": {"message": "This model's maximum context length is 4096 tokens."}}
TRIED = 3  # one request and lvlm.retries=2
FAILURES = {
    "500": (Reply(500, ERROR), TRIED, ["answered 500", "'boom\\n\\x1b[31m happened', 3 times", "its own log"]),
    "503 of a proxy": (Reply(503, "<html>down</html>"), TRIED, ["answered 503", "<html>down</html>", "3 times"]),
    "429": (Reply(429, {"error": {"message": "slow down"}}), TRIED, ["answered 429", "slow down", "lvlm.concurrency"]),
    "cut": (Reply(200, said("three").body, cut=True), TRIED, ["broke off its answer", "3 times"]),
    "no JSON": (Reply(200, "<html>hello</html>"), TRIED, ["no JSON object: '<html>hello</html>'", "up to its /v1?"]),
    "half JSON": (Reply(200, '{"choices": ['), TRIED, ["no JSON object"]),
    "no choices": (Reply(200, {"error": "I am out"}), TRIED, ["without a choice", "I am out"]),
    "502": (Reply(502, ""), TRIED, ["answered 502", "its own log", "--set lvlm.wait=300"]),
    "null": (said(None), 1, ["without text", "reasoning"]),
    "400": (Reply(400, ERROR), 1, ["answered 400", "boom", "lvlm.path"]),
    "too many images": (Reply(400, LIMIT), 1, ["At most 4 image(s)", "--limit-mm-per-prompt '{\"image\": N}'"]),
    "too long": (Reply(400, LENGTH), 1, ["4096", "--max-model-len"]),
    "401": (Reply(401, {"error": "Unauthorized"}), 1, ["answered 401", "set OPENAI_API_KEY to a key"]),
    "404": (Reply(404, {"message": "The model `tiny` does not exist."}), 1, ["no model tiny", "up to /v1"]),
    "413": (Reply(413, ""), 1, ["answered 413", "lvlm.max_pixels"]),
    "422": (Reply(422, {"detail": [{"loc": ["body"], "msg": "bad"}]}), 1, ["answered 422", '"msg": "bad"']),
    "redirect": (Reply(307, "", {"Location": "http://elsewhere/v1"}), 1, ["a redirect to http://elsewhere/v1"]),
}


@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_is_one_line_that_says_what_to_do(serve, prompts, waits, name):
    reply, requests, words = FAILURES[name]
    server = serve(lambda request: reply)
    with pytest.raises(LeverError) as caught:
        make(server.url, retries=2).generate(prompts[:1])
    message = str(caught.value)
    assert server.url in message
    for word in words:
        assert word in message
    assert message.isprintable(), message
    assert len(server.asked) == requests
    assert len(waits) == requests - 1


def cut(text: str, tokens: object, reason: object = "length") -> Reply:
    """A completion that says how it ended and how long it is."""
    reply = said(text)
    reply.body["choices"][0]["finish_reason"] = reason
    reply.body["usage"] = {"completion_tokens": tokens, "prompt_tokens": 900, "total_tokens": 905}
    return reply


@pytest.mark.parametrize(
    ("reason", "words"),
    [("length", "cut its answer"), ("abort", "abort"), ("error", "error"), ("content_filter", "content")],
)
def test_an_answer_that_the_server_cut_short_is_an_error_that_names_the_question(serve, prompts, reason, words):
    server = serve(lambda request: cut("twen", 2, reason))
    with pytest.raises(
        LeverError,
        match=rf"question {prompts[0].query.question_id}.*{words}|{words}.*question {prompts[0].query.question_id}",
    ):
        make(server.url).generate(prompts[:1])
    if reason == "length":
        assert make(server.url, max_new_tokens=2).generate(prompts[:1]) == ["twen"]


@pytest.mark.parametrize(
    "reply", [cut("x", 5), cut("x", 2, "stop"), cut("x", None), cut("x", "2"), cut("x", 2, {}), said("x\ud800")]
)
def test_an_answer_that_ended_by_itself_or_says_nothing_of_its_end_is_taken(serve, prompts, reply):
    """And half a surrogate pair, which can be stored nowhere, is mended."""
    assert make(serve(lambda request: reply).url).generate(prompts[:1])[0].rstrip("?") == "x"


def test_an_answer_beyond_all_measure_is_not_read_to_its_end(serve, prompts, monkeypatch):
    monkeypatch.setattr(client, "MAX_ANSWER", 1 << 20)
    server = serve(lambda request: said("x" * (2 << 20)))
    with pytest.raises(LeverError, match="answered with more than 1 MiB"):
        make(server.url).generate(prompts[:1])


def test_a_server_that_hangs_is_given_up_on(serve, prompts, waits):
    released, within = threading.Event(), Reply(200, "{", {"Content-Length": "1000"})
    server = serve(lambda request: within if len(waits) else released.wait(30) and said(""))
    with pytest.raises(LeverError, match=r"gave no answer within 0\.2 s, 2 times: a higher lvlm\.timeout"):
        make(server.url, timeout=0.2, retries=1).generate(prompts[:1])
    released.set()
    assert len(server.asked) == 2
    with pytest.raises(LeverError, match=r"gave no answer within 0\.2 s: .* up to its /v1"):
        make(serve(None, listed=within).url, timeout=0.2)


def test_a_server_that_dies_is_named_after_the_tries(serve, prompts, waits):
    server = Loopback(lambda request: models(NAME))
    with server.running():
        lvlm = make(server.url, retries=3)
    with pytest.raises(LeverError, match=rf"no server at {server.url} \(.*\), 4 times: start it \(vllm serve tiny\)"):
        lvlm.generate(prompts[:1])
    assert len(waits) == 3
    assert waits == sorted(waits)


def test_a_request_is_given_up_on_after_about_half_a_minute(serve, prompts, waits):
    with pytest.raises(LeverError, match="6 times"):
        make(serve(lambda request: Reply(503, "")).url).generate(prompts[:1])
    assert 31 <= sum(waits) <= 36


def test_what_fails_twice_and_then_works_is_no_failure(serve, prompts, waits):
    replies = [Reply(500, ERROR), Reply(200, "{", cut=True), said("three")]
    server = serve(lambda request: replies.pop(0))
    assert make(server.url, concurrency=1).generate(prompts[:1]) == ["three"]
    assert len(server.asked) == 3
    assert [1 <= waits[0] <= 2, 2 <= waits[1] <= 3] == [True, True]


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0, 0),
        ("100000", servers_module.MAX_WAIT, servers_module.MAX_WAIT),
        ("soon", 1, 2),
        ("-5", 1, 2),
        ("", 1, 2),
    ],
)
def test_a_server_is_asked_again_when_it_says(serve, prompts, waits, header, least, most):
    replies = [Reply(429, "", {"Retry-After": header}), said("three")]
    assert make(serve(lambda request: replies.pop(0)).url).generate(prompts[:1]) == ["three"]
    assert least <= waits[0] <= most


def test_the_key_is_sent_and_never_shown(serve, prompts, monkeypatch, caplog, capsys):
    monkeypatch.setenv(client.KEY_VARIABLE, f" {KEY}\n")
    server = serve(lambda request: Reply(401, {"error": {"message": f"bad key {request.headers['Authorization']}"}}))
    with caplog.at_level("DEBUG"), pytest.raises(LeverError, match=r"'bad key Bearer \*\*\*'") as caught:
        make(server.url).generate(prompts[:1])
    assert {request.headers["Authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    assert KEY not in f"{caught.value!r} {caplog.text} {capsys.readouterr()}"
    stamps = {server_fingerprint(config_of(url), PromptConfig()) for url in (server.url, "")}
    monkeypatch.setenv(client.KEY_VARIABLE, "sk-se\ncret")
    assert {server_fingerprint(config_of(""), PromptConfig())} == stamps
    with pytest.raises(LeverError, match="OPENAI_API_KEY holds characters") as caught:
        make(server.url)
    assert "cret" not in str(caught.value)


# ---------------------------------------------------------------------- first contact


@pytest.mark.parametrize("host", ["127.0.0.1:9", "nowhere.invalid", "☃.invalid", "a..b"])
def test_a_host_that_is_nowhere_is_said(host):
    with pytest.raises(LeverError, match=rf"no server at http://{re.escape(host)}/v1 \(.+\): start it"):
        make(f"http://{host}/v1")


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (models("Qwen/Qwen2.5-VL-7B-Instruct", "lora\x1b"), r"serves Qwen/\S+7B-Instruct, lora\\x1b, not tiny: .*7B"),
        (models(*(f"m{i}" for i in range(400))), "serves m0, m1, m2, .{188}, not tiny"),
        (models("m" * 999), "serves m{200}, not tiny: --set lvlm.path=m{200} "),
        (Reply(401), "answered 401: set OPENAI_API_KEY to a key it accepts"),
    ],
)
def test_a_server_of_another_model_is_refused_with_both_names(serve, listed, words):
    server = serve(None, listed=listed)
    with pytest.raises(LeverError, match=words):
        make(server.url)
    assert server.asked == []


def test_no_proxy_stands_between_this_machine_and_itself(serve, prompts, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert make(serve(lambda request: said("three")).url).generate(prompts[:1]) == ["three"]


@pytest.mark.parametrize(
    "listed",
    [
        Reply(404),
        Reply(200, {"data": []}),
        Reply(200, {"data": "all"}),
        models("Qwen/Qwen2.5-VL-7B-Instruct", owner="Qwen"),  # as `transformers serve` lists the hub's cache
        models("other", NAME),
    ],
    ids=["404", "empty", "odd", "a cache", "among others"],
)
def test_a_list_that_does_not_speak_against_the_model_is_no_obstacle(serve, prompts, listed):
    assert make(serve(lambda request: said("three"), listed).url).generate(prompts[:1]) == ["three"]


@pytest.mark.parametrize("given", ["", "/v1/", "/v1/chat/completions"])
def test_a_url_without_its_v1_is_mended(serve, prompts, given):
    server = serve(lambda request: said("three"))
    url = server.url.removesuffix("/v1") + given
    assert check_server(config_of(url)).url == server.url
    assert make(url).generate(prompts[:1]) == ["three"]


def test_a_url_below_which_nothing_is_listed_is_named_with_both(serve):
    server = serve(None)
    url = f"{server.url.removesuffix('/v1')}/elsewhere"
    with pytest.raises(LeverError, match=rf"server {url} answered 404.*{url}/v1 has no list.*up to its /v1\?"):
        make(url)


def starting(serve, *replies: Reply) -> str:
    """The URL of a server that gives these replies to the first looks at its models, then serves."""
    left = list(replies)
    return serve(None, listed=lambda request: left.pop(0) if left else models(NAME)).url


def test_a_server_that_is_starting_is_waited_for_and_it_is_said(serve, waits):
    lines, url = [], starting(serve, Reply(503, "loading"), Reply(503, "loading"))
    assert check_server(config_of(url), lines.append, wait=60).url == url
    assert lines == [f"the server {url} answered 503, 'loading': waiting up to 60 s for it (lvlm.wait)"]
    assert len(waits) == 2
    with pytest.raises(LeverError, match=r"no server at .*, ([2-9]|\d\d+) times: .*--set lvlm\.wait=300"):
        check_server(config_of("http://127.0.0.1:9/v1"), wait=0.2)  # and given up on when the wait is over


def test_a_command_waits_for_its_server_and_the_doctor_does_not(digits_folder, lever, waits):
    folder, closed = str(asset_path(TINY)), [2]

    def answer(request):
        closed[0] -= 1
        if closed[0] >= 0:
            return Reply(503, "")
        return models(folder) if request.method == "GET" else said("three")

    with Loopback(answer).running() as server:
        command = ("--limit", "2", *FEW, "--server", server.url, "--set", "lvlm.wait=60")
        assert lever("doctor", *command).status == 1
        done = lever("rollout", *command)
        assert done.status == 0, done.err
    assert f"server {server.url} answered 503: waiting up to 60 s for it (lvlm.wait)" in done.out + done.err
    assert len(waits) == 1


def test_a_restart_within_the_wait_outlives_the_retries(serve, prompts, waits):
    replies, lines = [*[Reply(503, "")] * 9, said("three")], []
    config = config_of(serve(lambda request: replies.pop(0)).url, retries=2, wait=60.0)
    assert ServerLvlm(config, PromptConfig(), lines.append).generate(prompts[:1]) == ["three"]
    assert len(waits) == 9
    assert max(waits) <= servers_module.LOOK
    assert lines == [f"the server {config.server} answered 503: waiting up to 60 s for it (lvlm.wait)"]


def test_a_server_may_take_hours_to_start(waits):
    starting = [client.ServerError("it starts", "wait", "down", 0.0)] * 1100

    async def attempt():
        if starting:
            raise starting.pop()
        return "there"

    patience = {"retries": 0, "wait": 9000.0}
    assert asyncio.run(servers_module.repeated(attempt, lambda text: None, **patience)) == "there"
    assert (len(waits), max(waits), min(waits) >= 1) == (1100, servers_module.LOOK, True)


def test_a_wait_does_not_lengthen_the_patience_with_a_server_that_is_there(serve, prompts, waits):
    with pytest.raises(LeverError, match="answered 500"):
        make(serve(lambda request: Reply(500, ERROR)).url, retries=2, wait=60.0).generate(prompts[:1])
    assert len(waits) == 2


# ---------------------------------------------------------------------- the room of a server


@pytest.mark.parametrize("most", [None, 0, "4096", True, {}])
def test_a_prompt_that_leaves_no_room_is_refused_before_any_is_asked(serve, prompts, most):
    ours, budget = local(max_pixels=56 * 56 * 16), {"max_pixels": 56 * 56 * 16}
    ours.family.vision.see([image for prompt in prompts for image in prompt.images])
    longest = max(len(ours.family.token_ids(prompt)) for prompt in prompts)
    images = max(sum(map(ours.family.vision.tokens, prompt.images)) for prompt in prompts)

    def asked(room: object) -> Loopback:
        listed = models(NAME)
        listed.body["data"][0]["max_model_len"] = room
        return serve(lambda request: said("x"), listed)

    tight = asked(images + 5)  # the texts have no room
    for ask in (make(tight.url, **budget).batches, make(tight.url, **budget).generate):
        with pytest.raises(LeverError, match=rf"its prompt of . images has .* room for {images} beside an answer of 5"):
            ask(prompts)
    assert tight.asked == []
    for room in (longest + 5, most):  # a prompt that fits is not refused, nor any by a limit that is none
        assert make(asked(room).url, **budget).generate(prompts) == ["x"] * len(prompts)


# ---------------------------------------------------------------------- several servers


def test_prompts_are_shared_among_the_servers_and_come_in_order(serve, prompts):
    def question(request):
        time.sleep(0.02)
        return said(request.body["messages"][-1]["content"][-1]["text"])

    servers = [serve(question) for _ in range(3)]
    lvlm = make(",".join(server.url for server in servers), concurrency=2)
    assert lvlm.batches(prompts) == [list(range(24))], "eight rounds of two requests at three servers"
    assert lvlm.generate(prompts) == [f"Question: {prompt.query.question} Short answer:" for prompt in prompts]
    counts = [len(server.asked) for server in servers]
    assert sum(counts) == len(prompts)
    assert min(counts) >= 4


def test_what_a_dead_server_was_asked_goes_to_the_others(serve, prompts, waits):
    dead, alive = serve(lambda request: Reply(503, "")), serve(lambda request: said("three"))
    lvlm = make(f"{dead.url}, {alive.url}", concurrency=2, retries=2)
    assert lvlm.generate(prompts) == ["three"] * len(prompts)
    assert 1 <= len(dead.asked) <= 4, "it is passed over once it was found dead"
    assert len(alive.asked) == len(prompts)


def test_a_server_that_is_back_is_asked_again(serve, prompts, waits, monkeypatch):
    monkeypatch.setattr(servers_module, "_REST", 0.0)
    down = [True, True]
    back = serve(lambda request: Reply(503, "") if down and down.pop() else said("a"))
    other = serve(lambda request: said("a"))
    lvlm = make(f"{back.url},{other.url}", concurrency=2, retries=2)
    assert lvlm.generate(prompts) == ["a"] * len(prompts)
    assert len(back.asked) > 2 + 4


def test_of_several_servers_each_must_be_there_and_serve_the_model(serve, prompts):
    here, other = serve(lambda request: said("three")), serve(None, models("other"))
    with pytest.raises(LeverError, match=rf"the server {other.url} serves other, not tiny"):
        make(f"{here.url},{other.url}")
    with pytest.raises(LeverError, match=r"no server at http://127\.0\.0\.1:9/v1"):
        make(f"{here.url},http://127.0.0.1:9/v1")
    assert here.asked == []


def test_the_doctor_looks_at_each_of_several_servers_and_needs_no_weights(lever, serve):
    server = serve(None, listed=models("Qwen/Qwen2.5-VL-3B-Instruct"))
    urls = f"{server.url},http://127.0.0.1:9/v1"
    done = lever("doctor", "--lvlm", "qwen2.5_vl_3B_server", "--server", urls, "--json")
    assert done.status == 1
    checks = [(check["what"], check["status"]) for check in done.json["checks"] if check["what"].startswith("lvlm.")]
    assert checks == [("lvlm.server", "ok"), ("lvlm.server", "missing")]
    assert server.asked == []


# ---------------------------------------------------------------------- log-probs


@pytest.mark.parametrize(
    "reply",
    [
        said("three"),
        Reply(422, {"detail": "Unexpected fields in the request: {'prompt_logprobs', 'continue_final_message'}"}),
        Reply(400, {"error": {"message": "Unrecognized request argument supplied: prompt_logprobs"}}),
    ],
    ids=["ignored", "transformers", "OpenAI"],
)
def test_a_server_without_log_probs_is_told_from_one_that_failed(serve, prompts, reply):
    server = serve(lambda request: reply)
    with pytest.raises(LeverError) as caught:
        make(server.url, concurrency=1).answer_log_prob(prompts[:3], ["three"] * 3)
    for word in (server.url, "gives no log-probs", "rollout.gt_prob", "rollout.infoscore", "drop --server"):
        assert word in str(caught.value)
    assert len(server.asked) == 1
    settings = {"max_tokens": 1, "prompt_logprobs": 0, "add_generation_prompt": False, "continue_final_message": True}
    assert settings.items() <= server.asked[0].items()
    assert server.asked[0]["messages"][-1] == {"role": "assistant", "content": "three"}


def test_an_empty_answer_cannot_be_scored(tiny, prompts):
    with pytest.raises(LeverError, match=f"question {prompts[1].query.question_id}: cannot score an empty answer"):
        make(tiny.url).answer_log_prob(prompts[:2], ["three", " "])
    with pytest.raises(ValueError):
        make(tiny.url).answer_log_prob(prompts[:2], ["three"])


def places(*tokens: tuple[str, float]) -> list:
    return [
        None,
        *({str(i): {"logprob": score, "rank": 1, "decoded_token": text}} for i, (text, score) in enumerate(tokens)),
    ]


LINE, END = ("\n", -9), ("<|im_end|>", -1)


@pytest.mark.parametrize(
    ("answer", "tokens", "expected"),
    [
        ("a red bus", [LINE, ("a", -1), (" red", -2), (" bus", -4)], -7),
        ("bus", [("assistant\n", -9), ("bus", -4)], -4),
        ("é", [LINE, ("", -1), ("é", -2)], -3),
        ("bus", [LINE, ("a", -1), (" bus", -4)], None),
        ("bus", [("a ", -9), ("bus", -4)], None),
        ("end", [LINE, ("end", -1), ("<|im", -2), ("_", -1), ("end", -2)], None),
        ("né ✓3", [LINE, ("n", -1), ("\ufffd", -1), ("\ufffd ", -1), ("\ufffd\ufffd", -1), ("3", -2)], -6),
        ("a\nb", [LINE, ("a", -1), ("\n", -1), ("b", -2)], -4),
        ("bus", [("bus", -4)], None),
        ("bus", [LINE, ("bus", float("nan"))], None),
        ("bus", [LINE, ("bus", "much")], None),
        ("bus", [LINE, (3, -1)], None),
        ("bus", [LINE, ("bus", -4), END, ("\n", -7)], -5),
        ("bus", [LINE, ("a", -1), (" bus", -4), END], None),
    ],
)
def test_the_tokens_at_the_end_must_spell_the_answer(answer, tokens, expected):
    end = END[0] if END in tokens else ""
    assert log_prob_at_end(places(*tokens), answer, end) == expected
    if not end:
        assert log_prob_at_end(places(*tokens), answer, END[0]) is None, "the turn is not closed"


@pytest.mark.parametrize("odd", [[], [None], [None, 3], [None, {}], ["x", "y"], [None, {"3": {"logprob": 10**400}}]])
def test_odd_log_probs_are_none(odd):
    assert log_prob_at_end(odd, "three") is None


def test_log_probs_that_do_not_fit_the_answer_are_refused_by_name(serve, prompts):
    reply = said("")
    reply.body["prompt_logprobs"] = places(("\n", -1), ("four", -1))
    for end, words in ((False, "'three'"), (True, r"'three' and <\|im_end\|> .*: rollout\.gt_prob_end=false")):
        with pytest.raises(LeverError, match=rf"question {prompts[0].query.question_id}: the tokens .* {words}"):
            make(serve(lambda request: reply).url).answer_log_prob(prompts[:1], ["three"], end=end)


# ---------------------------------------------------------------------- what was done is kept


def flaky(good: int):
    """Answers so many questions, then no more."""
    count, lock = [0], threading.Lock()

    def answer(request):
        with lock:
            count[0] += 1
            return said(f"answer {count[0]}") if count[0] <= good else Reply(500, ERROR)

    return answer


def test_all_that_was_answered_is_kept_and_a_rerun_asks_the_rest(serve, prompts, waits, tmp_path):
    def opened(url):
        config = config_of(url, concurrency=1, retries=0)
        return load_lvlm(config, PromptConfig(), device="cpu", cache=tmp_path / "answers.sqlite", track=track)

    first = serve(flaky(12))  # a batch of eight, and a part of the second
    with pytest.raises(LeverError, match="answered 500"):
        opened(first.url).generate(prompts)
    second = serve(lambda request: said("later"))  # elsewhere, and the same model
    answers = opened(second.url).generate(prompts)
    assert [answer for answer in answers if answer != "later"] == [f"answer {i + 1}" for i in range(12)]
    assert len(second.asked) == 12


# ---------------------------------------------------------------------- config and identity


NO_URLS = ["127.0.0.1:8000", "ftp://host/v1", "http://", "http:///v1", "http://host:x/v1", "http://h/v1?a=b"]


@pytest.mark.parametrize("url", [*NO_URLS, "http://a b/v1", "http://host/v1,", "http://host/v1,host:8000"])
def test_a_server_must_be_a_url(url):
    with pytest.raises(UsageError, match=r"lvlm\.server must be the URL of a server.*--server http://127"):
        LvlmConfig(server=url)
    with pytest.raises(UsageError, match="OPENAI_API_KEY") as caught:  # and hold no password
        LvlmConfig(server="http://me:secret@host/v1")
    assert "secret" not in str(caught.value)


def test_an_end_of_ones_own_is_refused_with_a_server():
    with pytest.raises(UsageError, match=r"lvlm\.eos is tokenizer: --set lvlm\.eos=model"):
        LvlmConfig(server="http://a/v1", eos="tokenizer")


def test_beams_are_refused_before_anything_is_asked(lever):
    done = lever("rollout", "--lvlm", "qwen2.5_vl_3B", "--server", "http://127.0.0.1:9/v1", "--dry-run")
    assert done.status == 2
    assert "lvlm.num_beams is 3: --set lvlm.num_beams=1" in done.err


def test_the_fingerprint_follows_what_is_asked_and_not_where():
    base, prompt = config_of("http://a/v1"), PromptConfig()
    stamp = server_fingerprint(base, prompt)
    speed = {"server": "https://b/v1", "concurrency": 3, "timeout": 1.0, "retries": 0, "wait": 9.0, "batch_size": 3}
    assert server_fingerprint(dataclasses.replace(base, **speed), prompt) == stamp
    asked = {"path": "x", "repetition_penalty": 1.05, "max_new_tokens": 6, "max_pixels": 10**6, "min_pixels": 4000}
    for name, value in asked.items():
        assert server_fingerprint(dataclasses.replace(base, **{name: value}), prompt) != stamp
    assert server_fingerprint(base, PromptConfig(style="dialogue")) != stamp
    assert server_fingerprint(base, PromptConfig(cut="classic")) == stamp, "answers are kept uncut"
    here = LvlmConfig(path=TINY)
    assert server_fingerprint(dataclasses.replace(here, server="http://a/v1"), prompt) != local_fingerprint(
        here, prompt, "cpu"
    )
    hurried = dataclasses.replace(here, concurrency=3, timeout=1.0, retries=0)
    assert local_fingerprint(hurried, prompt, "cpu") == local_fingerprint(here, prompt, "cpu")


# ---------------------------------------------------------------------- through the command line


@pytest.fixture(scope="module")
def tiny_by_path():
    """The shipped model under the name that the config `tiny_qwen2.5_vl` asks a server for."""
    folder = str(asset_path(TINY))
    with Loopback(TinyChat(folder, folder)).running() as server:
        yield server


def test_rollouts_of_a_server_are_those_of_the_local_model_and_not_taken_for_them(digits_folder, lever, tiny_by_path):
    command = ("rollout", "--limit", "2", *FEW, "--set", "rollout.gt_prob=true")
    assert lever(*command).status == 0
    path = next((digits_folder / "results/digits/generated_data").glob("*.json"))
    here, known, root = json.loads(path.read_text()), answers_in(digits_folder), tiny_by_path.url.removesuffix("/v1")
    asked = len(tiny_by_path.asked)
    assert "LVLM calls, time unknown" in lever(*command, "--server", root, "--dry-run").out
    assert len(tiny_by_path.asked) == asked, "a plan asks nothing"
    done = lever(*command, "--server", root)
    assert done.status == 0, done.err
    lines = (done.out + done.err).splitlines()
    told = lines.index(f"server: {root}/v1 is asked, where {root} has no list of models")
    assert told < next(i for i, line in enumerate(lines) if line.startswith("rollouts: ")), "it is said before the work"
    assert answers_in(digits_folder) == 2 * known, "a server's answers are not the local model's"
    there = json.loads(path.read_text())
    assert here.pop("_meta")["fingerprint"] != there.pop("_meta")["fingerprint"]
    assert without_probs(here) == without_probs(there)
    asked = len(tiny_by_path.asked)
    elsewhere = tiny_by_path.url.replace("127.0.0.1", "localhost")
    assert lever(*command, "--server", elsewhere, "--set", "lvlm.concurrency=2").status == 0
    assert len(tiny_by_path.asked) == asked, "the same model at another address is known"


def without_probs(rollouts):
    """The file's content with numbers rounded: sums of log-probs differ in their last digits."""
    if isinstance(rollouts, dict):
        return {key: without_probs(value) for key, value in rollouts.items()}
    if isinstance(rollouts, list):
        return [without_probs(value) for value in rollouts]
    return round(rollouts, 3) if isinstance(rollouts, float) else rollouts


def test_inference_through_a_server_is_that_of_the_local_model(trained, lever, tiny_by_path):
    command, predictions = ("infer", "--limit", "6", "--shots", "1,2", "--json"), []
    for server in ("", tiny_by_path.url):
        done = lever(*command, "--server", server)
        assert done.status == 0, done.err
        files = sorted(Path(done.json["folder"]).glob("predictions_*.json"))
        predictions.append([path.read_text() for path in files])
    assert predictions[0] == predictions[1]
    assert len(predictions[0]) == 2


def test_the_key_is_in_nothing_that_is_written(digits_folder, lever, tiny_by_path, monkeypatch):
    monkeypatch.setenv(client.KEY_VARIABLE, KEY)
    done = lever("train", "--limit", "4", *EPOCHS, *FEW, "--server", tiny_by_path.url)
    assert done.status == 0, done.err
    assert tiny_by_path.requests[-1].headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in done.out + done.err
    files = [path for path in digits_folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("command", [("rollout",), ("train",), ("doctor",)])
def test_a_dead_server_stands_in_the_list_of_what_is_missing(lever, tmp_path, command):
    done = lever(*command, "--server", "http://127.0.0.1:9/v1")
    assert done.status == 1
    assert "lvlm.server: no server at http://127.0.0.1:9/v1" in done.out + done.err
    assert "start it (vllm serve " in done.out + done.err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("owner", "warned"), [("vllm", False), ("sglang", True)])
def test_the_doctor_warns_of_a_server_that_may_not_score_reference_answers(lever, serve, owner, warned):
    server = serve(None, listed=models(str(asset_path(TINY)), owner=owner))
    done = lever("doctor", "--server", server.url, "--set", "rollout.gt_prob=true", "--json")
    assert done.status == 0, done.out
    assert ("log-probs" in {check["what"] for check in done.json["checks"]}) is warned


def test_ctrl_c_ends_at_once_and_keeps_every_answer_that_came(digits_folder, lever):
    """The signal comes as from a terminal, while the eleventh request is under way."""
    count, held, folder = [0], threading.Event(), str(asset_path(TINY))

    def answer(request):
        if request.method == "GET":
            return models(folder)
        count[0] += 1
        if count[0] == 11:
            os.kill(os.getpid(), signal.SIGINT)
        if count[0] > 10:
            held.wait(60)
        return said("three")

    with Loopback(answer).running() as server:
        started = time.monotonic()
        done = lever("rollout", "--limit", "4", "--server", server.url, "--set", "lvlm.concurrency=1")
        took = time.monotonic() - started
        held.set()
    assert done.status == 130
    assert "interrupted" in done.err
    assert took < 45, "the request under way takes a minute"
    assert answers_in(digits_folder) == 10


# ---------------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The URL of `transformers serve` with the shipped model; see serve_tiny.py."""
    for package in ("fastapi", "uvicorn", "openai", "accelerate"):
        pytest.importorskip(package)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("hub")
    (home / "hub").mkdir()
    log = home / "serve.log"
    command = [sys.executable, str(CHECKOUT / "tests/serve_tiny.py"), str(asset_path(TINY)), str(port)]
    with open(log, "w") as out:
        process = subprocess.Popen(
            command, env=clean_environment(HF_HOME=str(home), HF_HUB_OFFLINE="1"), stdout=out, stderr=subprocess.STDOUT
        )
    try:
        config = config_of(f"http://127.0.0.1:{port}/v1", path=TINY)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            try:
                check_server(config)
                break
            except LeverError:
                time.sleep(0.2)
        else:
            pytest.fail(f"transformers serve did not start: {log.read_text()[-2000:]}")
        yield config.server
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("style", ["interleaved", "dialogue"])
def test_a_real_server_gives_the_local_answers(real, prompts, style):
    chosen = [prompt for prompt in prompts if len(prompt.icds) in (0, 1, 4)][:9]
    answers = make(real, style, path=TINY).generate(chosen)
    assert answers == local(style).generate(chosen)
    assert len(set(answers)) >= 4


@pytest.mark.slow
def test_a_real_server_without_log_probs_says_so(real, prompts):
    with pytest.raises(LeverError, match="gives no log-probs"):
        make(real, path=TINY).answer_log_prob(prompts[:1], ["three"])
