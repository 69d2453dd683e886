"""What the tests of the real parts share: the embedded digits and models, and one small trained run.

Everything is made once a session from the shipped assets; a test that writes gets a copy of its own.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client: no test may need the network

CHECKOUT = Path(__file__).parents[1]
SCRIPTS = CHECKOUT / "scripts"
DATA = CHECKOUT / "tests/data/rl_data"  # rollout files of Lever-Plus, and what its loader makes of them
RUN = Path("results/digits/model_cpk/v3_MixSampler_tiny-qwen2_5-vl")
INFERENCE = Path("results/digits/inference/v3_MixSampler_tiny-qwen2_5-vl")
ROLLOUTS = Path("results/digits/generated_data/rl_data_MixSampler_tiny-qwen2_5-vl.json")
SMALL = ("--limit", "24", "--rce-epochs", "2", "--grpo-epochs", "4")


@dataclass(frozen=True)
class Done:
    """A finished command: exit status, stdout, stderr."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


def clean_environment(**extra: str) -> dict[str, str]:
    """Return the environment without the variables that change a config; this checkout first on the path, whatever is
    installed; one thread, as in this process: the threads of a tiny model wait for one another more than they work."""
    from lever_lm.config.load import ENVIRONMENT

    ours = (*ENVIRONMENT, "RL_DATA_PATH", "LEVER_LM_CHECKPOINT_PATH")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def run_lever(*arguments, cwd: Path, prefix: tuple[str, ...] = (), **extra: str) -> Done:
    """`python -m lever_lm …` in a process of its own."""
    command = [*prefix, sys.executable, "-m", "lever_lm", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=clean_environment(**extra), capture_output=True, text=True, timeout=300)
    return Done(done.returncode, done.stdout, done.stderr)


def run_here(*arguments, cwd: Path) -> Done:
    """The command line in this process, which has imported everything: seconds sooner than in one of its own."""
    from lever_lm.cli.commands import app
    from lever_lm.cli.entrypoint import run

    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run(app, [str(argument) for argument in arguments])
    finally:
        os.chdir(before)
    return Done(status, out.getvalue(), err.getvalue())


def done(command, cwd: Path) -> Done:
    """A command line in this process with --json that has to end well."""
    found = run_here(*command, "--json", cwd=cwd)
    assert found.status == 0, found.err
    return found


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time of change."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def small_digits(folder: Path, train: int = 12, val: int = 6) -> Path:
    """The first questions of the embedded digits in a folder of their own, in the official layout."""
    from lever_lm.data.okvqa import SPLITS, annotations_file, questions_file
    from lever_lm.utils.paths import asset_path

    source = asset_path("asset:digits")
    for split, count in (("train", train), ("val", val)):
        images = folder / SPLITS[split]
        images.mkdir(parents=True)
        questions = json.loads(questions_file(source, split).read_text())
        annotations = json.loads(annotations_file(source, split).read_text())
        questions["questions"] = questions["questions"][:count]
        kept = {question["question_id"] for question in questions["questions"]}
        annotations["annotations"] = [a for a in annotations["annotations"] if a["question_id"] in kept]
        questions_file(folder, split).write_text(json.dumps(questions))
        annotations_file(folder, split).write_text(json.dumps(annotations))
        for question in questions["questions"]:
            shutil.copy2(source / SPLITS[split] / f"COCO_{SPLITS[split]}_{question['image_id']:012d}.jpg", images)
    return folder


def track(items, what: str, total: int):
    """No progress bar."""
    return items


# ---------------------------------------------------------------------- fixtures


@pytest.fixture
def script(monkeypatch):
    """Imports a script of scripts/ by its name; scripts import one another."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _own_digests():
    """A process of its own would not know the files of other tests, nor write them down with its own."""
    from lever_lm.utils.file_hashes import DIGESTS

    DIGESTS.keep_in(None)
    for name in [name for name in DIGESTS._known if not name.startswith(str(CHECKOUT))]:
        del DIGESTS._known[name]


@pytest.fixture(scope="session", autouse=True)
def _read_once():
    """The shipped data sets, which stay as they are, and the command line are made once and not for each command."""
    import typer

    from lever_lm import data

    load, made = data.load_official, {}

    def load_once(source, config, split, bad, pose=data.as_it_is):
        if not (source.startswith("asset:") and config.coco_path.startswith("asset:") and pose is data.as_it_is):
            return load(source, config, split, bad, pose)
        key = (source, config.coco_path, config.file_prefix, split)
        examples, digest = made.get(key) or made.setdefault(key, load(source, config, split, bad, pose))
        return [*examples], digest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_official", load_once)
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session")
def digits_config():
    """The config that a bare `lever` command gets."""
    from lever_lm.config.load import resolve

    return resolve({"dataset": "digits", "lvlm": "tiny_qwen2.5_vl"}, None, [], {})[0]


@pytest.fixture(scope="session")
def digits(digits_config):
    """The embedded dataset."""
    from lever_lm.data import load_dataset

    return load_dataset(digits_config.data)


@pytest.fixture(scope="session")
def features_file(digits, digits_config, tmp_path_factory) -> Path:
    """The cache file of the digits' features."""
    from lever_lm.data.embeddings import compute_features

    path = tmp_path_factory.mktemp("features") / "features_tiny-clip.safetensors"
    compute_features(digits, digits_config.features, path, "cpu", track)
    return path


@pytest.fixture(scope="session")
def digits_features(digits, digits_config, features_file):
    """The features of the digits under the shipped CLIP."""
    from lever_lm.data.embeddings import compute_features

    return compute_features(digits, digits_config.features, features_file, "cpu", track)


@pytest.fixture
def digits_folder(features_file, tmp_path) -> Path:
    """A folder of the test's own with the features, and nothing else."""
    (tmp_path / "results/digits/cache").mkdir(parents=True)
    shutil.copy2(features_file, tmp_path / "results/digits/cache")
    return tmp_path


def answers_in(folder: Path) -> int:
    """How many answers of the LVLM are in the cache below a folder."""
    with sqlite3.connect(next(folder.rglob("answers_*.sqlite"))) as db:
        return db.execute("SELECT count(*) FROM answers WHERE key NOT LIKE 'speed:%'").fetchone()[0]


@pytest.fixture
def lever(tmp_path, monkeypatch):
    """The command line in this process, in an empty folder: arguments → Done."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_here(*arguments, cwd=tmp_path)


@pytest.fixture(scope="session")
def trained_once(features_file, tmp_path_factory) -> Path:
    from lever_lm.utils.file_hashes import DIGESTS

    folder = tmp_path_factory.mktemp("trained")
    cache = folder / "results/digits/cache"
    cache.mkdir(parents=True)
    shutil.copy2(features_file, cache)
    command = ["train", *SMALL, "--json"]
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - clean_environment().keys():
            patch.delenv(name)
        patch.setattr(sys, "argv", ["lever", *command])  # which env.json keeps
        DIGESTS.__init__()  # as in a process of its own
        done = run_here(*command, cwd=folder)
    assert done.status == 0, done.err
    return folder


@pytest.fixture
def trained(trained_once, tmp_path) -> Path:
    """A folder of the test's own in which `lever train` (SMALL) has been run."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def warm(trained_once, tmp_path) -> Path:
    """A folder of the test's own with the caches of features and answers, and no run."""
    shutil.copytree(trained_once / "results/digits/cache", tmp_path / "results/digits/cache")
    return tmp_path
