"""The Python API, `lever pick` and the example script: the picks of `lever infer`, for images of one's own."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import INFERENCE, RUN, clean_environment, run_here

import lever_lm
from lever_lm.data import Example, open_image
from lever_lm.evaluation import retriever as module
from lever_lm.evaluation.retriever import Pick, Retriever
from lever_lm.lvlm.prompt import cut_answer
from lever_lm.training.from_checkpoint import config_beside, results_beside
from lever_lm.utils.errors import LeverError, UsageError
from lever_lm.utils.paths import asset_path

QUESTION = "What is the French word for this digit?"
IMAGE = asset_path("asset:digits") / "val2014/COCO_val2014_000000000011.jpg"


@pytest.fixture(scope="module")
def home(evaluated_once, tmp_path_factory) -> Path:
    """A folder in which `lever train` and `lever infer` were run."""
    folder = tmp_path_factory.mktemp("retriever")
    shutil.copytree(evaluated_once, folder, dirs_exist_ok=True)
    shutil.copy(IMAGE, folder / "x.jpg")
    return folder


@pytest.fixture(scope="module")
def retriever(home) -> Retriever:
    return Retriever(home / RUN)


def chosen(picks):
    return [pick.example.question_id for pick in picks]


# ---------------------------------------------------------------------- as documented


def test_the_five_lines_of_the_docstring_run_as_they_are_written(home, monkeypatch):
    lines = [line[4:] for line in module.__doc__.splitlines() if line.startswith("    ")]
    assert len([line for line in lines if line.strip()]) <= 5
    monkeypatch.chdir(home)
    (home / RUN).rename(home / RUN.with_name("demo"))
    try:
        scope: dict = {}
        exec("\n".join(lines), scope)
        answer = scope["retriever"].answer("x.jpg", "Which number is written here?", scope["picks"])
    finally:
        (home / RUN.with_name("demo")).rename(home / RUN)
    assert len(scope["picks"]) == 4
    assert all(isinstance(pick, Pick) for pick in scope["picks"])
    assert [turn["role"] for turn in scope["messages"]] == ["system", "user"]
    assert isinstance(answer, str)


def test_the_package_offers_it_and_imports_no_torch_before(tmp_path):
    code = "import sys, lever_lm; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=clean_environment(), check=True, timeout=60)
    assert (lever_lm.Retriever, lever_lm.Pick) == (Retriever, Pick)
    with pytest.raises(AttributeError, match="no attribute 'Retrieber'"):
        _ = lever_lm.Retrieber


# ---------------------------------------------------------------------- which picks


def test_evaluation_queries_get_the_picks_and_probabilities_of_lever_infer(home, retriever):
    (samples,) = (home / INFERENCE).rglob("samples_grpo_2shot.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    by_id = {query.question_id: query for query in retriever.stages.data.val_examples}
    queries = [by_id[row["question_id"]] for row in rows]
    picks = retriever.pick(queries, shots=2)
    assert [chosen(one) for one in picks] == [row["icds"] for row in rows]
    assert [[p.probability for p in one] for one in picks] == [row["probabilities"] for row in rows]
    assert retriever.answer(queries, picks=picks) == [row["answer"] for row in rows]
    assert len(rows) == 24


def test_an_image_of_ones_own_gets_its_own_pool_the_same_each_time_whatever_its_name(retriever, tmp_path):
    picks = retriever.pick(IMAGE, QUESTION, shots=4)
    path = tmp_path / "another.jpg"
    shutil.copy(IMAGE, path)
    assert retriever.pick(str(path), QUESTION, shots=4) == picks
    assert len(set(chosen(picks))) == 4
    assert all(0 < pick.probability <= 1 for pick in picks)
    both = retriever.pick([IMAGE, IMAGE], [QUESTION, QUESTION], shots=4)
    assert [chosen(one) for one in both] == [chosen(picks)] * 2
    assert retriever.pick([], []) == []
    asked = [retriever.query(IMAGE, QUESTION), retriever.query(IMAGE, QUESTION + "?")]
    shutil.copy(IMAGE.with_name("COCO_val2014_000000000013.jpg"), path)  # a file that changes is another query
    asked.append(retriever.query(path, QUESTION))
    assert len({query.question_id for query in asked}) == 3


def test_similarities_are_the_cosines_of_images_and_questions(retriever):
    (first, *_), encoder = retriever.pick(IMAGE, QUESTION, shots=2), retriever._encoder
    image, other = encoder.images([open_image(str(IMAGE)), open_image(first.example.image)])
    text, asked = encoder.texts([QUESTION, first.example.question])
    assert first.image_similarity == pytest.approx(float(image @ other), abs=1e-5)
    assert first.text_similarity == pytest.approx(float(text @ asked), abs=1e-5)


def test_the_image_of_a_training_example_is_never_shown_before_itself(retriever):
    train = retriever.examples
    twins = {e.question_id for e in train if e.image_id == train[0].image_id}
    assert len(twins) > 1
    assert not twins & set(chosen(retriever.pick(train[0].image, train[0].question, shots=60)))
    renamed = replace(train[0], question_id=5000, image_id=5000)
    assert not twins & {example.question_id for example in retriever.pool(renamed)}


# ---------------------------------------------------------------------- demonstrations of one's own


def own_retriever(home, examples) -> Retriever:
    return Retriever(home / RUN, examples=examples, results=home / "results")


def test_demonstrations_of_ones_own_are_the_pool(home, retriever):
    shown = retriever.examples[:5]
    own = own_retriever(home, [(Path(e.image), e.question, f"answer {i}") for i, e in enumerate(shown)])
    picks = own.pick(IMAGE, QUESTION, shots=5)
    assert sorted(pick.example.answer for pick in picks) == [f"answer {i}" for i in range(5)]
    assert own.answer(IMAGE, QUESTION, picks[:2])
    again = own_retriever(home, shown).pick(IMAGE, QUESTION, shots=5)
    assert [p.example.question for p in again] == [p.example.question for p in picks]
    with pytest.raises(LeverError, match="cannot pick 6 shots from a pool of 5"):
        own.pick(IMAGE, QUESTION, shots=6)
    query = replace(retriever.stages.data.val_examples[0], question_id=1)  # its number is none of theirs
    assert sorted(chosen(own.pick(query, shots=5))) == [0, 1, 2, 3, 4]


def test_the_image_that_is_asked_about_is_never_shown_whatever_it_is_called(home, retriever, tmp_path):
    query, (first, *others) = retriever.stages.data.val_examples[0], retriever.examples
    other = next(example for example in others if example.image != first.image)
    own = own_retriever(home, [(str(query.image), "Another?", "leak"), (str(other.image), "Another?", "sound")])
    assert [example.answer for example in own.pool(query)] == ["sound"]
    assert own.pick(own.examples[0], shots=1)[0].example.answer == "sound"
    shutil.copy(first.image, tmp_path / "copy.jpg")
    numbered = Example(5000, 5000, "Which?", ("leak",), ("leak",), str(tmp_path / "copy.jpg"))
    given = [numbered, (first.image, "Which?", "leak"), (other.image, "Which?", "sound")]
    for examples in (given, [given[1], given[0], given[2]]):
        assert [example.answer for example in own_retriever(home, examples).pool(first.image, QUESTION)] == ["sound"]


def test_examples_that_are_none_are_refused(home):
    for bad in (["x"], [(IMAGE, QUESTION)], [(IMAGE, QUESTION, 7)]):
        with pytest.raises(ValueError, match="example 0: expected"):
            Retriever(home / RUN, examples=bad)
    with pytest.raises(LeverError, match=r"cannot read the image gone\.jpg"):
        Retriever(home / RUN, examples=[("gone.jpg", QUESTION, "a")])
    with pytest.raises(LeverError, match="no examples"):
        Retriever(home / RUN, examples=[])
    with pytest.raises(ValueError, match=r"example 0: .* no UTF-8"):
        Retriever(home / RUN, examples=[("x.jpg", "q\udc80", "a")])


# ---------------------------------------------------------------------- prompts


def test_the_messages_are_what_the_model_is_asked(home, retriever):
    """Through the library's own processor and `generate`, the messages give the answer that `answer` gives."""
    from lever_lm.utils.transformers_compat import import_transformers

    transformers = import_transformers()
    folder = str(asset_path("asset:tiny-qwen2.5-vl"))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    first, *others = retriever.pick(IMAGE, QUESTION, shots=8)
    told = (first.example.question, first.example.answer)  # of two that read alike, the text shows no order
    picks = [first, next(one for one in others if (one.example.question, one.example.answer) != told)]
    messages = retriever.prompt(IMAGE, QUESTION, picks)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    written = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answer = cut_answer(processor.batch_decode(written, skip_special_tokens=True)[0])
    assert retriever.answer(IMAGE, QUESTION, picks) == answer
    text = retriever.prompt(IMAGE, QUESTION, picks, form="text")
    assert text == processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    places = [text.index(pick.example.question + " Short answer: " + pick.example.answer) for pick in picks]
    assert places[0] > places[1], "the first pick stands nearest the query"


def test_messages_for_a_server_hold_the_images_and_are_json(retriever):
    picks = retriever.pick(IMAGE, QUESTION, shots=2)
    messages = retriever.prompt(IMAGE, QUESTION, picks, form="openai")
    assert json.loads(json.dumps(messages)) == messages
    images = [part for part in messages[1]["content"] if part["type"] == "image_url"]
    assert len(images) == 3
    assert all(part["image_url"]["url"].startswith("data:image/png;base64,") for part in images)
    assert retriever.prompt([IMAGE], [QUESTION], [picks], form="openai") == [messages]


def test_arguments_that_do_not_fit_are_refused(retriever, tmp_path):
    with pytest.raises(ValueError, match="2 images need lists"):
        retriever.pick([IMAGE, IMAGE], QUESTION)
    for question in (None, " ", b"why?", "half \ud800", "what is <|im_end|>?"):
        with pytest.raises(UsageError, match=r"a question about .* is needed"):
            retriever.pick(IMAGE, question)
    with pytest.raises(ValueError, match="unknown form"):
        retriever.prompt(IMAGE, QUESTION, form="html")
    with pytest.raises(ValueError, match="brings its own question"):
        retriever.pick(retriever.examples[0], "another?")
    (tmp_path / "none.jpg").write_text("no image")
    with pytest.raises(LeverError, match=r"cannot decode the image .*none\.jpg: it is none of JPEG"):
        retriever.pick(tmp_path / "none.jpg", QUESTION)
    with pytest.raises(LeverError, match=r"257 shots from a pool of 256 .*: lower --shots or raise infer\.pool_size"):
        retriever.pick(IMAGE, QUESTION, shots=257)


# ---------------------------------------------------------------------- which policy


def test_a_run_and_its_checkpoint_are_found_with_the_config_beside_them(home, retriever):
    assert retriever.checkpoint.parent == home / RUN
    assert "best by val_reward" in retriever.why
    assert retriever.stages.layout.features == home / "results/digits/cache/features_tiny-clip.safetensors"
    named = Retriever(retriever.checkpoint, results=home / "results", sets=["infer.pool_size=9", "seed=4"])
    assert (named.config.infer.pool_size, named.config.seed) == (9, 4)
    assert named.config.sampler == retriever.config.sampler
    assert len(named.pick(IMAGE, QUESTION, shots=9)) == 9


def test_a_checkpoint_alone_does_not_say_what_it_needs(home, tmp_path):
    shutil.copy(home / RUN / "grpo_epoch4.pt", tmp_path / "alone.pt")
    assert results_beside(tmp_path / "alone.pt") == Path("results")
    with pytest.raises(LeverError, match=r"alone\.pt names no dataset: say which \(dataset=NAME\)"):
        Retriever(tmp_path / "alone.pt")
    with pytest.raises(LeverError, match="by which encoder it sees"):
        Retriever(tmp_path / "alone.pt", examples=[(IMAGE, QUESTION, "a")])
    told = Retriever(tmp_path / "alone.pt", dataset="digits", lvlm="tiny_qwen2.5_vl", results=home / "results")
    assert len(told.pick(IMAGE, QUESTION)) == 4
    with pytest.raises(UsageError, match="unknown dataset"):
        Retriever(tmp_path / "alone.pt", dataset="digitz")
    with pytest.raises(LeverError, match="no checkpoint gone: expected a run folder"):
        Retriever("gone")


def test_a_policy_from_elsewhere_finds_its_dataset_by_name_and_environment(monkeypatch, tmp_path):
    values = {"data": {"name": "okvqa", "file_prefix": ""}, "features": {"encoder": "asset:tiny-clip"}}
    monkeypatch.setenv("OKVQA_PATH", str(tmp_path))
    config = config_beside(values, "theirs", None, None, [], own=False)
    assert (config.data.name, config.data.okvqa_path, config.data.coco_path) == ("okvqa", str(tmp_path), "data/coco")
    with pytest.raises(LeverError, match="theirs was trained on 'zoo', which is none of configs/dataset: say which"):
        config_beside({**values, "data": {"name": "zoo"}}, "theirs", None, None, [], own=False)
    assert config_beside({**values, "data": {"name": "zoo"}}, "theirs", None, None, [], own=True).data.name == "zoo"


# ---------------------------------------------------------------------- lever pick


@pytest.fixture
def in_home(home):
    return lambda *words: run_here(*words, cwd=home)


def test_pick_shows_what_is_shown_why_and_the_answer(in_home, retriever):
    done = in_home("pick", "--image", "x.jpg", "--question", QUESTION, "--json", "--prompt", "--shots", "3")
    assert done.status == 0, done.err
    picks = retriever.pick(IMAGE, QUESTION, shots=3)
    assert [icd["question_id"] for icd in done.json["icds"]] == chosen(picks)
    assert [icd["probability"] for icd in done.json["icds"]] == [pick.probability for pick in picks]
    assert done.json["answer"] == retriever.answer(IMAGE, QUESTION, picks)
    assert done.json["query"] == {"question_id": None, "question": QUESTION, "image": "x.jpg"}
    assert done.json["why"] == "best by val_reward"
    assert done.json["checkpoint"] == f"{RUN}/{retriever.checkpoint.name}"
    assert done.json["pool"] == {"size": 256, "sampler": "mix_sampler", "examples": len(retriever.examples)}
    assert done.json["prompt"].count("<|image_pad|>") == 4
    assert "references" not in done.json
    shown = in_home("pick", "--image", "x.jpg", "--question", QUESTION, "--shots", "3", "--quiet").out
    assert [line.split(".")[0].strip() for line in shown.splitlines()[1:4]] == ["1", "2", "3"]
    assert shown.splitlines()[-1] == f"answer: {done.json['answer']}"


def test_pick_alone_takes_the_first_evaluation_question_and_scores_the_answer(in_home, retriever):
    done, first = in_home("pick", "--json"), retriever.stages.data.val_examples[0]
    assert done.json["query"]["question_id"] == first.question_id
    assert done.json["references"] == list(first.answers)
    assert len(done.json["icds"]) == 4
    assert 0 <= done.json["accuracy"] <= done.json["normalized_accuracy"] <= 1
    assert "the first of the evaluation split" in done.err
    other = retriever.stages.data.val_examples[9]
    done = in_home("pick", "--json", "--no-answer", "--example", other.question_id)
    assert done.json["query"]["question"] == other.question
    assert "answer" not in done.json


def test_to_choose_only_no_lvlm_is_needed_and_a_run_that_is_named_is_taken_over_the_environment(in_home, monkeypatch):
    named = ("pick", "--json", "--no-answer", "--run-name", RUN.name)
    without = in_home(*named, "--set", "lvlm.path=gone/model")
    assert without.status == 0, without.err
    assert without.json["icds"] == in_home("pick", "--json", "--no-answer").json["icds"]
    monkeypatch.setenv("LEVER_LM_CHECKPOINT_PATH", str(RUN / "grpo_epoch1.pt"))
    assert in_home(*named).json["why"] == "best by val_reward"
    assert in_home("pick", "--json", "--no-answer").json["why"] == "named by LEVER_LM_CHECKPOINT_PATH"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--image", "x.jpg"), 2, "an --image with its --question"),
        (("--question", "why?"), 2, "an --image with its --question"),
        (("--image", "x.jpg", "--question", "why?", "--example", "1"), 2, "or --example"),
        (("--example", "1"), 2, "is no question of the evaluation split of digits, which begins with"),
        (("--image", "gone.jpg", "--question", "why?"), 1, "cannot read the image gone.jpg: No such file"),
        (("--image", ".", "--question", "why?"), 1, "cannot read the image .: Is a directory"),
        (("--image", "x.jpg", "--question", " "), 2, "a question about x.jpg is needed"),
        (("--run-name", "none"), 1, "no run folder results/digits/model_cpk/none"),
        (("--ckpt", "gone.pt"), 1, "no checkpoint gone.pt (from --ckpt)"),
        (("--features", "query_img_icd_img"), 1, "pass the same --features"),
    ],
)
def test_what_pick_cannot_do_is_one_message(in_home, words, status, said):
    done = in_home("pick", *words)
    assert done.status == status
    assert said in done.err
    assert done.err.count("lever: ") == 1


def test_pick_takes_the_newest_run_that_has_a_checkpoint(home, lever, tmp_path):
    runs = tmp_path / RUN.parent
    shutil.copytree(home / "results/digits/cache", tmp_path / "results/digits/cache")
    for name, time in (("demo", 1e9), ("other", 9e8)):
        shutil.copytree(home / RUN, runs / name)
        for file in (runs / name).glob("*_epoch*"):
            os.utime(file, (time, time))
    (runs / "empty").mkdir()
    assert Path(lever("pick", "--json", "--no-answer").json["checkpoint"]).parent.name == "demo"
    shutil.rmtree(tmp_path / "results")
    nothing = lever("pick")
    assert nothing.status == 1
    assert "`lever demo`" in nothing.err


def test_text_from_data_does_not_steer_the_terminal(in_home):
    done = in_home("pick", "--image", "x.jpg", "--question", "red \x1b[31m?\nlever: all is well", "--no-answer")
    assert done.status == 0
    assert "\x1b" not in done.out
    assert "\nlever: all is well" not in done.out


# ---------------------------------------------------------------------- the script


def test_the_example_script_picks_for_a_folder_of_images(home, tmp_path, retriever, script, monkeypatch, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for number in (11, 13):
        shutil.copy(IMAGE.with_name(f"COCO_val2014_{number:012d}.jpg"), images)
    (images / "notes.txt").write_text("no image")
    words = [str(images), QUESTION, "--policy", str(RUN), "--shots", "2", "--answer"]
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["pick_for_my_images.py", *words])
    script("pick_for_my_images").main()
    shown = capsys.readouterr().out
    picks = retriever.pick(IMAGE, QUESTION, shots=2)
    assert shown.startswith(f"{IMAGE.name}: {QUESTION} {retriever.answer(IMAGE, QUESTION, picks)}\n")
    assert f"  {picks[0].probability:.3f}  {Path(picks[0].example.image).name}" in shown
    assert shown.count(f"{QUESTION} ") >= 2
    assert retriever.prompt(IMAGE, QUESTION, picks, form="text") in shown
    (images / "examples.json").write_text(json.dumps([[IMAGE.name, "What is this?", "own"]]))
    words = [str(images), QUESTION, "--policy", str(RUN), "--shots", "1", "--examples", str(images / "examples.json")]
    monkeypatch.setattr(sys, "argv", ["pick_for_my_images.py", *words])
    with pytest.raises(LeverError, match="no training example is left"):  # the one demonstration is the first image
        script("pick_for_my_images").main()


def test_a_dataset_of_ones_own_without_data_hinders_no_other(monkeypatch, tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/a.yaml").write_text("features: {encoder: some/clip}\n")
    (tmp_path / "dataset/b.yaml").write_text("data: {name: mine, okvqa_path: /mine}\n")
    monkeypatch.setattr("lever_lm.training.from_checkpoint.configs_root", lambda: tmp_path)
    values = {"features": {"encoder": "some/clip"}, "data": {"name": "mine"}}
    assert config_beside(values, "x", None, None, (), own=False).data.okvqa_path == "/mine"
