"""CLIP features: what a row is, when the cache holds, and that they are the model's own."""

import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import small_digits, track
from PIL import Image
from safetensors import safe_open

from lever_lm.config.schema import DataConfig, FeatureConfig
from lever_lm.data import load_dataset
from lever_lm.data.embeddings import cached_features, compute_features
from lever_lm.data.encoder import FeatureEncoder
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.paths import asset_path
from lever_lm.utils.transformers_compat import import_transformers

CLIP = FeatureConfig(encoder="asset:tiny-clip")


@pytest.fixture
def world(tmp_path):
    """A folder with a few of the digits, to be changed at will."""
    return small_digits(tmp_path / "world")


def load(folder):
    return load_dataset(DataConfig(name="few", okvqa_path=str(folder), coco_path=str(folder)))


def compute(folder, path, config=CLIP, calls=None):
    """Features of a folder; `calls` collects what had to be encoded."""

    def noted(items, what, total):
        if calls is not None:
            calls.append(what)
        return items

    return compute_features(load(folder), config, path, "cpu", noted)


# ---------------------------------------------------------------------- what a row is


def test_every_example_has_a_unit_row_in_both_splits(digits, digits_features):
    for split, examples in (("train", digits.train_examples), ("val", digits.val_examples)):
        embeddings = getattr(digits_features, split)
        for matrix in (embeddings.image, embeddings.text):
            assert matrix.shape == (len(examples), 64)
            assert matrix.dtype == torch.float32
            torch.testing.assert_close(matrix.norm(dim=-1), torch.ones(len(examples)))


@pytest.mark.parametrize(("query", "icd"), [("img", "text"), ("text", "img_text"), ("img_text", "img")])
def test_a_feature_is_the_normalised_sum_of_the_embeddings_its_name_lists(digits_features, query, icd):
    config = dataclasses.replace(CLIP, name=f"query_{query}_icd_{icd}")

    def expected(embeddings, parts):
        total = sum({"img": embeddings.image, "text": embeddings.text}[part] for part in parts.split("_"))
        return total / total.norm(dim=-1, keepdim=True)

    for split in ("train", "val"):
        torch.testing.assert_close(
            digits_features.queries(split, config), expected(getattr(digits_features, split), query)
        )
    torch.testing.assert_close(digits_features.icds(config), expected(digits_features.train, icd))


def test_the_answers_of_icds_are_part_of_the_sum_where_the_name_says_so(
    digits, digits_features, features_file, tmp_path
):
    """A file that was made without answers gets them, and serves both names then."""
    path, config = tmp_path / "f.safetensors", dataclasses.replace(CLIP, name="query_img_text_icd_img_text_ans")
    shutil.copy(features_file, path)
    assert cached_features(digits, config, path) is None
    noted = []
    made = compute_features(digits, config, path, "cpu", lambda work, what, total: noted.append(what) or work)
    assert not any("val" in what for what in noted), "the evaluation split is kept"
    train = digits_features.train
    answers = FeatureEncoder(CLIP.encoder, "cpu", 64).texts([example.answer for example in digits.train_examples])
    total = train.image + train.text + answers
    torch.testing.assert_close(made.icds(config), total / total.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(made.queries("val", config), digits_features.queries("val", CLIP))
    assert torch.equal(cached_features(digits, config, path).icds(config), made.icds(config))
    assert torch.equal(cached_features(digits, CLIP, path).icds(CLIP), digits_features.icds(CLIP))


@pytest.mark.parametrize(
    "name",
    [
        "query_img",
        "query_ans_icd_img",
        "query_img_ans_icd_img",
        "query_img_icd_ans",
        "query_audio_icd_text",
        "img_text",
        "query_text_img_icd_text",
        "",
    ],
)
def test_an_unknown_features_name_is_a_usage_error(name):
    with pytest.raises(UsageError, match="--features"):
        FeatureConfig(name=name)


def test_features_are_those_of_the_clip_model_called_plainly(digits, digits_features):
    transformers = import_transformers()
    folder = asset_path("asset:tiny-clip")
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    for row in range(0, len(digits.train_examples), 250):
        example = digits.train_examples[row]
        with Image.open(example.image) as image, torch.inference_mode():
            inputs = processor(text=[example.question], images=[image.convert("RGB")], return_tensors="pt")
            output = model(**inputs)
        torch.testing.assert_close(
            digits_features.train.image[row], F.normalize(output.image_embeds[0], dim=-1), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            digits_features.train.text[row], F.normalize(output.text_embeds[0], dim=-1), atol=1e-5, rtol=0
        )


# ---------------------------------------------------------------------- the cache


def test_features_of_unchanged_data_come_from_the_file(world, tmp_path):
    path, calls = tmp_path / "features.safetensors", []
    first = compute(world, path, calls=calls)
    written, asked = path.stat().st_mtime_ns, list(calls)
    second = compute(world, path, calls=calls)
    assert path.stat().st_mtime_ns == written
    assert calls == asked != []
    assert second.fingerprint == first.fingerprint
    for split in ("train", "val"):
        assert torch.equal(getattr(first, split).image, getattr(second, split).image)
        assert torch.equal(getattr(first, split).text, getattr(second, split).text)


def test_the_file_says_what_it_is_of(world, tmp_path):
    path = tmp_path / "features.safetensors"
    features = compute(world, path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        assert header.pop("encoder") == "asset:tiny-clip"
        stamps = {split: json.loads(stamp) for split, stamp in header.items()}
        assert stamps["train"]["fingerprint"] == features.fingerprint
        assert set(stamps["train"]) == {"training data", "encoder", "code", "fingerprint"}
        assert set(stamps["val"]) == {"evaluation data", "encoder", "code", "fingerprint"}
        assert set(file.keys()) == {"train_image", "train_text", "val_image", "val_text"}


def test_a_changed_question_is_encoded_anew(world, tmp_path):
    path = tmp_path / "features.safetensors"
    before = compute(world, path)
    file = world / "OpenEnded_mscoco_train2014_questions.json"
    content = json.loads(file.read_text())
    content["questions"][3]["question"] = "Something else altogether?"
    file.write_text(json.dumps(content))
    after = compute(world, path)
    assert after.fingerprint != before.fingerprint
    assert not torch.equal(after.train.text[3], before.train.text[3])
    torch.testing.assert_close(after.train.text[4], before.train.text[4])


def test_another_encoder_is_encoded_anew(world, tmp_path):
    path = tmp_path / "features.safetensors"
    before = compute(world, path)
    retrained = tmp_path / "tiny-clip"
    shutil.copytree(asset_path("asset:tiny-clip"), retrained)
    content = bytearray((retrained / "model.safetensors").read_bytes())
    content[-1001] ^= 0x01
    (retrained / "model.safetensors").write_bytes(content)
    after = compute(world, path, dataclasses.replace(CLIP, encoder=str(retrained)))
    assert after.encoder != before.encoder
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("damage", ["empty", "text", "half"])
def test_a_damaged_cache_file_is_made_again(world, tmp_path, damage):
    path = tmp_path / "features.safetensors"
    expected = compute(world, path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no tensors here", "half": whole[: len(whole) // 2]}[damage])
    assert torch.equal(compute(world, path).train.image, expected.train.image)
    calls = []
    assert torch.equal(compute(world, path, calls=calls).val.text, expected.val.text)
    assert calls == [], "the new file holds"


# ---------------------------------------------------------------------- the encoder


def damaged(folder):
    shutil.copytree(asset_path("asset:tiny-clip"), folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500])
    return str(folder)


@pytest.mark.parametrize("kind", ["nowhere", "empty", "damaged", "another"])
def test_an_encoder_that_is_none_is_named_and_nothing_is_written(digits, tmp_path, kind):
    (tmp_path / "empty").mkdir()
    encoder = {
        "nowhere": "no/such-encoder",
        "empty": str(tmp_path / "empty"),
        "damaged": damaged(tmp_path / "damaged"),
        "another": "asset:tiny-qwen2.5-vl",
    }[kind]
    path = tmp_path / "cache" / "features.safetensors"
    with pytest.raises(LeverError) as caught:
        compute_features(digits, FeatureConfig(encoder=encoder), path, "cpu", track)
    assert encoder in str(caught.value)
    assert "features.encoder" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not path.exists()
