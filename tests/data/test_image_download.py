"""Images that a table names by path or address: taken from inside the data's folders, fetched where that is allowed."""

import contextlib
import gzip
import json
import os
import socket
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import datasets
import pytest
from helpers import small_digits
from official import write_parquet
from pictures import EPS, picture, png

from lever_lm.config.schema import DataConfig
from lever_lm.data import image_download as remote
from lever_lm.data import load_dataset, open_image
from lever_lm.utils.errors import LeverError


class Server(BaseHTTPRequestHandler):
    """Serves what `files` says under a path: status, headers, body. Counts what it was asked."""

    def do_GET(self):
        self.asked.append(self.path)
        status, headers, body = self.files.get(self.path, (404, {}, b""))
        if callable(body):
            body = body(self.asked.count(self.path))
            status = 200 if body else 503
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """An address on this machine, and a handler to fill."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler = type("Own", (Server,), {"files": {}, "asked": []})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as serving:
        serving.daemon_threads = True
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{serving.server_address[1]}", handler
        serving.shutdown()
        thread.join()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a parquet copy whose training images are as given, and loads it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "copy"

    def write(images: list) -> Path:
        for split in ("train", "val"):
            entries = images if split == "train" else [{"bytes": picture(), "path": None}]
            rows = [
                {"question_id": i, "image": image, "question": f"what is {i} in {split}?", "answers": ["cat"] * 10}
                for i, image in enumerate(entries, 1)
            ]
            write_parquet(root / f"{split}.parquet", rows)
        return root

    def load(images: list, **how):
        root = write(images)
        return load_dataset(DataConfig("copy", str(root), how.pop("coco_path", str(root)), **how))

    load.root, load.write = root, write
    return load


def named(place: str) -> dict:
    return {"bytes": None, "path": place}


def test_a_path_is_taken_inside_the_folder_of_the_data_or_of_the_images(table, tmp_path):
    for folder in ("copy/pictures", "coco/train2014"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jpg").write_bytes(picture())
    places = ["pictures/a.jpg", str(table.root / "pictures/a.jpg"), "train2014/a.jpg", "pictures/../pictures/a.jpg"]
    held = {"bytes": picture(quality=30), "path": "gone.jpg"}
    data = table([*map(named, places), held], coco_path=str(tmp_path / "coco"))
    assert [open_image(example.image).size for example in data.train_examples] == [(8, 6)] * 5
    assert [row["image"].size for row in data.train] == [(8, 6)] * 5
    assert len({example.image_id for example in data.train_examples}) == 2, "told apart by content"
    strings = table(places, coco_path=str(tmp_path / "coco"))
    assert [e.image for e in strings.train_examples] == [e.image for e in data.train_examples[:4]]
    (table.root / "pictures/a.jpg").write_bytes(picture(quality=10))
    changed = table(places, coco_path=str(tmp_path / "coco"))
    assert changed.fingerprint != strings.fingerprint


OUTSIDE = ["/etc/passwd", "../secret.jpg", "link.jpg", "linked/secret.jpg", "gone.jpg", "pipe.jpg", "folder.jpg"]


@pytest.mark.parametrize("place", [*OUTSIDE, "a\0b.jpg", "x" * 5000, "circle.jpg"], ids=lambda p: repr(p)[:20])
def test_a_path_that_leads_elsewhere_is_refused_by_row_question_and_option(table, tmp_path, place):
    root = table.write([named("a.jpg")])
    (tmp_path / "secret.jpg").write_bytes(picture())
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "linked").symlink_to(tmp_path)
    (root / "circle.jpg").symlink_to(root / "circle.jpg")
    (root / "folder.jpg").mkdir()
    os.mkfifo(root / "pipe.jpg")
    for image in (named(place), {"bytes": b"", "path": place}):
        with pytest.raises(
            LeverError, match=r"train\.parquet, row 1, question 2: its image [^\n]*--skip-bad"
        ) as caught:
            table([{"bytes": picture(), "path": None}, image])
        assert len(str(caught.value)) < 700
    assert len(table([{"bytes": picture(), "path": None}, named(place)], skip_bad_examples=True).skipped) == 1


NEVER = [
    "file:///etc/passwd",
    "ftp://127.0.0.1/a.jpg",
    "data:image/jpeg;base64,AAAA",
    "zip://a.jpg::http://127.0.0.1/a.zip",
    "hf://datasets/a/b/c.jpg",
    "http://",
    "http:///a.jpg",
]


@pytest.mark.parametrize("address", NEVER)
def test_an_address_of_another_scheme_is_never_followed(table, monkeypatch, address):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail(f"it was followed: {a}"))
    with pytest.raises(LeverError, match=r"train\.parquet, row 0, question 1: its image [^\n]*$"):
        table([named(address)], allow_remote=True)


def test_an_address_is_refused_unless_it_is_allowed_and_fetched_once_then(table, server, tmp_path, monkeypatch):
    address, handler = server
    handler.files["/a.jpg"] = (200, {}, picture())
    handler.files["/moved.jpg"] = (302, {"Location": "/a.jpg"}, b"")
    images = [named(f"{address}/a.jpg"), named(f"{address}/moved.jpg"), named(f"{address}/a.jpg")]
    with pytest.raises(LeverError, match=r"row 0, question 1: its image is at [^\n]*--allow-remote"):
        table(images)
    assert handler.asked == []
    for _ in range(2):
        data = table(images, allow_remote=True)
        assert [open_image(example.image).size for example in data.train_examples] == [(8, 6)] * 3
        assert sorted(handler.asked) == ["/a.jpg", "/a.jpg", "/moved.jpg"]
    kept = sorted((tmp_path / "cache" / "lever_lm_images").iterdir())
    assert len(kept) == 2
    assert all(path.read_bytes() == picture() for path in kept)


def test_a_failure_that_may_pass_is_repeated(table, server, monkeypatch):
    address, handler = server
    handler.files["/late.jpg"] = (200, {}, lambda times: picture() if times > 1 else b"")
    assert len(table([named(f"{address}/late.jpg")], allow_remote=True).train_examples) == 1
    assert handler.asked == ["/late.jpg"] * 2


WRONG_ANSWERS = {
    "absent": ((404, {}, b""), "answered 404"),
    "page": ((200, {"Content-Type": "image/jpeg"}, b"<html></html>"), "no image"),
    "eps": ((200, {}, EPS), "no image"),
    "bomb": ((200, {}, png(12_000, 8_000, bytes(100))), "no image.*pixels"),
    "file": ((302, {"Location": "file:///etc/passwd"}, b""), "leads nowhere"),
    "circle": ((302, {"Location": "/circle"}, b""), "leads nowhere"),
    "nowhere": ((302, {}, b""), "answered 302"),
    "large": ((200, {}, bytes(3000)), "larger than"),
    "packed": ((200, {"Content-Encoding": "gzip"}, gzip.compress(bytes(1 << 20))), "larger than|nothing came"),
}


@pytest.mark.parametrize("kind", WRONG_ANSWERS)
def test_what_comes_from_an_address_is_kept_if_it_is_an_image(table, server, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(remote, "MAX_BYTES", 2000)
    address, handler = server
    answer, words = WRONG_ANSWERS[kind]
    handler.files[f"/{kind}"] = answer
    with pytest.raises(LeverError, match=rf"row 0, question 1: its image '{address}/{kind}': [^\n]*({words})"):
        table([named(f"{address}/{kind}")], allow_remote=True)
    left = table(
        [named(f"{address}/{kind}"), {"bytes": picture(), "path": None}], allow_remote=True, skip_bad_examples=True
    )
    assert len(left.skipped) == len(left.train_examples) == 1
    folder = tmp_path / "cache" / "lever_lm_images"
    assert [path.name for path in folder.iterdir()] == []


def test_a_slow_server_is_given_up(table, server, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 0.2)
    monkeypatch.setattr(remote, "_TRIES", 1)
    address, handler = server
    handler.files["/slow"] = (200, {}, lambda times: time.sleep(1) or picture())
    with pytest.raises(LeverError, match=r"nothing came|did not come within"):
        table([named(f"{address}/slow")], allow_remote=True)


def test_the_option_reaches_the_loader_from_the_command_line(table, server, lever, monkeypatch):
    address, handler = server
    handler.files["/a.jpg"] = (200, {}, picture())
    root = table.write([named(f"{address}/a.jpg")] * 3)
    monkeypatch.setenv("OKVQA_PATH", str(root))
    command = ("rollout", "--dataset", "okvqa_local", "--set", "features.encoder=asset:tiny-clip", "--limit", "2")
    done = lever(*command)
    assert (done.status, handler.asked) == (1, [])
    assert "--allow-remote" in done.err
    lever(*command, "--allow-remote")
    assert handler.asked == ["/a.jpg"]


def test_an_address_in_an_official_file_is_ignored(tmp_path, server):
    address, handler = server
    folder = small_digits(tmp_path / "digits", train=3, val=3)
    for path in folder.glob("*questions.json"):
        content = json.loads(path.read_text())
        for question in content["questions"]:
            question |= {"image": f"{address}/a", "coco_url": f"{address}/b", "flickr_url": "file:///etc/passwd"}
        path.write_text(json.dumps(content))
    data = load_dataset(DataConfig("small", str(folder), str(folder), allow_remote=True))
    assert all(Path(e.image).parent.parent == folder for e in (*data.train_examples, *data.val_examples))
    assert handler.asked == []
