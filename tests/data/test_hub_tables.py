"""configs/dataset: hub copies of data sets, from files of the schemas that the copies have."""

from pathlib import Path

import pytest
from official import hub_cache, photo, write_parquet

from lever_lm.config.load import resolve
from lever_lm.config.schema import Config
from lever_lm.data import load_dataset
from lever_lm.data.checks import check_files
from lever_lm.utils.errors import LeverError

TEN = ["cat", "cat", "cat", "a cat", "dog", "cat", "cat", "cat", "kitten", "cat"]


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch) -> Path:
    """Empty caches of the hub and of `datasets`: what stands for HF_HOME."""
    import datasets
    from huggingface_hub import constants

    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def image(number: int) -> dict:
    return {"bytes": photo(number), "path": f"{number}.jpg"}


def config_of(dataset: str, *sets: str) -> Config:
    return resolve({"dataset": dataset}, None, list(sets), {})[0]


def load(dataset: str, *sets: str):
    return load_dataset(config_of(dataset, *sets).data)


def cached(home: Path, folder: Path, repository: str, files: dict[str, list[dict]], **how) -> Path:
    """Files of a repository of the hub, in the hub's cache."""
    for name, rows in files.items():
        write_parquet(folder / name, rows)
    return hub_cache(home, repository, "dataset", folder, **how)


def a_okvqa(split: str, start: int, count: int) -> list[dict]:
    return [
        {
            "image": image(start + i),
            "question_id": f"22Mex{start + i}",
            "question": f"What is awaited in {start + i}?",
            "choices": ["skateboarder", "train", "delivery", "cab"],
            "correct_choice_idx": None if split == "test" else i % 4,
            "direct_answers": None if split == "test" else "['ride', 'ride', 'bus', 'taxi', \"driver's\"]",
            "difficult_direct_answer": False,
            "rationales": ["A train would not be on the street."],
        }
        for i in range(count)
    ]


@pytest.fixture
def a_okvqa_cached(home, tmp_path):
    files = {"train": (0, 4), "validation": (10, 2), "test": (20, 2)}
    rows = {f"data/{name}-00000-of-00001.parquet": a_okvqa(name, *of) for name, of in files.items()}
    cached(home, tmp_path / "copy", "HuggingFaceM4/A-OKVQA", rows)


def test_a_okvqa_as_a_choice(a_okvqa_cached):
    data = load("aokvqa_choice")
    assert [e.answers for e in data.train_examples] == [("skateboarder",), ("train",), ("delivery",), ("cab",)]
    assert data.train_examples[1].options == ("skateboarder", "train", "delivery", "cab")
    assert [e.question_id for e in data.val_examples] == ["22Mex10", "22Mex11"]
    assert (data.name, data.task) == ("aokvqa_choice", "choice")


def test_a_okvqa_by_direct_answers(a_okvqa_cached):
    data = load("aokvqa_direct")
    assert data.val_examples[0].answers == ("ride", "ride", "bus", "taxi", "driver's")
    assert (data.val_examples[0].options, data.task) == ((), "vqa")
    assert [check.status for check in check_files(config_of("aokvqa_direct").data)] == ["ok", "ok"]


def test_science_qa_has_questions_without_an_image(home, tmp_path):
    def rows(start: int, count: int) -> list[dict]:
        return [
            {
                "image": image(start + i) if i % 2 else None,
                "question": f"Which is farthest {start + i}?",
                "choices": ["north", "south", "east"][: 2 + i % 2],
                "answer": i % 2,
                "hint": "",
                "task": "closed choice",
                "grade": "grade2",
                "subject": "social science",
                "lecture": "Maps have four directions.",
                "solution": "To find out, look at the compass.",
            }
            for i in range(count)
        ]

    sizes = {"train": (0, 4), "validation": (10, 2), "test": (20, 2)}
    files = {f"data/{name}-00000-of-00001-1028f23e353fbe3e.parquet": rows(*of) for name, of in sizes.items()}
    cached(home, tmp_path / "copy", "derek-thomas/ScienceQA", files)
    data = load("scienceqa")
    assert [e.answers for e in data.train_examples] == [("north",), ("south",)] * 2
    assert [e.options for e in data.train_examples][:2] == [("north", "south"), ("north", "south", "east")]
    assert [e.image is None for e in data.train_examples] == [True, False, True, False]
    assert [e.question_id for e in (*data.train_examples, *data.val_examples)] == [0, 1, 2, 3, 4, 5]


def viz_wiz(start: int, count: int) -> list[dict]:
    return [
        {
            "question_id": f"VizWiz_val_{i:08d}.jpg",
            "image": image(i),
            "question": f"What is this? {i}",
            "answers": TEN,
            "category": "other",
        }
        for i in range(start, start + count)
    ]


def test_viz_wiz_needs_a_training_split_of_ones_own(home, tmp_path):
    rows = {"data/val-00000-of-00001.parquet": viz_wiz(0, 2), "data/test-00000-of-00001.parquet": viz_wiz(5, 2)}
    cached(home, tmp_path / "copy", "lmms-lab-encoder/VizWiz-VQA", rows)
    with pytest.raises(LeverError, match=r"--data FILE, data\.file"):
        load("vizwiz")
    write_parquet(tmp_path / "mine/rows.parquet", viz_wiz(10, 3))
    data = load("vizwiz", f"data.file={tmp_path / 'mine'}")
    assert [e.question_id for e in data.val_examples] == ["VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg"]
    assert len(data.train_examples) == 3
    assert data.val_examples[0].answers == tuple(TEN)


def test_text_vqa(home, tmp_path):
    def rows(split: str, start: int, count: int) -> list[dict]:
        return [
            {
                "image_id": f"0054c91397f2fe{i:02d}",
                "question_id": i,
                "question": f"what brand is this camera {i}?",
                "question_tokens": ["what", "brand"],
                "image": image(i),
                "image_width": 1024,
                "flickr_300k_url": "https://example.org/a.jpg",
                "answers": [] if split == "test" else TEN,
                "set_name": split,
            }
            for i in range(start, start + count)
        ]

    sizes = {"train": (0, 3), "validation": (10, 2), "test": (20, 2)}
    files = {f"data/{name}-00000-of-00002.parquet": rows(name, *of) for name, of in sizes.items()}
    cached(home, tmp_path / "copy", "lmms-lab/textvqa", files)
    data = load("textvqa")  # from the address that it had before
    assert [e.question_id for e in data.train_examples] == [0, 1, 2]
    assert [e.image_id for e in data.val_examples] == ["0054c91397f2fe10", "0054c91397f2fe11"]
    assert data.train_examples[2].image.read() == photo(2)


def test_gqa_joins_questions_and_images(home, tmp_path):
    files = {}
    for split, numbers in (("train", (1, 2, 3)), ("val", (7, 8))):
        asked = [
            {
                "id": f"0293015{n}{k}",
                "imageId": f"n10{n}",
                "question": f"Is the sky dark {n} {k}?",
                "answer": "yes",
                "fullAnswer": "Yes, the sky is dark.",
                "isBalanced": True,
                "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"},
            }
            for n in numbers
            for k in range(2)
        ]
        images = [{"id": f"n10{n}", "image": image(n)} for n in numbers]
        files[f"{split}_balanced_instructions/{split}-00000-of-00001.parquet"] = asked
        files[f"{split}_balanced_images/{split}-00000-of-00002.parquet"] = images[:1]
        files[f"{split}_balanced_images/{split}-00001-of-00002.parquet"] = images[1:]
    others = ("testdev_balanced_images/testdev-00000-of-00001.parquet", "README.md")
    cached(home, tmp_path / "copy", "lmms-lab-encoder/GQA", files, left_out=others)
    data = load("gqa")
    assert [(e.question_id, e.image_id) for e in data.val_examples] == [
        (29301570, "n107"), (29301571, "n107"), (29301580, "n108"), (29301581, "n108")
    ]  # fmt: skip
    assert [e.image.read() for e in data.train_examples] == [photo(n) for n in (1, 1, 2, 2, 3, 3)]
    assert (data.train_examples[0].answers, data.task) == (("yes",), "short_answer")


def test_vqav2_from_the_hub_is_split_by_image(home, tmp_path):
    rows = [
        {
            "question_type": "what is this",
            "multiple_choice_answer": "cat",
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(TEN, 1)],
            "image_id": 262140 + n // 2,
            "answer_type": "other",
            "question_id": 262148000 + n,
            "question": f"Where is {n}?",
            "image": image(n // 2),
        }
        for n in range(10)
    ]
    test = [{**row, "answers": None, "multiple_choice_answer": None} for row in rows]
    files = {"data/validation-00000-of-00001.parquet": rows, "data/test-00000-of-00001.parquet": test}
    cached(home, tmp_path / "copy", "lmms-lab-encoder/VQAv2", files)
    data = load("vqav2_hub")
    assert [len(data.train_examples), len(data.val_examples)] == [8, 2]
    assert len({e.image_id for e in data.val_examples}) == 1
    assert data.val_examples[0].answers == tuple(TEN)
    assert {e.question_id for e in (*data.train_examples, *data.val_examples)} == {262148000 + n for n in range(10)}


@pytest.mark.parametrize("has_splits", [False, True])
def test_flickr30k_has_captions(home, tmp_path, has_splits):
    rows = [
        {
            "image": image(n),
            "caption": [f"A man rides {k} of {n}." for k in range(5)],
            "sentids": [str(5 * n + k) for k in range(5)],
            "img_id": str(n),
            "filename": f"100009224{n}.jpg",
            **({"split": ("train", "train", "val", "test")[n % 4]} if has_splits else {}),
        }
        for n in range(8)
    ]
    cached(home, tmp_path / "copy", "lmms-lab-encoder/flickr30k", {"data/test-00000-of-00009.parquet": rows})
    data = load("flickr30k")
    assert [len(data.train_examples), len(data.val_examples)] == ([4, 2] if has_splits else [6, 2])
    first = data.train_examples[0]
    assert first.question == "Describe the image."
    assert first.answers == tuple(f"A man rides {k} of {first.question_id}." for k in range(5))
    assert config_of("flickr30k").lvlm.max_new_tokens == 30


def test_hateful_memes(home, tmp_path):
    copy = tmp_path / "copy"
    (copy / "img").mkdir(parents=True)
    for name, numbers in (("train", (1, 2, 3)), ("dev_seen", (4, 5)), ("dev_unseen", (4, 6)), ("test_seen", (7,))):
        lines = []
        for n in numbers:
            (copy / f"img/0{n}.jpg").write_bytes(photo(n))
            lines.append(f'{{"id": "0{n}", "img": "img/0{n}.jpg", "label": {n % 2}, "text": "words {n}"}}\n')
        (copy / f"{name}.jsonl").write_text("".join(lines))
    hub_cache(home, "limjiayi/hateful_memes_expanded", "dataset", copy)
    data = load("hateful_memes")
    assert [e.answers for e in data.train_examples] == [("yes",), ("no",), ("yes",)]
    assert data.val_examples[0].question == 'Is this meme, whose text is "words 4", hateful?'
    assert [(e.question_id, e.options) for e in data.val_examples] == [(4, ("no", "yes")), (5, ("no", "yes"))]
    assert Path(data.val_examples[1].image).read_bytes() == photo(5)
    assert config_of("hateful_memes").infer.auc


@pytest.mark.parametrize("address", ["lmms-lab-encoder/OK-VQA", "lmms-lab/OK-VQA"])
def test_okvqa_hub_is_taken_from_either_address(home, tmp_path, address):
    def rows(start: int) -> list[dict]:
        numbers = range(start, start + 2)
        return [{"question_id": str(n), "image": image(n), "question": f"q{n}", "answers": TEN} for n in numbers]

    cached(home, tmp_path / "val", address, {"data/val2014-00000-of-00002.parquet": rows(0)})
    cached(home, tmp_path / "train", "Multimodal-Fatima/OK-VQA_train", {"data/train-00000-of-00004.parquet": rows(5)})
    config = config_of("okvqa_hub").data
    assert config.okvqa_path == "hub:lmms-lab-encoder/OK-VQA"
    assert [e.question_id for e in load_dataset(config).val_examples] == [0, 1]
    assert [check.status for check in check_files(config)] == ["ok", "ok"]


def test_a_copy_that_is_not_cached_is_refused_with_the_command_that_fetches_it():
    with pytest.raises(LeverError, match="hf download --repo-type dataset derek-thomas/ScienceQA"):
        load("scienceqa")


def test_a_folder_of_ones_own_takes_the_place_of_the_copy(tmp_path):
    for name, start in (("train", 0), ("validation", 10)):
        write_parquet(tmp_path / f"{name}.parquet", a_okvqa(name, start, 2))
    assert len(load("aokvqa_choice", f"data.file={tmp_path}").train_examples) == 2
