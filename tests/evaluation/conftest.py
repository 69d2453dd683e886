"""What the tests of page, export and Retriever share: a small run that was evaluated beside the baselines."""

import shutil

import pytest
from helpers import RUN, run_here

QUERIES = 24
OTHER = RUN.with_name("other")


def done(*words, cwd) -> None:
    """Run a command that has to succeed."""
    found = run_here(*words, "--limit", QUERIES, cwd=cwd)
    assert found.status == 0, found.err


@pytest.fixture(scope="session")
def evaluated_once(trained_once, tmp_path_factory):
    """A folder in which `lever train` (SMALL) and `lever infer --baselines` were run."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    done("infer", "--shots", "1,2", "--baselines", cwd=folder)
    return folder


@pytest.fixture
def evaluated(evaluated_once, tmp_path):
    """A folder of the test's own with the same."""
    shutil.copytree(evaluated_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="session")
def compared_once(evaluated_once, tmp_path_factory):
    """The same with a second run of another policy, OTHER, that was evaluated at two shots, and the page of both."""
    folder = tmp_path_factory.mktemp("compared")
    shutil.copytree(evaluated_once, folder, dirs_exist_ok=True)
    other = ("--run-name", OTHER.name, "--set", "policy.hidden_dim=32")
    done("train", "--rce-epochs", "2", "--grpo-epochs", "2", *other, cwd=folder)
    done("infer", "--shots", "2", *other, cwd=folder)
    page = run_here("report", RUN, OTHER, "--compare", cwd=folder)
    assert page.status == 0, page.err
    return folder
