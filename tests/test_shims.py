"""The scripts with Lever-Plus's words: what they hand to `lever`, which `lever`, and what they refuse."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import SCRIPTS, Done, clean_environment

SHELL, PYTHON = ("train_v3.sh", "inference.sh"), ("find_best_checkpoint.py", "convert_v3_to_v2_format.py")
WORDS = ["--features", "query_img_text_icd_img_text", "--sampler", "rand_sampler", "--lvlm", "qwen2.5_vl_3B"]
OTHERS = ["--features", "query_img_icd_img", "--sampler", "mix_sampler", "--lvlm", "qwen2.5_vl_7B"]
TRAIN = ["train", "--dataset", "okvqa_local", *WORDS]
INFER = ["infer", "--shots", "5", "--dataset", "okvqa_local", *WORDS]
LATEST = ["--ckpt", "latest"]
VQAV2 = ["--dataset", "vqav2_local"]
# Says what it was given, on the standard output; leaves with $FAKE_STATUS.
FAKE = f"""#!{sys.executable} -SE
import json, os, sys
seen = {{"name": NAME, "arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
print(json.dumps(seen))
sys.exit(int(os.environ.get("FAKE_STATUS", 0)))
"""


class Ran(Done):
    """What a script ended with; `seen` is what the fake saw, None where it was not reached."""

    @property
    def seen(self) -> dict | None:
        return self.json if self.out.startswith("{") else None


def put(path: Path, name: str) -> Path:
    """A fake command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FAKE.replace("NAME", repr(name)))
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder, with a space in its name, that holds the scripts and a fake `lever` in its .venv."""
    folder = tmp_path / "a checkout"
    (folder / "scripts").mkdir(parents=True)
    for name in ("lever.sh", *SHELL, *PYTHON):
        shutil.copy2(SCRIPTS / name, folder / "scripts")
    put(folder / ".venv/bin/lever", "own")
    return folder


@pytest.fixture
def run(checkout, tmp_path):
    """Run one of the scripts from another folder: script, arguments → Ran."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def call(script, *arguments: str, options: tuple[str, ...] = (), **extra: str) -> Ran:
        path = checkout / "scripts" / script
        command = [shutil.which("bash") if path.suffix == ".sh" else sys.executable, *options, path, *arguments]
        environment = {**clean_environment(), **extra}
        if "CUDA_VISIBLE_DEVICES" not in extra:
            environment.pop("CUDA_VISIBLE_DEVICES", None)
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=60)
        return Ran(done.returncode, done.stdout, done.stderr)

    return call


# ---------------------------------------------------------------------- words and flags

ALL = "query_img_text_icd_img_text rand_sampler qwen2.5_vl_3B"
OTHER = "query_img_icd_img mix_sampler qwen2.5_vl_7B"
FIND = "find_best_checkpoint.py"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train_v3.sh", TRAIN),
        (f"train_v3.sh vqa okvqa_local 0 {ALL}", TRAIN),
        (f"train_v3.sh vqa vqav2_local 1 {OTHER}", ["train", "--dataset", "vqav2_local", *OTHERS]),
        ("train_v3.sh vqa digits", ["train", "--dataset", "digits", *WORDS]),
        ("train_v3.sh --dry-run --json", [*TRAIN, "--dry-run", "--json"]),
        (f"train_v3.sh vqa okvqa_local 0 {ALL} --set a=b -q", [*TRAIN, "--set", "a=b", "-q"]),
        (f"inference.sh vqa okvqa_local 5 {ALL} v2", [*INFER, *LATEST]),
        (f"inference.sh vqa vqav2_local 2 {OTHER} v3", ["infer", "--shots", "2", *VQAV2, *OTHERS, *LATEST]),
        (f"inference.sh vqa okvqa_local 5 {ALL} v3 200", [*INFER, *LATEST, "--limit", "200"]),
        (f"inference.sh vqa okvqa_local 5 {ALL} v3 -1 --baselines", [*INFER, *LATEST, "--baselines"]),
        ("inference.sh vqa okvqa_local 5 --ckpt best", [*INFER, *LATEST, "--ckpt", "best"]),  # lever takes the last
        ("inference.sh --icds mine.jsonl", [*INFER, "--icds", "mine.jsonl"]),
        ("inference.sh --icds=mine.jsonl", [*INFER, "--icds=mine.jsonl"]),
        (f"{FIND} --checkpoint-dir=r --strategy kl", ["best-ckpt", "r", "--strategy", "kl"]),
        (f"{FIND} --show_all --checkpoint_dir r", ["best-ckpt", "r", "--show-all"]),
        (f"{FIND} --show-all --log_file a.log", ["best-ckpt", "--show-all", "--log", "a.log"]),
        (f"{FIND} --log-file a.log", ["best-ckpt", "--log", "a.log"]),
        (f"{FIND} --log a.log --json --seed 3", ["best-ckpt", "--log", "a.log", "--json", "--seed", "3"]),
        ("convert_v3_to_v2_format.py --v3_ckpt ./a.pt", ["convert", "./a.pt"]),
        ("convert_v3_to_v2_format.py --v3-ckpt=a.pt --output b.ckpt", ["convert", "a.pt", "--output", "b.ckpt"]),
        ("convert_v3_to_v2_format.py --v3_ckpt a.pt --allow-truncate", ["convert", "a.pt", "--allow-truncate"]),
    ],
)
def test_the_words_of_a_script_become_options(run, line, expected):
    ran = run(*line.split())
    assert ran.status == 0, ran.err
    assert ran.seen["arguments"] == expected


def test_a_path_with_spaces_stays_one_word(run):
    assert run(FIND, "--checkpoint_dir", "./my run").seen["arguments"] == ["best-ckpt", "./my run"]
    assert run("convert_v3_to_v2_format.py", "--v3_ckpt", "a b.pt").seen["arguments"] == ["convert", "a b.pt"]


@pytest.mark.parametrize(("named", "added"), [("grpo epoch25.ckpt", []), ("", LATEST), ("  ", LATEST)])
def test_inference_takes_the_latest_unless_the_environment_names_a_checkpoint(run, named, added):
    ran = run("inference.sh", LEVER_LM_CHECKPOINT_PATH=named)
    assert ran.seen["arguments"] == [*INFER, *added]
    assert ran.seen["environment"]["LEVER_LM_CHECKPOINT_PATH"] == named
    assert "CUDA_VISIBLE_DEVICES" not in ran.seen["environment"]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("script", "words", "named"),
    [
        ("train_v3.sh", "caption", "TASK"),
        ("train_v3.sh", "vqa okvqa_local cuda:0", "GPU"),
        ("train_v3.sh", "vqa okvqa_local rand_sampler", "SAMPLER"),
        ("inference.sh", "caption", "TASK"),
        ("inference.sh", "vqa okvqa_local 0", "SHOTS"),
        ("inference.sh", "vqa okvqa_local 5 f s l v1", "VERSION"),
        ("inference.sh", "vqa okvqa_local 5 f s l v3 -2", "TEST_DATA_NUM"),
        ("inference.sh", "vqa okvqa_local 5 f s l v3 100 more", "TEST_DATA_NUM"),
        ("find_best_checkpoint.py", "", "--checkpoint_dir"),
        ("find_best_checkpoint.py", "--checkpoint_dir", "--checkpoint_dir"),
        ("convert_v3_to_v2_format.py", "", "--v3_ckpt"),
    ],
)
def test_bad_words_get_the_usage_and_status_2(run, script, words, named):
    ran = run(script, *words.split())
    assert (ran.status, ran.out) == (2, "")
    assert "usage: " in ran.err
    assert named in ran.err


@pytest.mark.parametrize("script", PYTHON)
def test_help_is_the_scripts_own(run, script):
    ran = run(script, "--help")
    assert (ran.status, ran.seen, ran.err) == (0, None, "")
    assert f"usage: {script}" in ran.out


# ---------------------------------------------------------------------- GPU


@pytest.mark.parametrize(
    ("there", "gpu", "visible"),
    [
        (None, "3", "3"),
        (None, "08", "8"),
        ("4,5,6", "0", "4"),
        ("4, 5", "1", "5"),
        ("4,5", "2", "4,5"),
        ("GPU-8f2a,MIG-77", "1", "MIG-77"),
        ("", "0", ""),  # a scheduler's way of saying: no GPU
    ],
)
def test_the_gpu_is_an_index_into_what_is_visible(run, there, gpu, visible):
    extra = {} if there is None else {"CUDA_VISIBLE_DEVICES": there}
    ran = run("train_v3.sh", "vqa", "okvqa_local", gpu, **extra)
    assert ran.seen["environment"]["CUDA_VISIBLE_DEVICES"] == visible


# ---------------------------------------------------------------------- which lever, where

CALLS = {**dict.fromkeys(SHELL, ()), PYTHON[0]: ("--checkpoint_dir", "r"), PYTHON[1]: ("--v3_ckpt", "a.pt")}
each_script = pytest.mark.parametrize("script", CALLS)


@pytest.fixture
def bare_path(tmp_path) -> Path:
    """A folder to be all of PATH: what the scripts need, and no `lever`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "readlink", "dirname"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


@each_script
def test_status_folder_and_environment_are_the_callers(run, tmp_path, script):
    variables = {"GRPO_EPOCHS": "50", "KL_BETA": "0.1", "USE_RANK_ADVANTAGE": "false"}
    ran = run(script, *CALLS[script], FAKE_STATUS="130", **variables)
    assert ran.status == 130
    assert ran.seen["folder"] == str(tmp_path / "elsewhere")
    assert ran.seen["environment"].items() >= variables.items()


@each_script
def test_the_lever_of_the_checkout_comes_first_then_that_of_path_then_pythons(run, checkout, bare_path, script):
    put(bare_path / "lever", "path")
    put(bare_path / "python3", "python")

    def taken(**extra: str) -> dict:
        ran = run(script, *CALLS[script], PATH=str(bare_path), **extra)
        assert ran.status == 0, ran.err
        return ran.seen

    arguments = taken()["arguments"]
    assert taken()["name"] == "own"
    (checkout / ".venv/bin/lever").chmod(0o644)
    assert (taken()["name"], taken()["arguments"]) == ("path", arguments)
    (bare_path / "lever").unlink()
    own_python = {"PYTHON": str(bare_path / "python3")} if script in PYTHON else {}
    last = taken(**own_python)
    assert (last["name"], last["arguments"]) == ("python", ["-m", "lever_lm", *arguments])


def test_a_python_script_falls_back_on_the_python_it_runs_in(run, checkout, bare_path):
    (checkout / ".venv/bin/lever").unlink()
    ran = run(FIND, "--checkpoint_dir", "nowhere at all", PATH=str(bare_path))
    assert (ran.status, ran.out) == (1, "")
    assert "lever: no run folder nowhere at all" in ran.err


@each_script
@pytest.mark.parametrize("linked", ["folder", "file"])
def test_a_link_to_a_script_leads_to_its_checkout(run, checkout, tmp_path, script, linked):
    link = tmp_path / ("scripts" if linked == "folder" else script)
    link.symlink_to(checkout / "scripts" / link.name if linked == "file" else checkout / "scripts")
    assert run(link / script if linked == "folder" else link, *CALLS[script]).seen["name"] == "own"


# ---------------------------------------------------------------------- thin


def test_shell_scripts_parse_and_can_be_run_by_name():
    for script in SCRIPTS.glob("*.sh"):
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), script
    assert all(os.access(SCRIPTS / name, os.X_OK) for name in SHELL)


@pytest.mark.parametrize("script", PYTHON)
def test_python_scripts_import_neither_torch_nor_the_package(run, script):
    ran = run(script, *CALLS[script], options=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in ran.err.splitlines()}
    assert ran.seen is not None
    assert "argparse" in imported
    assert not {name for name in imported if name.split(".")[0] in ("torch", "lever_lm", "typer")}
