"""Fingerprints of what a stage depends on, and the paths of assets."""

from lever_lm.config.schema import DataConfig
from lever_lm.utils.fingerprint import fingerprint
from lever_lm.utils.paths import asset_path


def test_fingerprints_change_with_any_part_and_with_nothing_else():
    one = fingerprint(DataConfig(), "x", [1, 2])
    assert one == fingerprint(DataConfig(), "x", [1, 2])
    assert len({one, fingerprint(DataConfig(name="y"), "x", [1, 2]), fingerprint(DataConfig(), "x", [2, 1])}) == 3


def test_asset_paths_are_inside_the_package_and_others_as_written(tmp_path, monkeypatch):
    assert (asset_path("asset:digits") / "ATTRIBUTION.md").is_file()
    assert str(asset_path("openai/clip")) == "openai/clip"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert asset_path("~/data") == tmp_path / "data"
