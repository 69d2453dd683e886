"""The wheel: everything that is needed is in it, and it runs from any folder without the checkout."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from helpers import clean_environment

import lever_lm

CHECKOUT = Path(__file__).parents[1]
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    (built,) = WheelBuilder(str(CHECKOUT)).build(directory=str(tmp_path_factory.mktemp("wheel")))
    return Path(built)


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def relative(folder: Path, *patterns: str) -> set[str]:
    found = (path for pattern in patterns for path in folder.rglob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_wheel_is_at_most_12_mb(wheel):
    assert wheel.stat().st_size <= 12 * MEGABYTE


def test_the_wheel_holds_all_code_assets_templates_and_configs(unpacked):
    package = CHECKOUT / "lever_lm"
    assert relative(unpacked / "lever_lm", "*.py") == relative(package, "*.py")
    assert relative(unpacked / "lever_lm" / "assets", "*") == relative(package / "assets", "*")
    assert relative(unpacked / "lever_lm" / "templates", "*") == relative(package / "templates", "*") != set()
    assert relative(unpacked / "lever_lm" / "configs", "*") == relative(CHECKOUT / "configs", "*") != set()


def test_the_wheel_holds_nothing_else(unpacked):
    assert {path.name for path in unpacked.iterdir()} == {"lever_lm", f"lever_lm-{lever_lm.__version__}.dist-info"}
    assert relative(unpacked / "lever_lm", "*.pyc", "*.sqlite", "*.pt") == set()


def test_the_metadata_names_the_command_and_the_license(unpacked):
    info = unpacked / f"lever_lm-{lever_lm.__version__}.dist-info"
    assert "lever = lever_lm.cli:main" in (info / "entry_points.txt").read_text()
    metadata = (info / "METADATA").read_text()
    assert f"Version: {lever_lm.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert relative(info, "LICENSE") != set()


def test_the_unpacked_wheel_runs_from_another_folder_with_its_configs_and_assets(unpacked, tmp_path):
    code = "import lever_lm, sys; print(lever_lm.__file__); from lever_lm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--recipe", "classic", "--json"],
        cwd=tmp_path,
        env=clean_environment(PYTHONPATH=str(unpacked)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    where, said = done.stdout.splitlines()
    assert Path(where).is_relative_to(unpacked)
    assert "2504 usable" in [check["found"] for check in json.loads(said)["checks"]]
    assert list(tmp_path.iterdir()) == []
