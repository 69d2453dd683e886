"""Folders of models: no code of theirs is executed."""

import contextlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hostile import Executed
from lvlm_helpers import local_lvlm
from safetensors.torch import load_file

from lever_lm.data.encoder import FeatureEncoder
from lever_lm.utils.errors import LeverError
from lever_lm.utils.paths import asset_path
from lever_lm.utils.transformers_compat import _unseen


@pytest.fixture(scope="module")
def pickled_clip(tmp_path_factory) -> Path:
    """The shipped CLIP with its weights in a pickle."""
    folder = tmp_path_factory.mktemp("models") / "clip"
    shutil.copytree(asset_path("asset:tiny-clip"), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def encode(folder: Path):
    return FeatureEncoder(str(folder), "cpu", 4)


def test_a_model_whose_weights_are_a_pickle_is_loaded_without_executing_any(pickled_clip, tmp_path):
    encode(pickled_clip)
    folder, trap = tmp_path / "evil", tmp_path / "executed"
    shutil.copytree(pickled_clip, folder)
    torch.save({**torch.load(folder / "pytorch_model.bin"), "extra": Executed(trap)}, folder / "pytorch_model.bin")
    with pytest.raises(LeverError, match=r"cannot load the encoder [^\n]*evil[^\n]*$"):
        encode(folder)
    assert not trap.exists()
    with open(folder / "pytorch_model.bin", "rb") as file:
        torch.load(file, weights_only=False)
    assert trap.exists(), "it would have"


@pytest.mark.parametrize("asset", ["tiny-clip", "tiny-qwen2.5-vl"])
def test_code_that_comes_with_a_model_is_not_imported(tmp_path, asset):
    folder, trap = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(asset_path(f"asset:{asset}"), folder)
    (folder / "own.py").write_text(f"open({str(trap)!r}, 'w')\nclass Own: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
    for file in folder.glob("*config.json"):
        content = json.loads(file.read_text())
        content["auto_map"] = dict.fromkeys(names, "own.Own")
        file.write_text(json.dumps(content))
    with contextlib.suppress(LeverError):  # to be refused is as good
        if asset == "tiny-clip":
            encode(folder)
        else:
            local_lvlm(path=folder)
    assert not trap.exists()
    assert "own" not in sys.modules


def test_a_package_that_no_command_needs_is_hidden_from_the_import_alone(tmp_path, monkeypatch):
    """The library asks once what there is, and keeps the answer."""
    (tmp_path / "sklearn.py").write_text("there = True")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    found = []
    utils = SimpleNamespace(is_sklearn_available=lambda: found.append(importlib.util.find_spec("sklearn")))
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(utils=utils))
    with _unseen({"sklearn"}):
        pass
    assert found == [None]
    assert importlib.import_module("sklearn").there
    with pytest.raises(RuntimeError, match="half way"), _unseen({"sklearn"}):
        raise RuntimeError("half way")
    assert "sklearn" not in sys.modules
