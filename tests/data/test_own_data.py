"""docs/own-data.md, docs/okvqa.md: what they say of data that a user brings, by its values."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pages
import pytest
from helpers import run_here
from official import build_official, build_parquet

from lever_lm.config.load import resolve
from lever_lm.config.schema import DataConfig
from lever_lm.data import image_digest, load_dataset
from lever_lm.data.checks import check_examples
from lever_lm.data.pools import Candidates
from lever_lm.data.table.columns import ROLES
from lever_lm.tasks import load_data


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """A folder in which the page's Python block of the official layout was run and its YAML written."""
    folder = tmp_path_factory.mktemp("mine")
    here = pages.blocks("docs/own-data.md")
    code = next(block for block in here if block.language == "python" and "val2014" in block.text)
    config = next(block for block in here if block.language == "yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(code.text, str(code), "exec"), {"__name__": "example"})
    (folder / "mine.yaml").write_text(config.text)
    return folder


@pytest.fixture(scope="module")
def data(mine):
    return load_dataset(DataConfig("mine", str(mine / "mine"), str(mine / "mine")))


def test_the_pages_own_folder_has_several_questions_on_a_photograph_each_under_another_image_id(data):
    photographs = Counter(image_digest(example.image) for example in data.train_examples)
    assert (len(data.train_examples), len(data.val_examples)) == (60, 12)
    assert max(photographs.values()) > 1
    assert len({example.image_id for example in data.train_examples}) == 60


def test_no_pool_and_no_rollout_of_the_pages_own_folder_shows_the_querys_photograph(mine, data):
    """By the sampler that has candidates of every kind; test_pools.py has each alone."""
    done = run_here("rollout", "--config", "mine.yaml", "--sampler", "mix_sampler", "--quiet", "--json", cwd=mine)
    assert done.status == 0, done.err
    content = json.loads((mine / done.json["path"]).read_text())
    groups = {int(row): group for row, group in content.items() if row != "_meta"}
    photograph = [image_digest(example.image) for example in data.train_examples]
    assert len(groups) == 40
    for row, group in groups.items():
        assert len(group["candidate_pool_ids"]) == 16
        assert photograph[row] not in [photograph[other] for other in group["candidate_pool_ids"]]
        for rollout in group["pointer_candidates"]:
            assert photograph[row] not in [photograph[other] for other in rollout["pointer_global"]]


def test_the_evaluation_split_is_val2014_and_demonstrations_are_of_train2014(data):
    assert {Path(example.image).parent.name for example in data.val_examples} == {"val2014"}
    assert {Path(example.image).parent.name for example in data.train_examples} == {"train2014"}


def test_a_training_question_of_the_querys_question_id_or_image_id_is_never_shown(data):
    candidates, query = Candidates(data.train_examples), data.val_examples[0]
    assert len(candidates.allowed(query)) == 60
    for change in ({"question_id": 7}, {"image_id": 7}):
        assert 6 not in candidates.allowed(dataclasses.replace(query, **change))


@pytest.mark.parametrize("words", ["valid", "validation", "eval", "dev", "test"])
def test_the_evaluation_split_may_be_called_otherwise(tmp_path, words):
    official = build_official(tmp_path / "official", train=6, val=6)
    copy_ = build_parquet(tmp_path / "copy", official, splits=("train", words))
    loaded = load_dataset(DataConfig("okvqa", str(copy_), str(copy_)))
    assert [len(loaded.train_examples), len(loaded.val_examples)] == [6, 6]


@pytest.mark.parametrize("dataset", ["okvqa_local", "okvqa_hub", "vqav2_local"])
def test_pools_of_the_large_data_sets_are_random_and_of_the_official_size(dataset):
    config = resolve({"dataset": dataset}, None, [], {})[0]
    assert (config.sampler.name, config.rollout.pool_size, config.rollout.num_queries) == ("rand_sampler", 64, 5000)


def test_the_numbers_of_official_questions_are_those_the_doctor_expects(tmp_path):
    build_official(tmp_path, train=6, val=6)
    said = [check.found for check in check_examples(DataConfig("okvqa", str(tmp_path), str(tmp_path)), {})]
    assert [number for number in ("9009", "5046") if not any(number in line for line in said)] == []
    assert "9,009 and 5,046 questions" in pages.text_of("docs/okvqa.md")


def test_the_page_names_the_usual_columns_of_every_role():
    rows = re.findall(r"^\| `(\w+)` \| (`.+`) \|$", pages.text_of("docs/own-data.md"), re.MULTILINE)
    assert {role: tuple(names.strip("`").split("`, `")) for role, names in rows} == ROLES


def test_the_pages_table_has_sixty_rows_of_which_twelve_are_evaluated_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = next(block for block in pages.blocks("docs/own-data.md") if block.language == "python")
    exec(compile(code.text, str(code), "exec"), {"__name__": "example"})
    data = load_data(DataConfig("labels", file="labels.csv", task="short_answer"))
    assert (len(data.train_examples), len(data.val_examples)) == (48, 12)
