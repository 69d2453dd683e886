"""The command line: what is refused and how, what goes to stdout and what to stderr, and which run is which.

Most commands run in this process through the real entry function; what concerns the process itself gets one.
"""

import importlib.metadata
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROLLOUTS, RUN, SMALL, Done, clean_environment, files_in, run_lever

from lever_lm import __version__
from lever_lm.cli import commands as cli
from lever_lm.utils.safe_torch_load import load_torch

COMMANDS = ("demo", "train", "rollout", "best-ckpt", "convert", "infer", "pick", "export", "report", "status", "doctor")
V2 = "grpo_epoch{}_v2format.ckpt"


def assert_refused(done: Done, status: int, *words: str) -> None:
    """One message, the right status, no traceback; nothing on stdout (the command had --json)."""
    assert done.status == status, (done.status, done.err)
    assert done.out == ""
    assert "Traceback" not in done.err
    assert "defect of lever_lm" not in done.err
    ours = [line for line in done.err.splitlines() if line.startswith("lever: ")]
    usage = done.err.count("Usage: ")
    assert len(ours) + usage == 1, done.err
    if ours:
        after = done.err.splitlines()[done.err.splitlines().index(ours[0]) + 1 :]
        assert all(line.startswith("  ") for line in after), "the message comes last, with its list if it has one"
    text = done.err[done.err.index(ours[0]) :] if ours else " ".join(done.err.split())
    for word in words:
        assert word in text, text


# ---------------------------------------------------------------------- the process


def test_help_and_version_load_nothing_heavy(trained):
    """Nor do status, the choice of an epoch, config and completion."""
    code = (
        "import click, sys\n"
        "from lever_lm.cli import completion\n"
        "from lever_lm.cli.commands import app\n"
        "from lever_lm.cli.entrypoint import run\n"
        "for find in (completion.set_keys, completion.run_folders, completion.configs, completion.strategies):\n"
        "    find(click.Context(click.Command('x')), '')\n"
        f"helps = [[], ['--help'], ['--version'], *([c, '--help'] for c in {COMMANDS!r}), ['nonsense']]\n"
        f"work = [['status', {str(RUN)!r}], ['status'], ['best-ckpt', '--show-all']]\n"
        "views = [['show', '--docs'], ['diff', 'demo'], ['--help']]\n"
        "for command in [*helps, *work, *(['config', *words] for words in views)]:\n"
        "    assert run(app, command) == (2 if command in ([], ['nonsense']) else 0), command\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'PIL', 'jinja2', 'torchvision'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=trained, env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout
    assert done.stdout.count(": finished") == 2
    assert all(f"Usage: lever {command} " in done.stdout for command in COMMANDS)


def test_the_lever_script_and_the_module_are_the_same_command(tmp_path):
    command = [Path(sys.executable).parent / "lever", "--version"]
    script = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    module = run_lever("--version", cwd=tmp_path)
    assert script.stdout == module.out == f"lever_lm {__version__}\n"
    assert module.status == 0


def test_an_unexpected_failure_shows_its_traceback_only_with_debug(trained, lever):
    (trained / RUN / "metrics.jsonl").write_text("not json\n")
    quiet = lever("best-ckpt", "--json")
    assert_refused(quiet, 1, "metrics.jsonl", "line 1")
    loud = lever("best-ckpt", "--json", "--debug")
    assert loud.status == 1
    assert "Traceback (most recent call last)" in loud.err
    assert loud.err.splitlines()[-1] == quiet.err.splitlines()[-1]


# ---------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["tarin"], ["tarin"]),
        (["train", "--grop-epochs", "5"], ["--grop-epochs"]),
        (["train", "--seed", "x"], ["--seed"]),
        (["train", "--seed", "-1"], ["seed"]),
        (["train", "--limit", "1"], ["--limit"]),
        (["train", "surplus"], ["surplus"]),
        (["train", "--grpo-epochs", "-1"], ["--grpo-epochs"]),
        (["train", "--rce-epochs", "0", "--grpo-epochs", "0"], ["--rce-epochs", "--grpo-epochs"]),
        (["train", "--set", "grpo.kl_bta=0.1"], ["grpo.kl_bta", "'grpo.kl_beta'"]),
        (["train", "--set", "reward.mode=hard_only_v9"], ["hard_only_v9", "hard_only", "reward.mode"]),
        (["train", "--set", "rollout.pool_size=1"], ["rollout.pool_size", "rollout.shots"]),
        (["train", "--dataset", "digit"], ["'digit'", "'digits'"]),
        (["train", "--features", "query_img_icd"], ["query_img_icd", "--features"]),
        (["train", "--run-name", "a/b"], ["--run-name", "a/b"]),
        (["best-ckpt", "--run-name", ".lock"], ["--run-name", "'.lock'"]),
        (["train", "--config", "missing.yaml"], ["missing.yaml", "--config"]),
        (["train", "--quiet", "--verbose"], ["--quiet", "--verbose"]),
        (["best-ckpt", "--strategy", "val_los"], ["val_los", "val_loss"]),
        (["infer", "--shots", "0"], ["--shots"]),
        (["convert", "--to", "v4"], ["--to", "v4"]),
        (["train", "--embeddings", "e.pt"], ["--rl-data"]),
        (["train", "--config", "."], ["--config"]),
        *((["train", "--device", device, "--limit", "4"], [device]) for device in ("gpu7", "cpu:3", "cuda:x", "meta")),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_refused_with_2_and_writes_nothing(lever, tmp_path, command, words):
    assert_refused(lever(*command, "--json"), 2, *words)
    assert files_in(tmp_path) == {}


# ---------------------------------------------------------------------- nothing there


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["best-ckpt"], ["lever train"]),
        (["best-ckpt", "--log", "missing.log"], ["missing.log"]),
        (["best-ckpt", "nowhere"], ["nowhere"]),
        (["convert"], ["lever train"]),
        (["convert", "missing.pt"], ["missing.pt"]),
        (["infer"], ["lever train"]),
        (["infer", "--ckpt", "latest"], ["lever train"]),
        (["infer", "--ckpt", "missing.pt"], ["missing.pt"]),
        (["report"], ["lever infer"]),
        (["train", "--dataset", "okvqa_local"], ["OKVQA_PATH"]),
        (["train", "--rl-data", "missing.json"], ["missing.json"]),
        (["train", "--rl-data", "missing.json", "--embeddings", "missing.pt"], ["missing"]),
    ],
    ids=" ".join,
)
def test_an_empty_folder_has_nothing_to_offer_and_stays_empty(lever, tmp_path, command, words):
    assert_refused(lever(*command, "--json"), 1, *words)
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("command", [["infer", "--ckpt", str(RUN / "grpo_epoch1.pt")], ["demo", *SMALL[:4]]])
def test_more_shots_than_the_pool_holds_are_refused_before_any_work(trained, lever, command):
    before = files_in(trained)
    done = lever(*command, "--shots", "1,257", "--json")
    assert_refused(done, done.status or 1, "--shots 257", "infer.pool_size 256")
    assert done.status in (1, 2)
    assert files_in(trained) == before


# ---------------------------------------------------------------------- a checkpoint that is not one


class Harm:
    """A pickle that would run code."""

    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


@pytest.mark.parametrize("kind", ["truncated", "pickle with code"])
def test_a_file_that_is_no_checkpoint_is_refused_and_nothing_is_touched(trained, lever, kind):
    for name in ("grpo_epoch1.pt", "state.pt"):
        path = trained / RUN / name
        whole = path.read_bytes()
        bad = {
            "truncated": whole[: len(whole) // 2],
            "pickle with code": pickle.dumps({"model_state_dict": Harm()}),
        }
        path.write_bytes(bad[kind])
    before = files_in(trained)
    for way in ("v2", "v3"):
        assert_refused(lever("convert", RUN / "grpo_epoch1.pt", "--to", way, "--json"), 1, "grpo_epoch1.pt")
    shot = ("--shots", "1", "--limit", "4", "--json")
    assert_refused(lever("infer", "--ckpt", RUN / "grpo_epoch1.pt", *shot), 1, "grpo_epoch1.pt")
    assert_refused(lever("train", *SMALL, "--json"), 1, "state.pt")
    after = files_in(trained)
    assert {name: after[name] for name in before} == before
    assert "harmed" not in after


# ---------------------------------------------------------------------- --json, --dry-run, --quiet


@pytest.mark.parametrize(
    "command",
    [["train", *SMALL], ["rollout", *SMALL[:2]], ["best-ckpt"], ["convert"], ["infer", "--limit", "4"]],
    ids=lambda c: c[0],
)
def test_json_leaves_only_json_on_stdout(trained, lever, command):
    done = lever(*command, "--json")
    assert done.status == 0, done.err
    assert isinstance(done.json, dict)
    assert done.out.count("\n") == 1
    spoken = lever(*command)
    assert spoken.status == 0
    assert spoken.err == ""
    assert spoken.out.strip()
    assert "{" not in spoken.out


@pytest.mark.parametrize("command", COMMANDS)
def test_dry_run_writes_nothing_and_says_what_would_be_done(lever, tmp_path, command):
    done = lever(command, "--limit", "7", "--seed", "5", "--dry-run", "--json")
    assert done.status == 0, done.err
    assert list(tmp_path.iterdir()) == []
    assert done.json["config"]["seed"] == 5
    assert done.json["config"]["rollout"]["num_queries"] == 7
    run = "demo" if command == "demo" else RUN.name
    assert done.json["paths"]["run"] == f"results/digits/model_cpk/{run}"
    assert "to be made" in done.err


@pytest.mark.parametrize("command", ["infer", "pick"])
def test_dry_run_of_what_needs_a_checkpoint_says_that_there_is_none(lever, command):
    planned, done = lever(command, "--dry-run"), lever(command)
    assert (planned.status, done.status) == (0, 1)
    assert f"without --dry-run this stops: {done.err.removeprefix('lever: ').strip()}" in planned.out


def test_the_real_thing_has_the_places_that_the_seed_document_names(lever):
    done = lever("train", "--dataset", "okvqa_local", "--lvlm", "qwen2.5_vl_3B", "--dry-run", "--json")
    paths = done.json["paths"]
    assert paths["run"] == "results/okvqa/model_cpk/v3_RandSampler_Qwen2_5-VL-3B-Instruct"
    assert paths["rollouts"] == "results/okvqa/generated_data/rl_data_RandSampler_Qwen2_5-VL-3B-Instruct.json"
    assert done.json["config"]["lvlm"]["num_beams"] == 3


def test_quiet_leaves_results_alone(trained, lever):
    """What was asked for is printed: table and tests, epochs, paths, plan, list."""
    spoken = lever("infer", "--shots", "1", "--limit", "4", "--baselines").out
    quiet = lever("infer", "--shots", "1", "--limit", "4", "--baselines", "--quiet").out
    assert quiet == spoken[spoken.index("Official VQA accuracy") :]
    assert "(paired)" in quiet
    assert [line.split()[0] for line in lever("best-ckpt", "--show-all", "--quiet").out.splitlines()[3:7]] == [*"1234"]
    assert lever("report", "--quiet").out == f"report: {RUN}/report.html\n"
    converted = lever("convert", RUN / "grpo_epoch3.pt", "--quiet").out
    assert converted == f"converted {RUN}/grpo_epoch3.pt → {RUN}/grpo_epoch3_v2format.ckpt\n"
    assert lever("rollout", *SMALL[:2], "--quiet").out.startswith("rollouts: 24 groups, ")
    assert "\nin all: " in lever("train", "--limit", "30", "--run-name", "more", "--dry-run", "--quiet").out
    assert lever("convert", "missing.pt", "--quiet").err.startswith("lever: ")
    missing = lever("doctor", "--set", "lvlm.path=gone/model", "--quiet")
    assert missing.status == 1
    assert "missing  lvlm.path: " in missing.out


def test_verbose_adds_versions_paths_and_cache_hits(trained, lever):
    said = {}
    for name, options in (("plain", []), ("verbose", ["-v"])):
        done = lever("train", *SMALL, "--run-name", name, *options)
        assert done.status == 0, done.err
        said[name] = {line.replace(f"/{name}", "/NAME") for line in done.out.splitlines()}
    more = "\n".join(said["verbose"] - said["plain"])
    assert f"versions: torch {importlib.metadata.version('torch')}" in more
    assert "features: results/digits/cache/features_tiny-clip.safetensors (there)" in more
    assert "LVLM so far: 0 prompts asked, " in more


def test_rollout_makes_rollouts_alone(warm, lever):
    done = lever("rollout", *SMALL[:2], "--json")
    assert done.status == 0, done.err
    assert (done.json["groups"], done.json["path"]) == (24, str(ROLLOUTS))
    assert {path.name for path in (warm / "results/digits").iterdir()} == {"cache", "generated_data"}


def test_without_shots_the_demo_shows_1_2_and_4_and_infer_4():
    for command, shots in ((cli.demo, "1,2,4"), (cli.infer, "4")):
        assert inspect.signature(command).parameters["shots"].default == shots


# ---------------------------------------------------------------------- the environment


def test_a_variable_in_effect_is_printed_and_a_flag_wins_over_it(lever, monkeypatch):
    monkeypatch.setenv("GRPO_EPOCHS", "7")
    monkeypatch.setenv("KL_BETA", "0.3")
    monkeypatch.setenv("RCE_EPOCHS", "")
    done = lever("train", "--grpo-epochs", "9", "--dry-run", "--json")
    assert "from the environment: KL_BETA=0.3" in done.err
    assert "RCE_EPOCHS" not in done.err
    assert done.json["config"]["grpo"]["epochs"] == 9
    assert done.json["config"]["grpo"]["kl_beta"] == 0.3
    assert done.json["config"]["rce"]["epochs"] == 5
    done = lever("train", "--dry-run", "--json")
    assert "from the environment: GRPO_EPOCHS=7" in done.err
    assert done.json["config"]["grpo"]["epochs"] == 7


# ---------------------------------------------------------------------- one run is not another


def test_the_same_command_again_finds_everything_done(trained, lever):
    """What is no part of a run's identity may have changed."""

    def weights() -> dict:
        return {name: facts for name, facts in files_in(trained / RUN).items() if name.endswith(".pt")}

    before, everything = weights(), files_in(trained)
    assert f"run: {RUN} (there)" in lever("train", *SMALL, "--dry-run").out
    assert files_in(trained) == everything
    free = ("features.batch_size=7", "lvlm.batch_size=7", "infer.num_queries=3")
    done = lever("train", *SMALL, "--device", "cpu", "--quiet", *(f"--set={key}" for key in free))
    assert (done.status, done.err) == (0, "")
    assert [line.split()[0] for line in done.out.splitlines()] == ["rollouts:", "recommended:", "converted"]
    assert weights() == before


def test_another_config_is_refused_with_what_differs_and_another_name_is_another_run(trained, lever):
    before = files_in(trained)
    done = lever("train", *SMALL, "--seed", "1", "--set", "grpo.lr=0.5", "--json")
    assert_refused(done, 1, "seed: 0 there, 1 here", "grpo.lr", "0.5 here", "--run-name", "--overwrite")
    assert files_in(trained) == before
    done = lever("train", *SMALL, "--set", "grpo.lr=0.5", "--run-name", "bold", "--json")
    assert (done.status, done.json["run"]) == (0, "results/digits/model_cpk/bold")
    after = files_in(trained / RUN)
    assert after == {name.removeprefix(f"{RUN}/"): facts for name, facts in before.items() if str(RUN) in name}


def test_no_resume_refuses_a_run_that_is_there(trained, lever):
    before = files_in(trained)
    assert_refused(lever("train", *SMALL, "--no-resume", "--json"), 1, "--no-resume", "--overwrite")
    assert files_in(trained) == before


def test_overwrite_starts_the_run_over_and_keeps_what_is_not_its_own(trained, lever):
    (trained / RUN / "notes.txt").write_text("mine")
    (trained / RUN / "best.json").write_text("{}")
    short = (*SMALL[:2], "--rce-epochs", "1", "--grpo-epochs", "1", "--seed", "1")
    done = lever("train", *short, "--no-resume", "--overwrite", "--json")
    assert done.status == 0, done.err
    there = {path.name for path in (trained / RUN).iterdir()}
    made = {"rce_epoch1.pt", "grpo_epoch1.pt", V2.format(1), "state.pt"}
    assert {name for name in there if name.endswith((".pt", ".ckpt"))} == made
    assert "notes.txt" in there
    assert "best.json" not in there
    assert yaml.safe_load((trained / RUN / "config.yaml").read_text())["seed"] == 1


# ---------------------------------------------------------------------- best-ckpt, convert, infer


def grpo_rows(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == "grpo"]


def edit_metrics(folder: Path, changed) -> None:
    """Leave the rows of GRPO, with what `changed` says of each row."""
    text = "".join(json.dumps(row | changed(row)) + "\n" for row in grpo_rows(folder))
    (folder / RUN / "metrics.jsonl").write_text(text)


def test_best_ckpt_answers_in_json_with_the_keys_of_the_spec(trained, lever):
    answer = lever("best-ckpt", "--json").json
    best = min(grpo_rows(trained), key=lambda row: row["val_loss"])
    expected = {"strategy": "val_loss", "epoch": best["epoch"], "rows": 4, "excluded": [], "exists": True}
    expected |= {"checkpoint": str(RUN / f"grpo_epoch{best['epoch']}.pt")}
    assert {key: answer[key] for key in expected} == expected
    assert answer["metrics"]["val_loss"] == best["val_loss"]
    assert set(answer["others"]) == {"ppo_loss", "kl", "adv_std", "val_reward", "val_top_reward", "val_accuracy"}
    assert json.loads((trained / RUN / "best.json").read_text()) == answer


def test_kl_without_an_epoch_in_range_is_1_with_an_object_that_says_so(trained, lever):
    lever("best-ckpt", "--strategy", "val_loss")
    before = files_in(trained)
    edit_metrics(trained, lambda row: {"kl": 0.5})
    done = lever("best-ckpt", "--strategy", "kl", "--json")
    assert done.status == 1
    assert done.json["epoch"] is None
    assert done.json["checkpoint"] is None
    assert done.err.splitlines()[-1].startswith("lever: none in range")
    assert "nearest is epoch 1" in done.err
    after = files_in(trained)
    assert after.keys() == before.keys()
    assert after[str(RUN / "best.json")] == before[str(RUN / "best.json")]


def test_the_best_checkpoint_is_the_one_convert_and_infer_take(trained, lever):
    edit_metrics(trained, lambda row: {"adv_std": 2.0 if row["epoch"] == 2 else 1.0})
    assert lever("best-ckpt", "--strategy", "adv_std", "--json").json["epoch"] == 2
    converted = lever("convert", "--json").json
    assert converted["input"] == str(RUN / "grpo_epoch2.pt")
    assert converted["output"] == str(RUN / V2.format(2))
    assert (trained / RUN / V2.format(2)).is_file()
    inferred = lever("infer", "--shots", "1", "--limit", "4", "--json").json
    assert inferred["checkpoint"] == str(RUN / "grpo_epoch2.pt")
    assert "adv_std" in inferred["why"]


def test_show_all_prints_every_epoch_in_the_table_that_scripts_parse(trained, lever):
    done = lever("best-ckpt", "--show-all")
    lines = done.out.splitlines()
    at = lines.index("阶段3：GRPO训练")
    header = " Epoch   Train Loss     Val Loss     PPO Loss         KL    Adv Std    Adv Max     Beta"
    assert lines[at + 1] == header
    assert [line.split()[0] for line in lines[at + 3 : at + 7]] == ["1", "2", "3", "4"]
    ours = lever("best-ckpt", "--show-all", "--strategy", "val_top_reward").out.splitlines()
    assert ours[at + 1] == f"{header}  val_top_reward"
    values = [row["val_top_reward"] for row in grpo_rows(trained)]
    assert [float(line.split()[-1]) for line in ours[at + 3 : at + 7]] == pytest.approx(values, abs=1e-5)


def test_a_run_may_be_named_by_its_folder_or_by_a_log(trained, lever):
    by_options = lever("best-ckpt", "--json").json
    os.rename(trained / RUN, trained / "moved")
    by_folder = lever("best-ckpt", "moved", "--json").json
    assert by_folder["epoch"] == by_options["epoch"]
    assert by_folder["checkpoint"] == f"moved/grpo_epoch{by_options['epoch']}.pt"
    before = files_in(trained)
    by_log = lever("best-ckpt", "--log", "moved/train.log", "--json").json
    assert by_log["rows"] == 4
    assert by_log["checkpoint"] is None
    assert files_in(trained) == before


def test_a_converted_file_stands_beside_its_source_or_where_it_is_told(trained, lever):
    stem = str(RUN / "grpo_epoch3")
    assert lever("convert", f"{stem}.pt", "--json").json["output"] == f"{stem}_v2format.ckpt"
    back = lever("convert", f"{stem}_v2format.ckpt", "--to", "v3", "--json").json
    assert (back["to"], back["output"]) == ("v3", f"{stem}_v3format.pt")
    assert lever("convert", f"{stem}_v2format.ckpt", "--to", "v3", "--output", "out/there.pt").status == 0
    paths = (f"{stem}.pt", f"{stem}_v3format.pt", "out/there.pt")
    first, *others = (load_torch(trained / path)["model_state_dict"] for path in paths)
    for other in others:
        assert first.keys() == other.keys()
        assert all(first[name].equal(tensor) for name, tensor in other.items())


@pytest.mark.parametrize("to", ["v2", "v3"])
def test_convert_refuses_weights_that_no_policy_has(trained, lever, to):
    import torch

    source, states = RUN / "grpo_epoch1.pt", {"v2": "model_state_dict", "v3": "state_dict"}
    if to == "v3":
        assert lever("convert", source, "--output", "sound.ckpt").status == 0
        source = Path("sound.ckpt")
    content = torch.load(source, weights_only=True)
    key = next(key for key in content[states[to]] if key.endswith("cand_proj.weight"))
    for name, wrong in (("NaN", torch.full_like(content[states[to]][key], float("nan"))), ("PointerSelector", None)):
        state = {k: wrong if k == key else v for k, v in content[states[to]].items() if k != key or wrong is not None}
        torch.save({**content, states[to]: state}, "spoilt.pt")
        assert_refused(lever("convert", "spoilt.pt", "--to", to, "--output", "made", "--json"), 1, "spoilt.pt", name)
        assert not Path("made").exists()


def test_convert_refuses_a_file_that_is_of_the_format_already_and_writes_over_nothing_it_reads(trained, lever):
    """Its metrics would be lost on the way."""
    source = RUN / "grpo_epoch1.pt"
    assert lever("convert", source, "--output", "v2.ckpt").status == 0
    before = files_in(Path())
    assert_refused(lever("convert", source, "--to", "v3", "--json"), 1, "a v3 checkpoint already")
    assert_refused(lever("convert", "v2.ckpt", "--json"), 1, "a v2 checkpoint already")
    assert_refused(lever("convert", source, "--output", source, "--json"), 1, "--output")
    assert files_in(Path()) == before


def test_several_layers_are_converted_only_on_demand(trained, lever):
    import torch

    from lever_lm.selectors.pointer.checkpoint import save_torch, v3_content
    from lever_lm.selectors.pointer.model import PointerSelector

    torch.manual_seed(0)
    deep = PointerSelector(d_model=64, hidden_dim=64, num_layers=2)
    save_torch(trained / "deep.pt", v3_content(deep, epoch=0, phase="grpo", kl_beta=0.1, metrics={}, config={}))
    assert_refused(lever("convert", "deep.pt", "--json"), 1, "2 cross-attention layers", "--allow-truncate")
    assert not (trained / "deep_v2format.ckpt").exists()
    done = lever("convert", "deep.pt", "--allow-truncate", "--json")
    assert done.status == 0
    assert "warning" in done.err
    assert done.json["dropped"]


def test_report_after_infer_is_one_page_without_any_address(trained, lever):
    assert_refused(lever("report", "--run-name", "none", "--json"), 1, "lever infer --baselines")
    lever("infer", "--shots", "1", "--limit", "4", "--baselines")
    done = lever("report", "--json")
    page = (trained / done.json["report"]).read_text(encoding="utf-8")
    assert done.json["report"] == str(RUN / "report.html")
    assert all(word in page for word in ("img_text_sim", "data:image/jpeg;base64,"))
    assert not any(word in page for word in ("http://", "https://"))


def test_many_shots_are_listed_one_a_row_within_80_columns(trained, lever):
    done = lever("infer", "--ckpt", "latest", "--shots", "1-5", "--limit", "6")
    assert "5 shots" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines() if line[:1] in "┏┃┡│└")
    assert "…" not in done.out


def test_text_on_the_command_line_is_utf_8_whatever_the_locale(tmp_path):
    words = ["config", "show", "--json", "--set", "prompt.system=Où est 什么?"]
    done = run_lever(*words, cwd=tmp_path, LC_ALL="C", PYTHONUTF8="0")
    assert done.status == 0, done.err
    assert done.json["config"]["prompt"]["system"] == "Où est 什么?"


def test_a_terminal_that_lacks_our_characters_is_no_failure(tmp_path):
    done = run_lever("config", "show", "--set", "prompt.system=Où est 什么?", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.status, done.err) == (0, "")
    assert "system: O? est ???" in done.out


# ---------------------------------------------------------------------- where the output goes


def in_shell(text: str, cwd) -> subprocess.CompletedProcess:
    """A shell's line, in which LEVER is the command."""
    line = text.replace("LEVER", f"{sys.executable} -m lever_lm")
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=clean_environment(), capture_output=True, text=True)


def test_closed_streams_change_no_result(trained):
    done = in_shell("LEVER best-ckpt --strategy ppo_loss <&- >&- 2>&-", trained)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((trained / RUN / "best.json").read_text())["strategy"] == "ppo_loss"
    assert in_shell("LEVER best-ckpt --strategy none <&- >&- 2>&-", trained).returncode == 2
    assert [in_shell(f"LEVER config show {one}", trained).returncode for one in (">&-", "2>&-")] == [0, 0]


def test_a_reader_that_goes_away_does_not_end_a_training(warm):
    done = in_shell("set -o pipefail; LEVER train --limit 8 --rce-epochs 1 --grpo-epochs 2 | head -1", warm)
    assert (done.returncode, done.stderr) == (0, "")
    assert (warm / RUN / "grpo_epoch2.pt").is_file()


@pytest.mark.parametrize("options", ["", "--json"])
def test_output_that_cannot_be_written_is_told_and_the_choice_is_kept(trained, options):
    done = in_shell(f"LEVER best-ckpt --strategy kl {options} > /dev/full", trained)
    assert done.returncode == 1
    assert "the output: No space left on device" in done.stderr.splitlines()[-1]
    assert json.loads((trained / RUN / "best.json").read_text())["strategy"] == "kl"
