"""The users' document, walked: every command of it as it stands, on tiny models under the real ones' names.

Then what it promises on files of Lever-Plus's making: the least validation loss is at epoch 25, and that one answers.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Done, clean_environment, files_in, run_here, small_digits
from official import build_official, hub_cache

from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.utils.paths import asset_path

CHECKOUT = Path(__file__).parents[1]
DOCUMENT = (Path(__file__).parent / "data" / "grpo_50_epochs.zh.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
INFERENCE = "bash scripts/inference.sh vqa okvqa_local 5 query_img_text_icd_img_text rand_sampler qwen2.5_vl_3B v3"
RUN = Path("results/okvqa/model_cpk/v3_RandSampler_Qwen2_5-VL-3B-Instruct")
ANSWERS = Path("results/okvqa/inference") / RUN.name
ROW = re.compile(r"^ *(\d+)( +-?\d+\.\d+){7}$", re.MULTILINE)
COLUMNS = re.search(r"^Epoch +Train Loss.*$", DOCUMENT, re.MULTILINE)[0].split()
VAL = 8


# Stands for `lever`: has the test's own process, which has imported everything, run the command.
LEVER = f"""#!{sys.executable} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.environ["LEVER_SOCKET"])
    asked = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
    server.sendall(json.dumps(asked).encode())
    server.shutdown(socket.SHUT_WR)
    done = json.loads(b"".join(iter(lambda: server.recv(65536), b"")))
sys.stdout.write(done["out"])
sys.stderr.write(done["err"])
sys.exit(done["status"])
"""


def shell_environment(folder: Path, data: Path) -> dict[str, str]:
    """That of a user who has the data, the models in the hub's cache, and no GPU."""
    hub_cache(folder / "home", "Qwen/Qwen2.5-VL-3B-Instruct", "model", asset_path("asset:tiny-qwen2.5-vl"))
    hub_cache(folder / "home", "openai/clip-vit-large-patch14", "model", asset_path("asset:tiny-clip"))
    shutil.copytree(CHECKOUT / "scripts", folder / "scripts")
    programs = {"nvidia-smi": "#!/bin/sh\necho 'no devices were found'\n", "lever": LEVER}
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return clean_environment(
        OKVQA_PATH=str(data),
        COCO_PATH=str(data),
        CUDA_VISIBLE_DEVICES="",
        PYTHONIOENCODING="utf-8",
        LEVER_SOCKET=str(folder / "socket"),
        PATH=os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
    )


def run_shell(script: str, folder: Path, environment: dict[str, str]) -> int:
    """Run a script with bash, and in this process each `lever` command that it comes to; return its status."""
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "home" / "hub"))
        server.bind(environment["LEVER_SOCKET"])
        server.listen()
        server.settimeout(0.1)
        shell = subprocess.Popen(["bash", "-c", script], cwd=folder, env=environment)
        while shell.poll() is None:
            with contextlib.suppress(TimeoutError), server.accept()[0] as caller:
                caller.settimeout(10)
                asked = json.loads(b"".join(iter(lambda caller=caller: caller.recv(65536), b"")))
                with pytest.MonkeyPatch.context() as own:
                    for name in os.environ.keys() - asked["environment"].keys():
                        own.delenv(name)
                    for name, value in asked["environment"].items():
                        own.setenv(name, value)
                    done = run_here(*asked["arguments"], cwd=asked["folder"])
                caller.sendall(json.dumps(vars(done)).encode())
    return shell.returncode


# ---------------------------------------------------------------------- the walk

NAMES = ["parameters", "train", "files", "processes", "select", "convert", "rename", "name", "whole"]


def parts_of_the_document() -> dict[str, str]:
    """Its blocks in their order. Methods A and B of one block are alternatives: A's `cd` must not hold for B."""
    parts = []
    for block in BLOCKS:
        before, heading, after = block.partition("# 方法 B")
        parts += [f"(\n{before}\n)", heading + after] if heading else [block]
    return dict(zip(NAMES, parts, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder that the document is walked in."""
    return tmp_path_factory.mktemp("walk")


@pytest.fixture(scope="module")
def walk(folder) -> dict[str, Done]:
    """The document from its first command to its last, in one shell: part → what it said.

    One command more: after method A, the inference that it is for. The data are digits, about which the tiny model can
    answer: among photographs every group would be tied.
    """
    parts = {}
    for name, part in parts_of_the_document().items():
        parts[name] = part
        if name == "rename":
            parts["latest"] = f"(unset LEVER_LM_CHECKPOINT_PATH; {INFERENCE})"
    said = folder / "said"
    said.mkdir()
    lines = []
    for name, part in parts.items():
        strict = "set +e" if name == "processes" else "set -e"  # there may be no process to see
        lines += [strict, f"exec > said/{name}.out 2> said/{name}.err", part]
    environment = shell_environment(folder, small_digits(folder / "data", train=32, val=VAL))
    status = run_shell("\n".join(lines), folder, environment)
    read = {path.name: path.read_text(encoding="utf-8") for path in said.iterdir()}
    steps = {name: Done(0, read.get(f"{name}.out", ""), read.get(f"{name}.err", "")) for name in parts}
    last = [name for name in parts if f"{name}.out" in read][-1]
    assert status == 0, f"the part {last!r} failed: {steps[last].out[-1500:]}{steps[last].err[-1500:]}"
    return steps


def test_the_document_is_read_whole():
    assert len(BLOCKS) == DOCUMENT.count("```bash") == 8
    commands = [line for block in BLOCKS for line in block.splitlines() if "scripts/" in line]
    assert len(commands) == 10
    assert sum(line == INFERENCE for line in commands) == 3
    seed = CHECKOUT.parent / "shared" / "seed" / "grpo_50_epochs.zh.md"
    if seed.is_file():  # the users' own copy
        assert seed.read_text(encoding="utf-8") == DOCUMENT


def test_every_command_of_the_document_runs_without_a_complaint(walk):
    assert {name: step.err for name, step in walk.items() if step.err and name != "processes"} == {}


def test_the_parameters_are_in_effect(folder, walk):
    for line in ("GRPO_EPOCHS=50", "KL_BETA=0.1", "USE_RANK_ADVANTAGE=false"):
        assert f"from the environment: {line}\n" in walk["train"].out
    config = (folder / RUN / "config.yaml").read_text()
    assert "kl_beta: 0.1\n" in config
    assert "advantage: zscore\n" in config
    assert "path: Qwen/Qwen2.5-VL-3B-Instruct\n" in config


def test_the_output_folder_holds_what_the_document_shows(folder, walk):
    assert f"./{RUN}/" in DOCUMENT
    expected = {f"rce_epoch{epoch}.pt" for epoch in range(1, 6)} | {f"grpo_epoch{epoch}.pt" for epoch in range(1, 51)}
    assert {path.name for path in (folder / RUN).glob("*_epoch*.pt")} == expected


def test_the_terminal_and_the_log_show_the_documents_table(folder, walk):
    for text in (walk["train"].out, (folder / RUN / "train.log").read_text(encoding="utf-8")):
        _, heading, table = text.partition("阶段3：GRPO训练\n")
        assert heading
        assert table.splitlines()[0].split() == COLUMNS
        assert [int(row[1]) for row in ROW.finditer(table)] == list(range(1, 51))
        assert len({row[0].split()[4] for row in ROW.finditer(table)}) > 10, "the policy learns nothing here"


def test_the_files_are_listed_and_counted(walk):
    listed = walk["files"].out.splitlines()
    assert len(listed) == 51
    assert all(line.split()[-1].startswith(f"./{RUN}/grpo_epoch") for line in listed)
    assert listed[-1] == f"./{RUN}/grpo_epoch50.pt"  # the latest by its time
    assert walk["whole"].out.splitlines()[0].strip() == "50"
    assert "no devices were found" in walk["processes"].out


def test_the_best_checkpoint_is_found(folder, walk):
    rows = list(map(json.loads, (folder / RUN / "metrics.jsonl").read_text().splitlines()))
    rows = [row for row in rows if row["phase"] == "grpo"]
    least = min(rows, key=lambda row: row["val_loss"])["epoch"]
    widest = max(rows, key=lambda row: row["adv_std"])["epoch"]
    chosen = re.findall(r"^(\w+): epoch (\d+): (\S+) ", walk["select"].out, re.MULTILINE)
    answers = [("val_loss", least), ("val_loss", least), ("adv_std", widest)]
    assert chosen == [(strategy, str(epoch), f"{RUN}/grpo_epoch{epoch}.pt") for strategy, epoch in answers]


@pytest.mark.parametrize("name", ["select", "whole"])
def test_show_all_prints_every_epoch_in_the_documents_columns(walk, name):
    text = walk[name].out
    assert sum(line.split() == COLUMNS for line in text.splitlines()) == 1
    assert [int(row[1]) for row in ROW.finditer(text)] == list(range(1, 51))


def test_the_checkpoint_is_converted(folder, walk):
    for name in ("convert", "whole"):
        assert f"converted {RUN}/grpo_epoch25.pt → {RUN}/grpo_epoch25_v2format.ckpt\n" in walk[name].out
    assert (folder / RUN / "grpo_epoch25_v2format.ckpt").is_file()


@pytest.mark.parametrize("name", ["convert", "name", "whole"])
def test_inference_takes_the_file_that_the_variable_names(walk, name):
    check_inference(walk[name].out)


def check_inference(text: str) -> None:
    """One inference: with the checkpoint that the variable names, a table of its accuracy at five shots."""
    taken = re.findall(r"^checkpoint: (.*)$", text, re.MULTILINE)
    assert taken == [f"{RUN}/grpo_epoch25_v2format.ckpt (named by LEVER_LM_CHECKPOINT_PATH)"]
    assert f"VQA accuracy on {VAL} queries" in text
    assert re.search(r"grpo.* \d\.\d{3} \[", text)
    assert "5 shots" in text


def test_a_checkpoint_renamed_to_the_latest_is_taken_without_the_variable(folder, walk):
    run = folder / RUN
    assert (run / "grpo_epoch50.pt").read_bytes() == (run / "grpo_epoch25.pt").read_bytes()
    assert f"checkpoint: {RUN}/grpo_epoch50.pt (the latest of the run)\n" in walk["latest"].out
    picks = [(folder / ANSWERS / name / "icds.jsonl").read_text() for name in ("grpo_epoch25", "grpo_epoch50")]
    assert picks[0] == picks[1], "the v2 file and the renamed v3 file hold one policy"


def test_every_query_is_answered_after_five_demonstrations(folder, walk):
    for epoch in (25, 50):
        check_answers(folder / ANSWERS / f"grpo_epoch{epoch}", folder / "data")


def check_answers(folder: Path, data: Path) -> None:
    """Predictions for all of the evaluation split, each after five different demonstrations."""
    questions = json.loads((data / "OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    ids = [item["question_id"] for item in questions]
    predictions = json.loads((folder / "predictions_grpo_5shot.json").read_text())
    assert [row["question_id"] for row in predictions] == ids
    assert len(ids) == VAL
    assert all(isinstance(row["answer"], str) for row in predictions)
    shown = [json.loads(line)["icds"] for line in (folder / "samples_grpo_5shot.jsonl").read_text().splitlines()]
    assert [len(set(icds)) for icds in shown] == [5] * VAL


# ---------------------------------------------------------------------- troubleshooting


def refused(done: Done) -> str:
    """The one message of a command that could not."""
    (line,) = done.err.splitlines()
    assert (done.status, line[:7]) == (1, "lever: ")
    return line


def test_a_log_that_cannot_be_parsed_is_said_to_be_one(folder, walk):
    (folder / "other.log").write_text("Epoch 1: loss 0.3\nEpoch 2: loss 0.2\n")
    said = refused(run_here("best-ckpt", RUN, "--log", "other.log", cwd=folder))
    assert "other.log" in said
    assert "阶段3：GRPO训练" in said


def test_the_table_in_the_document_is_a_log_that_can_be_parsed(tmp_path):
    table = re.search(r"^```\n(阶段3.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "document.log").write_text(table, encoding="utf-8")
    done = run_here("best-ckpt", "--log", "document.log", "--show-all", cwd=tmp_path)
    assert done.status == 0, done.err
    assert "val_loss: epoch 2 " in done.out
    assert len(ROW.findall(done.out)) == 2


@pytest.mark.parametrize(("wrong", "word"), [("results/okvqa/model_cpk/v3_Rand", "no run folder"), ("bin", "no metr")])
def test_a_wrong_directory_is_named(folder, walk, wrong, word):
    said = refused(run_here("best-ckpt", wrong, cwd=folder))
    assert wrong in said
    assert word in said


def test_a_checkpoint_that_is_not_converted_yet_is_refused_with_the_command_that_converts_it(folder, walk, monkeypatch):
    missing = f"{RUN}/grpo_epoch26_v2format.ckpt"
    monkeypatch.setenv("LEVER_LM_CHECKPOINT_PATH", f"./{missing}")
    said = refused(run_here("infer", "--dataset", "okvqa_local", cwd=folder))
    assert missing in said
    assert f"`lever convert {RUN}/grpo_epoch26.pt`" in said
    assert "LEVER_LM_CHECKPOINT_PATH" in said


# ---------------------------------------------------------------------- the story of epoch 25, on their files

BEST = {"val_loss": 25, "ppo_loss": 31, "kl": 12, "adv_std": 40}


def lineage_checkpoints(folder: Path) -> None:
    """A run of Lever-Plus: checkpoints and nothing else, their epochs counted from 0, nothing of ours in them."""
    folder.mkdir(parents=True)
    size = json.loads((asset_path("asset:tiny-clip") / "config.json").read_text())["projection_dim"]
    for phase, epochs in (("rce", 5), ("grpo", 50)):
        for epoch in range(1, epochs + 1):
            torch.manual_seed(epoch)
            weights = PointerSelector(d_model=size, hidden_dim=32).state_dict()
            far = {name: abs(epoch - best) for name, best in BEST.items()}
            metrics = {"train_loss": 0.01 - epoch * 1e-4, "val_loss": 5.0 + far["val_loss"] * 1e-3, "adv_max": 1.5}
            metrics |= {"ppo_loss": -0.002 + far["ppo_loss"] * 1e-4, "kl": 0.05 * epoch / BEST["kl"], "beta": 0.1}
            metrics |= {"adv_std": 0.6 - far["adv_std"] * 1e-2}
            if phase == "rce":  # a lower loss, in a phase that is not asked about
                metrics = {"rce_loss": 4.5, "val_loss": 4.6}
            content = {"epoch": epoch - 1, "phase": phase, "model_state_dict": weights, "kl_beta": 0.1}
            torch.save({**content, "metrics": metrics}, folder / f"{phase}_epoch{epoch}.pt")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    lineage_checkpoints(folder / RUN)
    build_official(folder / "data", train=24, val=VAL)
    return folder


def test_on_their_checkpoints_the_document_ends_with_answers_of_epoch_25(theirs, monkeypatch):
    """The last block of the document, in this process; their files are left as they were."""
    before = files_in(theirs / RUN)
    shown = run_here("best-ckpt", RUN, "--show-all", cwd=theirs)
    assert [int(row[1]) for row in ROW.finditer(shown.out)] == list(range(1, 51))
    assert f"val_loss: epoch 25: {RUN}/grpo_epoch25.pt " in shown.out
    assert run_here("convert", RUN / "grpo_epoch25.pt", cwd=theirs).status == 0
    variables = {"LEVER_LM_CHECKPOINT_PATH": f"{RUN}/grpo_epoch25_v2format.ckpt"}
    for name, value in (variables | dict.fromkeys(("OKVQA_PATH", "COCO_PATH"), str(theirs / "data"))).items():
        monkeypatch.setenv(name, value)
    tiny = ("--run-name", RUN.name, "--set", "features.encoder=asset:tiny-clip")
    done = run_here("infer", "--dataset", "okvqa_local", "--shots", "5", *tiny, cwd=theirs)
    assert done.status == 0, done.err
    check_inference(done.out)
    check_answers(theirs / ANSWERS / "grpo_epoch25_with_tiny-qwen2_5-vl", theirs / "data")
    after = files_in(theirs / RUN)
    assert after.keys() - before.keys() == {"best.json", "grpo_epoch25_v2format.ckpt"}
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("strategy", BEST)
def test_each_strategy_of_the_documents_table_chooses_by_its_metric(theirs, strategy):
    assert f"| `{strategy}` |" in DOCUMENT
    done = run_here("best-ckpt", RUN, "--strategy", strategy, cwd=theirs)
    assert done.status == 0, done.err
    assert f"{strategy}: epoch {BEST[strategy]}: {RUN}/grpo_epoch{BEST[strategy]}.pt " in done.out
