"""Encoders of every family: vectors are those of the library's own functions, and what is no encoder is named."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import files_in, small_digits
from PIL import Image

from lever_lm.data.encoder import FeatureEncoder, check_encoder
from lever_lm.utils.errors import LeverError
from lever_lm.utils.paths import asset_path
from lever_lm.utils.transformers_compat import import_transformers

TEXTS = [
    "What is this?",
    "seven",
    "这是什么数字？",
    "How do you say this number in French?",
    "7",
    "seven",
    "",
    "a sign",
]
LONG = "and what is that over there? " * 100
SIDE, PATCH, WIDTH = 32, 8, 16  # of the images; of the towers
LAYERS = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**LAYERS, "image_size": SIDE, "patch_size": PATCH}
TO_SQUARE = {"size": {"height": SIDE, "width": SIDE}}
TO_CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
LETTERS = sorted({*"".join(TEXTS), *LONG.lower(), *"abcdefghijklmnopqrstuvwxyz"} - {" "})


@dataclass
class Family:
    """A model of random weights with its processors, as the library has them in memory, and the same in a folder.
    length: tokens of a text that are read."""

    model: torch.nn.Module
    tokenizer: object
    image_processor: object
    folder: Path
    length: int
    padding: str | bool = True

    def image(self, image) -> torch.Tensor:
        return self._vector(self.model.get_image_features, self.image_processor(images=image, return_tensors="pt"))

    def text(self, text: str) -> torch.Tensor:
        options = {"padding": self.padding, "truncation": True, "max_length": self.length}
        return self._vector(self.model.get_text_features, self.tokenizer([text], return_tensors="pt", **options))

    @torch.inference_mode()
    def _vector(self, function, inputs) -> torch.Tensor:
        return F.normalize(function(**inputs).pooler_output[0], dim=-1)


def wordpieces() -> list[str]:
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]


def chinese_clip(transformers, folder) -> Family:
    """As its repository has it: a vocabulary for a tokenizer, no maximum length of a text, an old image config."""
    (folder / "vocab.txt").write_text("\n".join([*wordpieces(), ""]), encoding="utf-8")
    described = {"feature_extractor_type": "ChineseCLIPFeatureExtractor", "do_center_crop": False, **TO_SQUARE}
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    text = {**LAYERS, "vocab_size": len(wordpieces()), "max_position_embeddings": 40}
    config = transformers.ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    image_processor = transformers.ChineseCLIPImageProcessor(do_center_crop=False, **TO_SQUARE)
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(wordpieces())})
    return Family(transformers.ChineseCLIPModel(config), tokenizer, image_processor, folder, 40)


def siglip(transformers, folder) -> Family:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = {word: i for i, word in enumerate(["</s>", "<unk>", *LETTERS])}
    made = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=24,
        model_input_names=["input_ids"],  # its padding is read
    )
    text = {**LAYERS, "vocab_size": len(words), "max_position_embeddings": 24}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    image_processor = transformers.SiglipImageProcessor(**TO_SQUARE)
    return Family(transformers.SiglipModel(config), tokenizer, image_processor, folder, 24, "max_length")


def siglip2(transformers, folder) -> Family:
    """NaFlex: images keep their shape, in as many patches as are allowed; no maximum length of a text."""
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS])}
    tokenizer = transformers.Siglip2Tokenizer(vocab=words, merges=[], padding_side="right")
    text = {**LAYERS, "vocab_size": len(words), "max_position_embeddings": 24}
    vision = {**LAYERS, "num_patches": 16, "patch_size": PATCH}
    config = transformers.Siglip2Config(text_config=text, vision_config=vision)
    image_processor = transformers.Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=16)
    return Family(transformers.Siglip2Model(config), tokenizer, image_processor, folder, 24, "max_length")


def altclip(transformers, folder) -> Family:
    """A RoBERTa: of its 40 positions the first two are no token's."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in LETTERS)]
    tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces)
    text = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 40, "project_dim": 24}
    vision = {**VISION, "projection_dim": 24}
    config = transformers.AltCLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    image_processor = transformers.CLIPImageProcessor(**TO_CROP)
    return Family(transformers.AltCLIPModel(config), tokenizer, image_processor, folder, 38)


def clip(transformers, folder) -> Family:
    """The shipped one."""
    shutil.copytree(asset_path("asset:tiny-clip"), folder, dirs_exist_ok=True)
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32)
    return Family(model, processor.tokenizer, processor.image_processor, folder, 48)


@pytest.fixture(scope="module", params=[clip, siglip, siglip2, chinese_clip, altclip], ids=lambda made: made.__name__)
def family(request, tmp_path_factory) -> Family:
    return made(request.param, tmp_path_factory.mktemp(request.param.__name__))


def made(build, folder: Path) -> Family:
    torch.manual_seed(0)
    family = build(import_transformers(), folder)
    family.model.eval().save_pretrained(folder)
    if not (folder / "vocab.txt").exists():
        family.tokenizer.save_pretrained(folder)
        family.image_processor.save_pretrained(folder)
    return family


def pictures() -> list:
    """Images of noise, lying, upright and square."""
    noise = np.random.default_rng(0)
    sizes = [(40, 60), (60, 40), (32, 32), (50, 50), (20, 90), (33, 31), (64, 64), (45, 44)]
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


# ---------------------------------------------------------------------- what a vector is


@pytest.mark.parametrize("batch_size", [1, 8])
def test_vectors_are_those_of_the_librarys_functions_whatever_the_batch(family, batch_size):
    encoder = FeatureEncoder(str(family.folder), "cpu", batch_size)
    images, texts = encoder.images(pictures()), encoder.texts(TEXTS)
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(images, torch.stack([family.image(image) for image in pictures()]), **close)
    torch.testing.assert_close(texts, torch.stack([family.text(text) for text in TEXTS]), **close)
    assert images.shape[1] == texts.shape[1]
    assert len(texts.unique(dim=0)) == len(images.unique(dim=0)) - 1 == 7  # one text is there twice


def test_a_text_that_is_too_long_is_cut_to_what_the_model_reads(family):
    encoder = FeatureEncoder(str(family.folder), "cpu", 8)
    vectors = encoder.texts([LONG, TEXTS[0]])
    for vector, text in zip(vectors, (LONG, TEXTS[0]), strict=True):
        torch.testing.assert_close(vector, family.text(text), atol=1e-6, rtol=0)
    assert len(encoder.tokenizer([LONG], truncation=True, **encoder.form).input_ids[0]) == family.length


def test_features_may_be_tensors_as_well(family, monkeypatch):
    encoder = FeatureEncoder(str(family.folder), "cpu", 8)
    pooled = encoder.images(pictures()), encoder.texts(TEXTS)
    for name in ("get_image_features", "get_text_features"):
        whole = getattr(encoder.model, name)
        monkeypatch.setattr(encoder.model, name, lambda whole=whole, **inputs: whole(**inputs).pooler_output)
    assert all(
        torch.equal(*pair) for pair in zip(pooled, (encoder.images(pictures()), encoder.texts(TEXTS)), strict=True)
    )


# ---------------------------------------------------------------------- what is no encoder


def described(folder: Path, kind: str) -> str:
    """A folder with the config.json of a kind of model, and for `own` its code."""
    transformers = import_transformers()
    if kind == "own":
        (folder / "own.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\nclass Own: pass\n")
        auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "own.Own")
        (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    elif kind == "nothing":
        (folder / "config.json").write_text("{")
    else:
        getattr(transformers, kind)().save_pretrained(folder)
    return str(folder)


NEITHER = "no get_image_features and no get_text_features"
NONE = {
    "BertConfig": ("BertModel", NEITHER),
    "ViTConfig": ("ViTModel", NEITHER),
    "CLIPTextConfig": ("CLIPTextModel", NEITHER),
    "Qwen2_5_VLConfig": ("Qwen2_5_VLModel", "no get_text_features"),
    "own": ("'own' is known to code that comes with it alone", "such code is not run"),
    "nothing": ("not a valid JSON file",),
}


@pytest.mark.parametrize("kind", NONE)
def test_what_is_no_encoder_is_named_before_any_work(lever, tmp_path, kind):
    (tmp_path / "model").mkdir()
    path = described(tmp_path / "model", kind)
    before = files_in(tmp_path)
    messages = [lever(command, "--set", f"features.encoder={path}").err for command in ("train", "rollout")]
    found = next(c for c in lever("doctor", "--set", f"features.encoder={path}", "--json").json["checks"] if c["mend"])
    assert found["what"] == "features.encoder"
    with pytest.raises(LeverError) as caught:
        FeatureEncoder(path, "cpu", 1)
    for message in (*messages, f"{found['found']} → {found['mend']}", str(caught.value)):
        assert len(message.strip().splitlines()) == 1
        for word in (path, "--set features.encoder=", *NONE[kind]):
            assert word in message
    assert files_in(tmp_path) == before


def siglip_of_two_sizes(transformers, folder) -> Family:
    family = siglip(transformers, folder)
    family.model.config.text_config.projection_size = 24
    family.model = transformers.SiglipModel(family.model.config)
    return family


def flava(transformers, folder) -> Family:
    """It has both functions, and they make a vector of each patch and of each token."""
    text = {**LAYERS, "vocab_size": len(wordpieces()), "max_position_embeddings": 40}
    codebook = {"hidden_size": 8, "num_groups": 1, "num_blocks_per_group": 1, "vocab_size": 16}
    config = transformers.FlavaConfig(
        text_config=text,
        image_config=VISION,
        multimodal_config=LAYERS,
        image_codebook_config=codebook,
        hidden_size=WIDTH,
        projection_dim=WIDTH,
    )
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(wordpieces())})
    return Family(transformers.FlavaModel(config), tokenizer, transformers.CLIPImageProcessor(**TO_CROP), folder, 40)


def clip_without_padding(transformers, folder) -> Family:
    family = clip(transformers, folder)
    family.tokenizer.pad_token = None
    return family


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (siglip_of_two_sizes, "its images have 16 dimensions, its texts 24"),
        (flava, "its get_image_features is to make one vector of each, and makes a tensor of shape (1, 17, 16)"),
        (clip_without_padding, "padding token"),
    ],
)
def test_a_model_whose_vectors_cannot_be_compared_is_refused_when_it_is_loaded(tmp_path, build, word):
    made(build, tmp_path)
    with pytest.raises(LeverError) as caught:
        FeatureEncoder(str(tmp_path), "cpu", 4)
    assert word in str(caught.value)
    assert "--set features.encoder=" in str(caught.value)


def test_a_tokenizer_whose_library_is_missing_names_it(tmp_path):
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        made(siglip, tmp_path)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "SiglipTokenizer"}))
        check = check_encoder(str(tmp_path))
        assert (check.status, "SentencePiece" in check.found) == ("missing", True)
        assert check.mend.startswith("pip install what it names, or --set features.encoder=")
    else:
        pytest.skip("sentencepiece is installed")


def test_a_tokenizer_with_an_empty_vocabulary_is_refused(tmp_path):
    """The library makes one of a CLIP whose tokenizer has been lost, and says nothing."""
    made(clip, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("of another kind")
    check = check_encoder(str(tmp_path))
    assert (check.status, "its vocabulary is empty" in check.found) == ("missing", True)


# ---------------------------------------------------------------------- on the command line


def test_every_command_goes_with_a_siglip(lever, tmp_path):
    (tmp_path / "siglip").mkdir()
    folder, world = made(siglip, tmp_path / "siglip").folder, small_digits(tmp_path / "world", 12, 4)
    keys = (f"features.encoder={folder}", f"data.okvqa_path={world}", f"data.coco_path={world}")
    where = [part for key in keys for part in ("--set", key)]
    done = lever("doctor", *where, "--json")
    assert {check["what"]: check["status"] for check in done.json["checks"]}["features.encoder"] == "ok"
    run = ("--run-name", "of-siglip")
    image = next((world / "val2014").iterdir())
    few = ("--set", "policy.hidden_dim=8", "--rce-epochs", "2", "--grpo-epochs", "0")
    for command in (
        ["train", *where, *few, *run],
        ["infer", *run, "--shots", "1", "--against", "img_text_sim,pseudo_answer"],
        ["pick", *run, "--image", image, "--question", LONG, "--no-answer"],
        ["export", tmp_path / "results/digits/model_cpk/of-siglip", tmp_path / "shared"],
    ):
        done = lever(*command)
        assert done.status == 0, done.err
        assert "CLIP" not in done.out + done.err
    assert "siglip@" in (tmp_path / "shared/README.md").read_text()
