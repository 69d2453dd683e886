"""Data as people have it: official folders, parquet copies, hub ids without network, odd and broken images.

What is refused is refused through the command line: exit status 1, one message, nothing written.
"""

import contextlib
import copy
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import tracemalloc
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CHECKOUT, clean_environment, files_in, track
from official import (
    ANNOTATIONS,
    QUESTIONS,
    build_official,
    build_parquet,
    hub_cache,
    image_path,
    parquet_rows,
    photo,
    read_official,
    write_parquet,
)
from PIL import Image

from lever_lm.config.load import resolve
from lever_lm.config.schema import DataConfig, FeatureConfig, LvlmConfig, PromptConfig
from lever_lm.data import image_digest, load_dataset, open_image
from lever_lm.data.checks import check_examples, check_files
from lever_lm.data.embeddings import compute_features, encoder_fingerprint
from lever_lm.data.encoder import FeatureEncoder
from lever_lm.data.pools import Candidates
from lever_lm.lvlm import build_prompt
from lever_lm.lvlm.backend import load_local
from lever_lm.lvlm.local import LocalLvlm, local_fingerprint
from lever_lm.utils.errors import LeverError
from lever_lm.utils.hub import fetch_model, missing_files, model_folder, weights_digest
from lever_lm.utils.paths import asset_path

CLIP, QWEN = "openai/clip-vit-large-patch14", "Qwen/Qwen2.5-VL-3B-Instruct"
TINY_CLIP, TINY_QWEN = asset_path("asset:tiny-clip"), asset_path("asset:tiny-qwen2.5-vl")
TRAIN_HUB, VAL_HUB = "Multimodal-Fatima/OK-VQA_train", "lmms-lab-encoder/OK-VQA"
ROLLOUT = ("rollout", "--dataset", "okvqa_local", "--set", "features.encoder=asset:tiny-clip", "--limit", "4")
TRAIN_QUESTIONS, TRAIN_ANNOTATIONS = QUESTIONS.format("train2014"), ANNOTATIONS.format("train2014")


# ---------------------------------------------------------------------- what the tests share


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Empty caches of the hub and of `datasets`, of this file's own: the path of what stands for HF_HOME."""
    import datasets
    from huggingface_hub import constants

    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        yield home


@pytest.fixture
def home(tmp_path_factory, monkeypatch):
    """Caches of the test's own."""
    import datasets
    from huggingface_hub import constants

    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """An official dataset, to be read only."""
    return build_official(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, official) -> Path:
    """Its parquet copy, to be read only."""
    return build_parquet(tmp_path_factory.mktemp("parquet"), official)


@pytest.fixture
def small(tmp_path_factory) -> Path:
    """A smaller official dataset of the test's own."""
    return build_official(tmp_path_factory.mktemp("small"), train=12, val=6)


@pytest.fixture(scope="module")
def lvlm() -> LocalLvlm:
    return load_local(LvlmConfig(path="asset:tiny-qwen2.5-vl", dtype="float32"), PromptConfig(), "cpu")


@pytest.fixture(scope="module")
def clip() -> FeatureEncoder:
    return FeatureEncoder("asset:tiny-clip", "cpu", 16)


def load(folder: Path | str, coco: Path | str = "", **how):
    return load_dataset(DataConfig("okvqa", str(folder), str(coco or folder), **how))


def from_environment(dataset: str):
    """The dataset that `lever … --dataset NAME` would load."""
    return load_dataset(resolve({"dataset": dataset}, None, [], {})[0].data)


def texts(examples) -> list[tuple]:
    return [(e.question_id, e.question, e.answers) for e in examples]


def same_data(ours, theirs) -> None:
    """The same questions, answers and image contents in both splits."""
    for split in ("train_examples", "val_examples"):
        one, other = getattr(ours, split), getattr(theirs, split)
        assert texts(one) == texts(other)
        assert [image_digest(e.image) for e in one] == [image_digest(e.image) for e in other]


@pytest.fixture
def refused(lever, tmp_path):
    """Run a command that must fail: exit status 1, one line on stderr that is no traceback, nothing written."""

    def run(*arguments) -> str:
        before = files_in(tmp_path)
        done = lever(*arguments)
        assert done.status == 1, done.out + done.err
        assert done.err.startswith("lever: ")
        listed = 1 + done.err.count("\n  ")  # one line, or a heading and a line for each thing that is missing
        assert done.err.count("\n") == listed, done.err
        assert "a defect of lever_lm" not in done.err
        assert files_in(tmp_path) == before
        return done.err

    return run


# ---------------------------------------------------------------------- official files


def test_vqav2_loads_with_its_names_and_fields(tmp_path, monkeypatch):
    build_official(tmp_path / "vqa", coco=tmp_path / "coco", prefix="v2_", raw=False)
    monkeypatch.setenv("VQAV2_PATH", str(tmp_path / "vqa"))
    monkeypatch.setenv("COCO_PATH", str(tmp_path / "coco"))
    data = from_environment("vqav2_local")
    assert data.name == "vqav2"
    assert (len(data.train_examples), len(data.val_examples)) == (24, 12)
    assert data.train_examples[0].answers == data.train_examples[0].raw_answers
    assert data.train_examples[0].answer == "surfing"


@pytest.mark.parametrize(("dataset", "taken"), [("vqav2_local", "VQAV2_PATH"), ("okvqa_local", "OKVQA_PATH")])
def test_each_dataset_takes_its_own_variable_before_the_others(tmp_path, monkeypatch, dataset, taken):
    sizes = {"OKVQA_PATH": 7, "VQAV2_PATH": 11}
    for name, size in sizes.items():
        folder = build_official(tmp_path / name, coco=tmp_path, train=size, prefix="v2_" if name[0] == "V" else "")
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("COCO_PATH", str(tmp_path))
    assert len(from_environment(dataset).train_examples) == sizes[taken]


# ---------------------------------------------------------------------- parquet copies

COPIES = {
    "numeric ids": {"ids_as_text": False},
    "without the types of datasets": {"described": False, "dict_answers": True},
    "subfolders, several shards": {"names": "{split}/{shard:04d}.parquet", "shards": 3},
    "split named validation": {"splits": ("train", "validation")},
    "split named test": {"splits": ("train", "test")},
    "folders named after files": {"names": "{split}.parquet/part-{shard:05d}.snappy.parquet", "shards": 2},
}


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_parquet_copy_holds_what_the_official_files_hold(official, tmp_path, how):
    data = load(build_parquet(tmp_path, official, **how), "nowhere")
    same_data(data, load(official))
    assert data.skipped == ()
    typed = [e.raw_answers for e in data.train_examples]
    if how.get("dict_answers"):
        assert typed == [e.raw_answers for e in load(official).train_examples]
    else:
        assert typed == [e.answers for e in data.train_examples], "the copy has no other"


@pytest.mark.parametrize("column", ["bytes and no path", "bytes alone"])
def test_the_image_column_may_hold_bytes_without_a_path(official, tmp_path, column):
    for split in ("train", "val"):
        rows = parquet_rows(official, split)
        for row in rows:
            content = row["image"]["bytes"]
            row["image"] = {"bytes": content} if column == "bytes and no path" else content
        write_parquet(tmp_path / f"{split}.parquet", rows, described=False)
    same_data(load(tmp_path), load(official))


def test_the_training_split_may_lie_elsewhere_whatever_its_files_are_called(official, tmp_path):
    build_parquet(tmp_path / "here", official, splits=("val2014",), names="part-{shard}.parquet")
    there = build_parquet(
        tmp_path / "ok vqa [copy] {1} *ü", official, splits=("train",), names="part-{shard}.parquet", shards=2
    )
    same_data(load(tmp_path / "here", train_path=str(there)), load(official))


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_split_may_be_official_and_the_other_parquet(official, tmp_path, split):
    build_parquet(tmp_path, official, splits=("train",) if split == "train" else ("val2014",))
    places = {"train": (official, tmp_path), "val": (tmp_path, official)}[split]
    same_data(load(places[0], official, train_path=str(places[1])), load(official))


def test_a_test_split_without_answers_does_not_join_the_validation_split(official, tmp_path):
    """As lmms-lab/VQAv2 has it: validation with answers, test and testdev without."""
    build_parquet(tmp_path, official, splits=("train", "validation"))
    rows = parquet_rows(official, "val")
    for i, row in enumerate(rows):
        row |= {"question_id": str(900_000 + i), "answers": None}
    for name in ("test", "testdev"):
        write_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet", rows)
    same_data(load(tmp_path), load(official))


WHICH = {  # files → the split that each is of
    "a folder named after both": {"train_val/train.parquet": "train", "train_val/val.parquet": "val"},
    "a sentence for a folder": {"train-val-split/train.parquet": "train", "train-val-split/val.parquet": "val"},
    "a folder that says the other": {"train/old/val.parquet": "val", "val/train-0.parquet": "train"},
    "folders alone": {"train/0000.parquet": "train", "val/0000.parquet": "val"},
    "the nearest folder": {"train_val/train/0.parquet": "train", "train_val/val/0.parquet": "val"},
    "capitals": {"OKVQA_Train.parquet": "train", "OKVQA_Val2014.parquet": "val"},
    "words that only begin so": {"train.parquet": "train", "val.parquet": "val", "trainval.parquet": None},
}


@pytest.mark.parametrize("files", WHICH.values(), ids=WHICH)
def test_a_parquet_file_serves_one_split_by_its_own_name(official, tmp_path, files):
    for name, split in files.items():
        write_parquet(tmp_path / name, parquet_rows(official, split or "train"))
    same_data(load(tmp_path), load(official))


@pytest.mark.parametrize("name", ["mine_train_val.parquet", "train-val.parquet", "train_val/0000.parquet"])
def test_a_parquet_file_that_is_named_after_both_splits_is_refused_by_name(official, tmp_path, name):
    for file in (name, "train.parquet", "val.parquet"):
        write_parquet(tmp_path / file, parquet_rows(official, "train"))
    with pytest.raises(LeverError, match=rf"{name} is named after both splits; rename it"):
        load(tmp_path)
    told = [check for check in check_files(DataConfig("okvqa", str(tmp_path), str(official))) if "both" in check.found]
    assert {check.status for check in told} == {"missing"}


@pytest.mark.parametrize("skip", [False, True])
def test_doctor_names_the_training_questions_that_are_in_the_evaluation_split_too(official, parquet, tmp_path, skip):
    """The evaluation split is read as the training split, and so all of it is in both."""
    rows = parquet_rows(official, "val")
    write_parquet(tmp_path / "train.parquet", rows)
    config = DataConfig("mine", str(parquet), str(official), train_path=str(tmp_path), skip_bad_examples=skip)
    *_, told = check_examples(config, {})
    assert (told.what, told.status) == ("splits", "warning" if skip else "missing")
    assert "12 of 12 training questions are in the evaluation split, too" in told.found


def test_one_folder_for_both_splits_is_refused(official, tmp_path):
    write_parquet(tmp_path / "rows.parquet", parquet_rows(official, "train"))
    for how in ({}, {"train_path": str(tmp_path)}):
        with pytest.raises(LeverError, match="24 of 24 training questions are in the evaluation split, too"):
            load(tmp_path, **how)
        with pytest.raises(LeverError, match="the train split holds no usable example"):
            load(tmp_path, **how, skip_bad_examples=True)


def test_a_cache_of_datasets_that_cannot_be_written_is_named(official, tmp_path, monkeypatch):
    import datasets

    copy_ = build_parquet(tmp_path / "copy", official)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file/datasets")
    with pytest.raises(LeverError, match=r"keep it in .*file/datasets \(HF_DATASETS_CACHE\): .*Not a directory"):
        load(copy_)


def test_a_bad_row_is_named_by_its_file_and_its_row_there(official, tmp_path):
    copy_ = build_parquet(tmp_path, official, shards=3)
    rows = parquet_rows(official, "train")
    rows[19]["answers"] = []
    for shard in range(3):
        write_parquet(copy_ / f"data/train-{shard:05d}-of-00003.parquet", rows[8 * shard : 8 * shard + 8])
    with pytest.raises(LeverError, match=rf"train-00002-of-00003\.parquet, row 3, question {rows[19]['question_id']}:"):
        load(copy_)


def test_a_replaced_file_is_read_anew(official, tmp_path):
    build_parquet(tmp_path, official)
    before = load(tmp_path)
    rows = parquet_rows(official, "train")
    rows[0] |= {"question": "Something else?", "image": {"bytes": photo(777), "path": None}}
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    after = load(tmp_path)
    assert after.train_examples[0].question == "Something else?"
    assert image_digest(after.train_examples[0].image) != image_digest(before.train_examples[0].image)
    assert after.fingerprint != before.fingerprint
    assert load(tmp_path).fingerprint == after.fingerprint


def test_the_table_of_a_parquet_copy_shows_the_same_pictures(official, parquet):
    ours, theirs = load(parquet).train, load(official).train
    assert ours["question_id"][:] == theirs["question_id"][:]
    for row in (0, len(ours) - 1):
        assert ours[row]["image"].convert("RGB").tobytes() == theirs[row]["image"].convert("RGB").tobytes()


# ---------------------------------------------------------------------- images of a copy are the official ones


@pytest.mark.parametrize("train_has_ids", [False, True])
def test_no_query_sees_its_own_picture_where_one_split_alone_has_image_ids(official, tmp_path, train_has_ids):
    """The evaluation questions ask another thing about the photographs of the training split."""
    rows = parquet_rows(official, "train")
    asked = [{**row, "question_id": str(7 + i), "question": "And this?"} for i, row in enumerate(rows)]
    for name, table, has_ids in (("train", rows, train_has_ids), ("val", asked, not train_has_ids)):
        numbered = [{**row, "image_id": 5000 + i} if has_ids else row for i, row in enumerate(table)]
        write_parquet(tmp_path / f"{name}.parquet", numbered)
    data = load(tmp_path)
    candidates, pictures = Candidates(data.train_examples), [example.image for example in data.train_examples]
    for query in (*data.train_examples, *data.val_examples):
        shown = [pictures[row] for row in candidates.allowed(query)]
        assert query.image in pictures
        assert query.image not in shown
        assert len(shown) == len(pictures) - pictures.count(query.image)


# ---------------------------------------------------------------------- hub ids, offline


def test_a_hub_id_is_taken_from_the_hubs_cache(home, official, tmp_path):
    copy_ = build_parquet(tmp_path / "val", official, splits=("val2014",), shards=2)
    hub_cache(home, VAL_HUB, "dataset", copy_, left_out=("README.md", ".gitattributes"))
    hub_cache(home, TRAIN_HUB, "dataset", build_parquet(tmp_path / "train", official, splits=("train",), shards=4))
    data = from_environment("okvqa_hub")
    assert data.name == "okvqa_hub"
    same_data(data, load(official))


def test_a_hub_id_is_taken_from_the_cache_of_datasets(home, official, parquet):
    """What an earlier `load_dataset(REPO)` of anybody's left there: Arrow files, and no parquet in the hub's cache."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    datasets.disable_progress_bars()
    for repository, split in ((VAL_HUB, "val2014"), (TRAIN_HUB, "train")):
        owner, name = repository.split("/")
        builder = Parquet(
            cache_dir=str(home / "datasets"),
            dataset_name=name,
            config_name="default",
            hash="0" * 40,
            data_files={split: [str(parquet / "data" / f"{split}-00000-of-00001.parquet")]},
        )
        builder.download_and_prepare()
        # Files from the hub go by the owner and the config's bare name, files from here by neither.
        made = Path(builder.cache_dir)
        folder = made.parents[2].with_name(f"{owner}___{made.parents[2].name}")
        made.parents[1].rename(made.parents[1].with_name("default"))
        made.parents[2].rename(folder)
    assert not (home / "hub").exists()
    same_data(from_environment("okvqa_hub"), load(official))


def test_a_hub_id_that_is_not_cached_is_refused_with_the_command_that_fetches_it(home, refused):
    message = refused("rollout", "--dataset", "okvqa_hub", "--set", "features.encoder=asset:tiny-clip")
    assert message.startswith("lever: 2 things are missing:\n")
    assert f"hf download --repo-type dataset {TRAIN_HUB}" in message
    assert f"hf download --repo-type dataset {VAL_HUB}" in message
    assert "OKVQA_PATH" in message


def test_an_incomplete_download_of_a_dataset_is_not_taken_for_the_whole(home, official, tmp_path):
    copy_ = build_parquet(tmp_path / "copy", official, shards=3)
    hub_cache(home, VAL_HUB, "dataset", copy_, left_out=("data/train-00001-of-00003.parquet",))
    with pytest.raises(LeverError, match=f"hf download --repo-type dataset {VAL_HUB}"):
        load(f"hub:{VAL_HUB}")


# ---------------------------------------------------------------------- models in the hub's cache


@pytest.mark.parametrize(("repository", "folder"), [(CLIP, TINY_CLIP), (QWEN, TINY_QWEN)])
def test_a_model_is_found_in_the_hubs_cache(home, repository, folder):
    assert model_folder(repository) is None
    snapshot = hub_cache(home, repository, "model", folder)
    assert model_folder(repository) == fetch_model(repository, "x") == snapshot
    assert missing_files(snapshot) == []
    assert weights_digest(snapshot) == weights_digest(folder)
    assert (snapshot / "model.safetensors").is_symlink()


def test_hf_home_leads_to_the_cache(home, tmp_path):
    snapshot = hub_cache(home, CLIP, "model", TINY_CLIP)
    code = f"from lever_lm.utils.hub import fetch_model; print(fetch_model({CLIP!r}, 'x'))"
    nearer = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")  # win over HF_HOME
    environment = {name: value for name, value in clean_environment().items() if name not in nearer}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "HF_HOME": str(home)},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == str(snapshot), done.stderr


def test_a_model_fetched_without_its_other_formats_is_here(home):
    """`fetch_model` itself leaves out what is not needed; the hub's listing still names it."""
    snapshot = hub_cache(home, CLIP, "model", TINY_CLIP, left_out=("README.md", "pytorch_model.bin"))
    assert fetch_model(CLIP, "x") == snapshot
    assert model_folder(CLIP) == snapshot
    assert encoder_fingerprint(CLIP) == f"clip-vit-large-patch14@{weights_digest(TINY_CLIP)}"


@pytest.mark.parametrize("listed", [True, False])
def test_a_model_without_its_weights_is_refused_with_the_command_that_fetches_it(home, listed):
    snapshot = hub_cache(home, QWEN, "model", TINY_QWEN, left_out=("model.safetensors",))
    if not listed:
        shutil.rmtree(snapshot.parents[1] / "trees")
    with pytest.raises(LeverError, match=rf"hf download {QWEN}.*lvlm\.path"):
        fetch_model(QWEN, "lvlm.path")


def test_the_readmes_command_runs_on_cached_hub_ids(home, lever, official, monkeypatch):
    hub_cache(home, CLIP, "model", TINY_CLIP)
    hub_cache(home, QWEN, "model", TINY_QWEN)
    monkeypatch.setenv("OKVQA_PATH", str(official))
    monkeypatch.setenv("COCO_PATH", str(official))
    done = lever("rollout", "--dataset", "okvqa_local", "--lvlm", "qwen2.5_vl_3B", "--limit", "4", "--json")
    assert done.status == 0, done.err
    assert done.json["groups"] == 4
    assert local_fingerprint(LvlmConfig(path=QWEN), PromptConfig(), "cpu") == local_fingerprint(
        LvlmConfig(path=str(TINY_QWEN)), PromptConfig(), "cpu"
    ), "the same weights, wherever they lie"


# ---------------------------------------------------------------------- memory


def test_loading_a_parquet_copy_neither_holds_nor_decodes_its_images(home, tmp_path):
    """No more than a shard and a batch at a time: `datasets` reads a parquet file whole, once, to convert it."""
    import pyarrow

    rng, size, shards, rows = np.random.default_rng(0), 50_000, 12, 50
    for name, first in (("val", 0), *((f"train-{i:05d}-of-{shards:05d}", 1000 * i) for i in range(1, shards + 1))):
        table = [
            {
                "question_id": str(first + i),
                "image": {"bytes": b"\xff\xd8\xff\xe0" + rng.bytes(size), "path": None},
                "question": f"what is {i}?",
                "answers": ["cat"] * 10,
            }
            for i in range(rows if first else 1)
        ]
        write_parquet(tmp_path / f"{name}.parquet", table)
    del table
    total = size * shards * rows
    load(tmp_path)  # imports
    shutil.rmtree(home / "datasets")
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        data = load(tmp_path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(data.train_examples) == shards * rows
    assert held < 0.05 * total, "what stays is text"
    assert pyarrow.total_allocated_bytes() - before < 0.05 * total
    assert peak < 0.3 * total
    with pytest.raises(LeverError, match="cannot decode the image in row 7"):
        open_image(data.train_examples[7].image)


# ---------------------------------------------------------------------- odd images


@pytest.mark.parametrize("kind", ["official", "parquet"])
def test_every_odd_image_goes_through_clip(official, parquet, clip, tmp_path, kind):
    data = load(official if kind == "official" else parquet, official)
    features = compute_features(data, FeatureConfig(encoder="asset:tiny-clip"), tmp_path / "f", "cpu", track)
    matrix = features.train.image
    torch.testing.assert_close(matrix.norm(dim=-1), torch.ones(len(matrix)))
    for row in (0, 3, 5, 6, 9):  # the first question about each odd image
        plain = clip.images([_as_a_viewer_shows(official, data.train_examples[row])])
        torch.testing.assert_close(matrix[row], plain[0], atol=1e-5, rtol=0)


def _as_a_viewer_shows(official: Path, example):
    """Upright, RGB, on white: written apart from open_image."""
    number = int(example.question.split("number ")[1].split()[0])
    with Image.open(image_path(official, "train", 9 + 1931 * number)) as image:
        image.load()
        if image.getexif().get(0x0112) == 6:
            image = image.transpose(Image.Transpose.ROTATE_270)
        if image.mode == "RGBA":
            pixels = np.asarray(image).astype(float)
            share = pixels[..., 3:] / 255
            return Image.fromarray(np.rint(pixels[..., :3] * share + 255 * (1 - share)).astype(np.uint8))
        return image.convert("RGB")


def test_every_odd_image_goes_through_the_lvlm_as_query_and_as_demonstration(official, parquet, lvlm):
    answers = []
    for folder in (official, parquet):
        train = load(folder, official).train_examples
        odd = [train[row] for row in (0, 3, 5, 6, 9)]
        prompts = [build_prompt([train[12], train[-1]], example, PromptConfig()) for example in odd]
        prompts += [build_prompt([example], train[12], PromptConfig()) for example in odd]
        prompts.append(build_prompt(odd, train[12], PromptConfig()))
        answers.append((lvlm.generate(prompts), lvlm.answer_log_prob(prompts, ["cat"] * len(prompts))))
    assert answers[0] == answers[1]
    assert all(np.isfinite(answers[0][1]))


@pytest.mark.parametrize(("kind", "size"), [("official", (300, 1)), ("parquet", (1, 300))])
def test_an_image_that_the_model_cannot_be_shown_is_refused_by_file_and_question(small, lvlm, tmp_path, kind, size):
    path = image_path(small, "val", 42)
    Image.new("RGB", size, "red").save(path)
    data = load(small if kind == "official" else build_parquet(tmp_path / "copy", small), small)
    where = path.name if kind == "official" else "in row 0"
    with pytest.raises(LeverError, match=f"question 421: cannot decode the image .*{where}.*ratio over 200"):
        compute_features(data, FeatureConfig(encoder="asset:tiny-clip"), tmp_path / "f", "cpu", track)
    with pytest.raises(LeverError, match=f"cannot decode the image .*{where}.*ratio over 200"):
        lvlm.generate([build_prompt([], data.val_examples[0], PromptConfig())])
    left = load(small if kind == "official" else tmp_path / "copy", small, skip_bad_examples=True)
    assert (len(left.val_examples), len(left.skipped)) == (3, 3)


# ---------------------------------------------------------------------- truncated images


def test_a_truncated_photograph_stops_the_rollouts_or_is_left_out_and_counted(
    lever, tmp_path, tmp_path_factory, monkeypatch
):
    folder = build_official(tmp_path_factory.mktemp("data"), train=12, val=6)
    path = image_path(folder, "train", 9 + 1931 * 3)  # of questions 6 to 8
    path.write_bytes(path.read_bytes()[:-400])
    ids = [row["question_id"] for row in read_official(folder, "train")[0][6:9]]
    source = build_parquet(tmp_path_factory.mktemp("copy"), folder)
    monkeypatch.setenv("OKVQA_PATH", str(source))
    monkeypatch.setenv("COCO_PATH", str(folder))

    done = lever(*ROLLOUT)
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert f"question {ids[0]}: cannot decode the image" in done.err
    assert "row 6" in done.err
    assert "truncated" in done.err
    assert "--skip-bad-examples" in done.err
    assert not list((tmp_path / "results").rglob("features_*"))
    assert not list((tmp_path / "results").rglob("*.json"))

    done = lever(*ROLLOUT, "--skip-bad-examples", "--json")
    assert done.status == 0, done.err
    assert "9 training and 6 evaluation examples" in done.err
    assert f"3 bad examples left out, the first: question {ids[0]}" in done.err
    assert list((tmp_path / "results").rglob("features_*"))
    content = json.loads(Path(done.json["path"]).read_text())
    assert content["_meta"]["n_train"] == 9
    assert not [entry for key, entry in content.items() if key != "_meta" and entry["query"]["question_id"] in ids]


# ---------------------------------------------------------------------- refused: official files


BAD_OFFICIAL = {
    "not UTF-8": (TRAIN_QUESTIONS, b'{"questions": "\xff\xfe\xff"}', TRAIN_QUESTIONS),
    "annotations cut": (TRAIN_ANNOTATIONS, b'{"annotations": [{"question_id": 1, ', TRAIN_ANNOTATIONS),
    "questions a folder": (TRAIN_QUESTIONS, None, f"{TRAIN_QUESTIONS}.*OKVQA_PATH"),
    "an image a folder": (
        "train2014/COCO_train2014_000000000009.jpg",
        None,
        "question 91.*_000000000009",
    ),
    "images a file": ("train2014", b"", "train2014.*COCO_PATH"),
}


@pytest.mark.parametrize(("name", "content", "words"), BAD_OFFICIAL.values(), ids=BAD_OFFICIAL)
def test_bad_official_files_are_refused_by_file_and_id(small, name, content, words):
    path = small / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(LeverError, match=words) as caught:
        load(small)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- refused: parquet files


def _rows(change):
    """A change to the rows of the training split."""

    def apply(root: Path, rows: list[dict]) -> None:
        write_parquet(root / "train.parquet", change(rows) or rows)

    return apply


def _row(**update):
    return _rows(lambda rows: rows[3].update(update))


def _every(name: str, value):
    return _rows(lambda rows: [row.update({name: value(i)}) for i, row in enumerate(rows)] and None)


def _content(change):
    """A change to the bytes of the training file."""

    def apply(root: Path, rows: list[dict]) -> None:
        path = write_parquet(root / "train.parquet", rows)
        path.write_bytes(change(path.read_bytes()))

    return apply


def _shard(root: Path, rows: list[dict]) -> None:
    for i in range(3):
        write_parquet(root / f"train-{i}-of-3.parquet", rows[4 * i : 4 * i + 4])
    path = root / "train-1-of-3.parquet"
    path.write_bytes(path.read_bytes()[:300])


URL = {"bytes": None, "path": "http://127.0.0.1:9/000000000009.jpg"}


BAD_PARQUET = {
    "no image column": (_rows(lambda rows: [row.pop("image") for row in rows] and None), ["image", "train"]),
    "ids that are text": (_row(question_id="abc"), ["abc"]),
    "an id that is null": (_row(question_id=None), ["train.parquet, row 3"]),
    "an id that is NaN": (_every("question_id", lambda i: float("nan") if i == 3 else float(i)), ["row 3", "nan"]),
    "ids that are true": (_every("question_id", lambda i: i > 3), ["row 0", "question_id"]),
    "raw answers of another number": (
        _every("raw_answers", lambda i: ["cat"] * (1 if i == 3 else 10)),
        ["train.parquet, row 3", "19401", "10 answers and 1 raw_answers"],
    ),
    "an image token in an answer": (_row(answers=["cat", "<|video_pad|>"]), ["row 3", "19401", "<|video_pad|>"]),
    "an id twice": (_rows(lambda rows: [*rows, rows[3]]), ["19401", "row 12"]),
    "an image id over 2**63": (_every("image_id", lambda i: str(2**63 if i == 3 else i)), ["19401", "image_id"]),
    "answers that are null": (_row(answers=None), ["19401", "answers"]),
    "answers that are all blank": (_row(answers=["", " "]), ["19401", "blank"]),
    "answers that are one text": (_every("answers", lambda i: "cat"), ["91", "answers"]),
    "objects without answer": (_every("answers", lambda i: [{"text": "cat"}]), ["91", "answers"]),
    "raw answers that are null": (_every("raw_answers", lambda i: ["cat", None]), ["91", "raw_answers"]),
    "a question that is blank": (_row(question=" "), ["19401", "no question"]),
    "an image that is null": (_row(image=None), ["19401", "image"]),
    "addresses for images": (_every("image", lambda i: URL["path"]), ["91", "row 0", "--allow-remote"]),
    "an image of another type": (_every("image", lambda i: 7), ["train"]),
    "no parquet": (_content(lambda content: b"version https://git-lfs.github.com/spec/v1\n" * 3), ["train.parquet"]),
    "half a file": (_content(lambda content: content[: len(content) // 2]), ["train.parquet"]),
    "a table without rows": (_content(lambda content: _without_rows(content)), ["train"]),
    "a bad shard": (_shard, ["train-1-of-3.parquet"]),
    "a link to nothing": (lambda root, rows: (root / "train.parquet").symlink_to("/nowhere"), ["train.parquet"]),
    "no file of train": (lambda root, rows: None, ["train", "val.parquet", "data.train_path"]),
}


def _without_rows(content: bytes) -> bytes:
    import pyarrow.parquet

    buffer = BytesIO()
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(BytesIO(content)).slice(0, 0), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def small_rows(tmp_path_factory):
    folder = build_official(tmp_path_factory.mktemp("rows"), train=12, val=6)
    return {split: parquet_rows(folder, split) for split in ("train", "val")}


@pytest.mark.parametrize(("change", "words"), BAD_PARQUET.values(), ids=BAD_PARQUET)
def test_bad_parquet_files_are_refused_by_source_and_id(small_rows, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail(f"an address was followed: {a}"))
    write_parquet(tmp_path / "val.parquet", small_rows["val"])
    change(tmp_path, copy.deepcopy(small_rows["train"]))
    with pytest.raises(LeverError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message
    assert [word for word in words if word not in message] == []


def test_bad_rows_of_a_parquet_copy_are_left_out_and_counted(small_rows, tmp_path):
    rows = copy.deepcopy(small_rows["train"])
    rows[1]["answers"] = []
    rows[3]["question_id"] = "abc"
    rows[4]["question"] = None
    rows[5]["image"] = dict(URL)
    rows[11]["image"] = {"bytes": photo(5)[:-300], "path": None}
    write_parquet(tmp_path / "train.parquet", [*rows, rows[8]])
    write_parquet(tmp_path / "val.parquet", small_rows["val"])
    data = load(tmp_path, skip_bad_examples=True)
    left = [row["question_id"] for i, row in enumerate(rows) if i not in (1, 3, 4, 5, 11)]
    assert [str(example.question_id) for example in data.train_examples] == left
    assert len(data.skipped) == 6
    told = "\n".join(data.skipped)
    ids = ["abc", *(rows[i]["question_id"] for i in (1, 4, 5, 8, 11))]
    assert [number for number in ids if f"question {number}" not in told and f"question_id {number}" not in told] == []
    for example in data.train_examples:
        assert open_image(example.image).mode == "RGB", "rows after the gaps still find their image"


def test_a_bad_parquet_file_gets_one_message_and_no_log_beside_it(small_rows, tmp_path):
    write_parquet(tmp_path / "train.parquet", small_rows["train"])
    (tmp_path / "val.parquet").write_bytes(b"nothing")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("datasets").addHandler(handler)
    try:
        with pytest.raises(LeverError, match=r"val\.parquet"):
            load(tmp_path)
    finally:
        logging.getLogger("datasets").removeHandler(handler)
    assert [record.getMessage() for record in records] == []


# ---------------------------------------------------------------------- refused: no permission


@contextlib.contextmanager
def nobody():
    """This process without root's rights, where it has them."""
    import datasets  # noqa: F401 - not to be imported by one who may not read it

    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        if not os.access(TINY_CLIP / "config.json", os.R_OK, effective_ids=True):
            pytest.skip("the checkout is closed to other users")
        yield
    finally:
        os.seteuid(mine)


@pytest.fixture
def shared_folder():
    """A folder that another user can reach: pytest's own are closed to all others."""
    folder = Path(tempfile.mkdtemp(prefix="lever-"))
    folder.chmod(0o777)
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


LOCKED = {
    "questions": ("official", TRAIN_QUESTIONS, 0, TRAIN_QUESTIONS),
    "images to list only": ("official", "train2014", 0o444, "train2014"),
    "parquet file": ("copy", "data/train-00000-of-00001.parquet", 0, "train-00000-of-00001.parquet"),
    "an image": ("official", "train2014/COCO_train2014_000000000009.jpg", 0, "question 91: .*_000000000009"),
}


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no users to switch")
@pytest.mark.parametrize(("which", "name", "mode", "word"), LOCKED.values(), ids=LOCKED)
def test_what_may_not_be_read_is_refused_by_name(shared_folder, monkeypatch, which, name, mode, word):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", shared_folder / "cache")
    official = build_official(shared_folder / "official", train=3, val=3)
    if which == "copy":
        build_parquet(shared_folder / "copy", official)
    (shared_folder / which / name).chmod(mode)
    with nobody(), pytest.raises(LeverError, match=rf"{word}.*[Pp]ermission denied"):
        load(shared_folder / which, official)
