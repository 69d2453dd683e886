"""What the tests of page, export and Retriever share: a small run that was evaluated beside the baselines."""

import shutil

import pytest
from helpers import run_here

QUERIES = 10


@pytest.fixture(scope="session")
def evaluated_once(trained_once, tmp_path_factory):
    """A folder in which `lever train` (SMALL) and `lever infer --baselines` were run."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    done = run_here("infer", "--shots", "1,2", "--limit", QUERIES, "--baselines", cwd=folder)
    assert done.status == 0, done.err
    return folder


@pytest.fixture
def evaluated(evaluated_once, tmp_path):
    """A folder of the test's own with the same."""
    shutil.copytree(evaluated_once, tmp_path, dirs_exist_ok=True)
    return tmp_path
