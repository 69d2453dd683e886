"""The wheel: everything that is needed is in it, and it runs from any folder without the checkout."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import clean_environment

import lever_lm

CHECKOUT = Path(__file__).parents[1]
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", folder, CHECKOUT], check=True, capture_output=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def relative(folder: Path, *patterns: str) -> set[str]:
    found = (path for pattern in patterns for path in folder.rglob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix() for path in found if "__pycache__" not in path.parts}


def run(unpacked: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=clean_environment(PYTHONPATH=str(unpacked)),
        capture_output=True,
        text=True,
        timeout=300,
    )


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


def test_the_unpacked_wheel_runs_from_another_folder(unpacked, tmp_path):
    where = run(unpacked, tmp_path, "-c", "import lever_lm; print(lever_lm.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(unpacked)
    done = run(unpacked, tmp_path, "-m", "lever_lm", "train", "--recipe", "classic", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)["config"]
    assert config["grpo"]["batch_size"] == 1
    assert list(tmp_path.iterdir()) == []


def test_the_unpacked_wheel_finds_its_assets(unpacked, tmp_path):
    done = run(unpacked, tmp_path, "-m", "lever_lm", "rollout", "--limit", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["groups"] == 2
