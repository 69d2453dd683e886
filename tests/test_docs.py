"""Every command and every example of the documentation, run; every link, option, key and message in it, looked up.

What runs on the embedded data runs, small; what needs the hub, a GPU or days runs as --dry-run, over data and models of
the right names. The rest, commands of others, is checked as OTHERS says. Nothing in a page goes unlooked at.
"""

import ast
import contextlib
import csv
import functools
import inspect
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import torch
import typer
import yaml
from helpers import RUN, clean_environment, small_digits
from official import hub_cache
from pages import CHECKOUT, PAGES, Part

from lever_lm.cli.commands import app
from lever_lm.cli.entrypoint import run as run_command
from lever_lm.config.load import ENVIRONMENT
from lever_lm.config.schema import DataConfig, LvlmConfig, all_keys
from lever_lm.config.values import build
from lever_lm.data import load_dataset
from lever_lm.utils.paths import asset_path

DEMO = RUN.with_name("demo")
HELD = ("--limit", "12", "--rce-epochs", "1", "--grpo-epochs", "15")  # what the demo is held to here
# What stands for something of the reader's → what it is here. The first that fits, one after the other.
STANDS_FOR = {
    r" \[(RUN_DIR|CKPT|目录)\]": "",
    r"lever (…|COMMAND)": "lever doctor",
    r"lever export( DIR)?$": f"lever export {DEMO} shared",
    r"lever config diff$": "lever config diff classic demo",
    r"\bexported\b": "shared",
    r"diff A B$": "diff classic demo",
    r"diff DIR DIR$": f"diff {DEMO} {RUN}",
    r"--icds (FILE|文件)": "--icds icds.jsonl",
    r"--data (FILE|文件)": "--data table.csv",
    r"…/grpo_epoch25\.pt|\bX\.pt": f"{DEMO}/grpo_epoch15.pt",
    r"--selector NAME": "--selector fixed_set",
    r"--against NAME(S|,NAME)": "--against mmr,dpp",
    r"lvlm\.path=DIR": "lvlm.path=model",
    r"okvqa_path=DIR": "okvqa_path=data",
    r"--results DIR": "--results elsewhere",
    r"\b(DIR|目录)": str(DEMO),
    r"/shared/results": "elsewhere",
    r"主机|HOST": "node1",
    r"--overwrite": "--overwrite --run-name seed1",
}
# Beyond the machine of a test: only the plan is made.
ELSEWHERE = re.compile(r"okvqa_|vqav2|qwen2\.5_vl_[37]B|--server|hub:")
# What a command of a test may lack, told by --dry-run.
LACKING = ("hub:", "okvqa_hub", "--server", "_server", "data.name=mine")
PERSONAL = ("--install-completion", "--show-completion")  # they write to the reader's home, or ask which shell it is


# ---------------------------------------------------------------------- a reader's folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """What stands for HF_HOME: the tiny models under the names of the real ones."""
    home = tmp_path_factory.mktemp("home")
    for name in ("Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-7B-Instruct"):
        hub_cache(home, f"Qwen/{name}", "model", asset_path("asset:tiny-qwen2.5-vl"))
    hub_cache(home, "openai/clip-vit-large-patch14", "model", asset_path("asset:tiny-clip"))
    return home


def write_table(folder: Path, data: DataConfig) -> None:
    """The training questions of a data set as a table, table.csv."""
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "question", "answer"])
        rows.writerows([e.image, e.question, e.answer] for e in load_dataset(data).train_examples)


@pytest.fixture(scope="module")
def reader(trained_once, tmp_path_factory) -> Path:
    """A folder as a reader has it who ran the demo, `lever train` and `lever infer`, both small; in it the checkout's
    assets and scripts, files in OK-VQA's layout, and files that pages speak of."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(trained_once, folder, dirs_exist_ok=True)
    for name in ("lever_lm", "scripts", "constraints.txt"):
        (folder / name).symlink_to(CHECKOUT / name)
    small_digits(folder / "data", train=24, val=8)
    write_table(folder, DataConfig("data", str(folder / "data"), str(folder / "data")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in os.environ.keys() - clean_environment().keys():
            patch.delenv(name)
        assert run_command(app, ["demo", *HELD, "--shots", "4", "--quiet"]) == 0
        assert run_command(app, ["infer", "--limit", "4", "--shots", "1", "--baselines", "--quiet"]) == 0
    shutil.copy(folder / "results/digits/inference/demo/icds.jsonl", folder / "icds.jsonl")
    shutil.copy(next(folder.glob("results/digits/generated_data/*_demo.json")), folder / "rl_data.json")
    torch.save(torch.randn(2504, 16, generator=torch.Generator().manual_seed(0)), folder / "embeddings.pt")
    return folder


@pytest.fixture
def run(reader, hub, monkeypatch, capsys):
    """Runs the words after `lever` in the reader's folder; asserts that it was done; returns what was said."""
    import huggingface_hub

    monkeypatch.chdir(reader)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub / "hub"))
    for name in ("OKVQA_PATH", "COCO_PATH", "VQAV2_PATH"):
        monkeypatch.setenv(name, str(reader / "data"))

    def lever(words: list[str], where: object = "") -> str:
        capsys.readouterr()
        status = run_command(app, words)
        out, err = capsys.readouterr()
        assert status == 0, f"{where}\nran as: lever {shlex.join(words)}\n{out[-1500:]}{err[-3000:]}"
        return out + err

    return lever


def words_of(command: str) -> list[str]:
    """The words of a `lever` command as they are run here: placeholders filled in, and held small."""
    for placeholder, value in STANDS_FOR.items():
        command = re.sub(placeholder, value, command)
    words = shlex.split(command)
    words = words[1:] if words[0] == "lever" else words[words.index("lever_lm") + 1 :]
    if ELSEWHERE.search(command) and words[0] != "doctor":
        return words if "--dry-run" in words else [*words, "--dry-run"]
    if words[:1] == ["demo"]:
        return [*words, *HELD, "--shots", "4"]
    training = {"--limit": "24", "--rce-epochs": "2", "--grpo-epochs": "4"}  # as helpers.SMALL: what is there is kept
    held = {"infer": {"--limit": "4"}, "diagnose": {"--limit": "4"}, "rollout": {"--limit": "24"}, "train": training}
    missing = held.get(words[0], {})
    if "--config" in words or "--from-run" in words or "--embeddings" in words:
        missing = {}
    elif "--rl-data" in words:
        missing = dict(zip(HELD[::2], HELD[1::2], strict=True))
    elif "--selector" in words:
        missing = {"--limit": "8", "--rce-epochs": "1"}
        words += ["--set", "rollout.infoscore_candidates=4"] if "lever_lm" in words else []
    elif words[0] == "train" and "--run-name" in words:
        missing = {"--limit": "8", "--rce-epochs": "1", "--grpo-epochs": "1"}
    return [*words, *(word for pair in missing.items() if pair[0] not in words for word in pair)]


# ---------------------------------------------------------------------- commands of others


@functools.cache
def usage(path: Path) -> str:
    """What a Python script of ours says with --help; in this process, which has imported what takes seconds."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [str(path), "--help"])
        patch.syspath_prepend(str(path.parent))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code, path
    return out.getvalue()


def script_exists(words: list[str]) -> None:
    """A script of ours is there, its shell is sound, or its --help names the options. build_commands.py has none: what
    it makes is compared below."""
    path = CHECKOUT / next(word for word in words if word.startswith(("scripts/", "tests/")))
    if path.suffix == ".sh":
        subprocess.run(["bash", "-n", str(path)], check=True)
    elif path.name != "build_commands.py":
        said = re.findall(r"--[\w-]+", usage(path))
        unknown = [word for word in words if word.startswith("--") and word not in said]
        assert not unknown, f"{path.name} has no {unknown}"
    if "-m" in words:
        assert f"{words[-1]}:" in (CHECKOUT / "pyproject.toml").read_text()


def of_the_users_document(words: list[str]) -> None:
    """tests/test_seed_document.py runs it: its first words stand in the users' document."""
    document = (CHECKOUT / "tests/data/grpo_50_epochs.zh.md").read_text(encoding="utf-8")
    assert " ".join(words[:2]) in document
    script_exists(words) if any(word.startswith("scripts/") for word in words) else None


def variables(words: list[str]) -> None:
    """Every exported variable is one that we, or the hub's client, read."""
    known = {*ENVIRONMENT, "LEVER_LM_CHECKPOINT_PATH", "RL_DATA_PATH", "HF_HUB_OFFLINE"}
    assert {word.partition("=")[0] for word in words[1:]} <= known


def of_the_hub(words: list[str]) -> None:
    """What is fetched is what a config names."""
    configs = "".join(path.read_text() for path in (CHECKOUT / "configs").rglob("*.yaml")) + pages.sayings()
    assert re.search(rf"{re.escape(words[-1])}(?![\w-])", configs), words[-1]


def serves(words: list[str]) -> None:
    """A model of a config, and JSON where JSON is taken."""
    of_the_hub(words[:3])
    assert all(isinstance(json.loads(word), dict) for word in words if word.startswith("{"))
    assert json.loads(words[words.index("--limit-mm-per-prompt") + 1])["image"] == 9
    budget = {"shortest_edge": LvlmConfig.min_pixels, "longest_edge": LvlmConfig.max_pixels}
    assert json.loads(words[words.index("--mm-processor-kwargs") + 1]) == {"size": budget}


def nothing(words: list[str]) -> None:
    """A command of others, with nothing of ours in it."""


# How a command that is not ours begins → how it is checked.
OTHERS = {
    "bash scripts/train_v3.sh": of_the_users_document,
    "bash scripts/inference.sh": of_the_users_document,
    "bash scripts/": script_exists,
    "python scripts/find_best_checkpoint.py": of_the_users_document,
    "python scripts/convert_v3_to_v2_format.py": of_the_users_document,
    "python scripts/": script_exists,
    "python tests/": script_exists,
    "python -m pytest": nothing,
    "pip install": nothing,
    "hf download": of_the_hub,
    "vllm serve": serves,
    "export": variables,
    "ruff": nothing,
    "source .venv": nothing,
    "docker run --shm-size": nothing,
    'ps aux | grep "lever train"': nothing,
    "ps aux": of_the_users_document,
    "ls grpo_epoch*.pt": nothing,
    "cp grpo_epoch25.pt": of_the_users_document,
    "tensorboard --logdir": nothing,
    "git clone": nothing,
    "cd lever_lm": nothing,
}


def check_other(part: Part) -> None:
    """Check a command that is not ours."""
    known = next((start for start in OTHERS if part.text.startswith(start)), None)
    assert known, f"{part}: nothing says how this is checked: OTHERS"
    OTHERS[known](shlex.split(part.text))


def launched(words: list[str]) -> list[str]:
    """torchrun's own parser takes its part; ours is what is left."""
    from torch.distributed.run import get_args_parser

    arguments = get_args_parser().parse_args(words[1:])
    assert (arguments.module, arguments.training_script) == (True, "lever_lm")
    return arguments.training_script_args


# ---------------------------------------------------------------------- the pages, walked

_done: set[tuple] = set()


def essence(part: Part) -> tuple:
    """What of a step makes it another one: the words as they are run, code without its comments."""
    if part.language == "python":
        return ("python", ast.dump(ast.parse(part.text)))
    return tuple(words_of(part.text)) if part.text.startswith("lever ") else (part.text,)


def walk(part: Part, run) -> None:
    """Do what a step of a page says; what was done on a page before is not done again."""
    if essence(part) in _done:
        return
    do(part, run)
    _done.add(essence(part))


def do(part: Part, run) -> None:
    """Run a step of a page, or check it."""
    if part.language == "python":
        exec(compile(part.text, f"{part.page}:{part.line}", "exec"), {"__name__": "example"})
    elif part.language == "yaml":
        name = re.findall(r"`([\w./]+\.yaml)`", "\n".join(pages.text_of(part.page).splitlines()[: part.line]))[-1]
        build(yaml.safe_load(part.text))
        Path(name).write_text(part.text)
    elif part.language == "json":
        from lever_lm.training.rollouts.file_format import load_groups

        Path("example.json").write_text(part.text)
        assert all(len(group.sequences) == len(group.rewards) > 1 for group in load_groups("example.json"))
    elif part.text.startswith("torchrun "):
        launched(shlex.split(part.text))
        run(words_of(part.text), part)
    elif not part.text.startswith("lever "):
        check_other(part)
    elif not part.text.endswith(PERSONAL):
        words = words_of(part.text)
        said = run(words, part)
        if "--dry-run" in words and not any(word in part.text for word in LACKING):
            assert "missing  " not in said, f"{part}\n{said}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CONTRIBUTING.md"])
def test_what_a_page_says_can_be_done(page, run):
    for part in pages.steps(page):
        walk(part, run)


# ---------------------------------------------------------------------- the examples of CONTRIBUTING

EXAMPLE = re.compile(r"# (?P<file>[\w./]+)(?:, (?P<end>at its end)|, before: (?P<before>.+))?\n")
LINES = 30
DRIVER = """
import runpy, shlex, sys
from lever_lm.cli.commands import app
from lever_lm.cli.entrypoint import run
for line in sys.stdin.read().splitlines():
    print("$", line, flush=True)
    program, *words = shlex.split(line)
    if program == "python":
        runpy.run_path(words[0], run_name="__main__")
    elif status := run(app, words):
        sys.exit(status)
"""


def apply(part: Part, root: Path) -> Path:
    """Do to a checkout what the first line of a block says: a file, what is added at its end, or before which line."""
    head = EXAMPLE.match(part.text)
    assert head, f"{part}: its first line names no file"
    path, body = root / head["file"], part.text[head.end() :]
    if head["end"]:
        path.write_text(f"{path.read_text(encoding='utf-8')}\n\n{body}", encoding="utf-8")
    elif head["before"]:
        lines = path.read_text(encoding="utf-8").split("\n")
        places = [i for i, line in enumerate(lines) if line.strip() == head["before"].strip()]
        assert len(places) == 1, f"{part}: {len(places)} such lines in {path.name}"
        path.write_text("\n".join([*lines[: places[0]], body.rstrip("\n"), *lines[places[0] :]]), encoding="utf-8")
    else:
        assert not path.exists(), f"{part}: {path.name} is there already"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body, encoding="utf-8")
    return path


def tiny_qwen2_vl(folder: Path) -> None:
    """A random Qwen2-VL of a few thousand weights with the shipped model's tokenizer: another model than ours."""
    from lever_lm.utils.transformers_compat import import_transformers

    library, shipped = import_transformers(), asset_path("asset:tiny-qwen2.5-vl")
    ours = json.loads((shipped / "config.json").read_text())
    text = {"vocab_size": ours["text_config"]["vocab_size"], "hidden_size": 32, "intermediate_size": 32}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {name: ours["text_config"][name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 32}
    vision |= {
        name: ours["vision_config"][name] for name in ("patch_size", "spatial_merge_size", "temporal_patch_size")
    }
    tokens = {name: value for name, value in ours.items() if name.endswith("_token_id") and isinstance(value, int)}
    torch.manual_seed(0)
    config = library.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    library.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    for path in shipped.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, folder)


@pytest.fixture(scope="module")
def extended(trained_once, hub, tmp_path_factory) -> subprocess.CompletedProcess:
    """A copy of the checkout to which CONTRIBUTING's examples were added, and its commands, run there."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(CHECKOUT / "lever_lm", root / "lever_lm", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (root / "lever_lm/assets").symlink_to(asset_path("asset:digits").parent)
    shutil.copytree(CHECKOUT / "configs", root / "configs")
    shutil.copytree(trained_once / "results/digits/cache", root / "results/digits/cache")
    tiny_qwen2_vl(root / "model")
    lines = []
    for part in pages.steps("CONTRIBUTING.md"):
        if part.language in ("python", "yaml"):
            made = apply(part, root)
            if made.parent.name == "scripts":
                lines.append(f"python {made.relative_to(root)}")
        elif part.text.startswith("lever "):
            lines.append(re.sub(r"lvlm\.path=DIR", "lvlm.path=model", part.text))
    environment = clean_environment(PYTHONPATH=str(root), HF_HUB_OFFLINE="1", HF_HOME=str(hub))
    return subprocess.run(
        [sys.executable, "-c", DRIVER],
        input="\n".join(lines),
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_each_example_is_short_and_ends_in_a_command():
    sections = pages.text_of("CONTRIBUTING.md").split("\n## Adding ")[1:]
    assert [section.split("\n")[0] for section in sections] == [
        "a dataset",
        "a sampler",
        "a task",
        "an LVLM",
        "a selector",
        "a loss or a reward",
        "a policy variant",
    ]
    for section in sections:
        code = re.findall(r"^```(?:python|yaml)\n# [^\n]*\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        assert 0 < sum(bool(line.strip()) for block in code for line in block.splitlines()) <= LINES
        assert "```bash\nlever " in section


def test_the_examples_of_contributing_work(extended):
    assert extended.returncode == 0, extended.stdout[-2000:] + extended.stderr[-3000:]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("lever doctor --dataset fruit", "train examples: 40 usable"),
        ("lever rollout --dataset fruit", "rollouts: 4 groups"),
        ("lever rollout --sampler img_and_text_sampler --limit 8", "rollouts: 8 groups"),
        ("lever rollout --dataset digits_exact --limit 8 --run-name exact", "rollouts: 8 groups"),
        ("lever rollout --limit 2 --set lvlm.path=model", r"rollouts: 2 groups, \d\d rollouts, mean accuracy"),
        ("lever train --limit 8 --rce-epochs 1 --grpo-epochs 1 --run-name cispo", "grpo_epoch1"),
        ("lever infer --run-name short", r"varied.*\d\.\d\d"),
        (
            "lever train --limit 8 --rce-epochs 1 --grpo-epochs 1 --run-name mean",
            "v2 cannot express .*state_update=mean",
        ),
    ],
)
def test_what_each_example_adds_is_there(extended, command, said):
    parts = extended.stdout.split("$ ")
    found = [part for part in parts if part.startswith(command)]
    assert len(found) == 1, extended.stdout
    assert re.search(said, found[0]), found[0]


def test_other_commands_of_contributing():
    for part in pages.steps("CONTRIBUTING.md"):
        if part.language not in ("python", "yaml") and not part.text.startswith("lever "):
            check_other(part)


# ---------------------------------------------------------------------- words


def every_option() -> set[str]:
    """Of all commands."""
    found, queue = {"--version", "--help", "-h", "--install-completion", "--show-completion"}, []
    queue.append(typer.main.get_command(app))
    while queue:
        command = queue.pop()
        queue += getattr(command, "commands", {}).values()
        found |= {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    return found


# Options of others that pages name outside of a command.
FOREIGN_OPTIONS = {"--limit-mm-per-prompt", "--max-model-len", "--dtype", "--compile", "--exhaustive"}


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_a_page_names_is_there(page):
    found = every_option() | FOREIGN_OPTIONS
    parts = [part for part in pages.inline(page) if not part.text.startswith((*OTHERS, "torchrun"))]
    for part in parts:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", part.text):
            assert option in found, f"{part}: no command has {option}"


@pytest.mark.parametrize("page", PAGES)
def test_every_config_key_that_a_page_names_is_there(page):
    keys = set(all_keys())
    sections = {key.split(".")[0] for key in keys if "." in key}
    parts = [*pages.inline(page), *(part for part in pages.steps(page) if part.language == "bash")]
    for part in parts:
        for key in re.findall(rf"(?<![\w./-])((?:{'|'.join(sections)})\.[a-z_]+)\b(?!\()", part.text):
            assert key in keys or key.endswith((".py", ".yaml", ".json")), f"{part}: no config key {key}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for link in pages.links(page):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        path = (CHECKOUT / page).parent / name if name else CHECKOUT / page
        assert path.exists(), f"{page}: {link}"
        if anchor:
            target = str(path.resolve().relative_to(CHECKOUT))
            assert anchor in pages.anchors(target), f"{page}: {link} of {sorted(pages.anchors(target))}"


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_says_what_it_holds(page):
    assert {part.language for part in pages.blocks(page)} <= pages.LANGUAGES
    assert pages.text_of(page).count("\n```") == 2 * len(pages.blocks(page))


def test_every_message_in_troubleshooting_is_one_of_ours():
    messages = [part for part in pages.blocks("docs/troubleshooting.md") if part.language == "message"]
    quoted = [
        part for part in pages.inline("docs/troubleshooting.md") if re.fullmatch(r"[A-Za-z]+( [a-z_]+){2,}", part.text)
    ]
    quoted = [part for part in quoted if not part.text.startswith(pages.STARTS)]
    assert len(messages) > 10
    assert len(quoted) > 4
    for part in (*messages, *quoted):
        assert part.text.strip() in pages.sayings(), f"{part}: nothing says so"


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_every_page_is_reached_from_a_readme(page):
    reached = {link.split("#")[0] for readme in ("README.md", "README.zh-CN.md") for link in pages.links(readme)}
    assert page in reached


def test_the_readme_is_short_and_begins_with_what_it_is():
    lines = pages.text_of("README.md").splitlines()
    assert len(lines) <= 130
    first = "\n".join(lines[:50])
    assert first.index("bash scripts/demo.sh") < first.index("bash scripts/test.sh") < first.index("report.png")


def test_the_page_of_commands_is_up_to_date(script):
    made = script("build_commands").page()
    assert made == pages.text_of("docs/commands.md"), "run: python scripts/build_commands.py"


def test_the_page_of_selectors_has_every_name_and_from_where_it_chooses():
    from lever_lm.selectors import ANY_POLICY, FROM_FILE, SELECTORS, ZERO_SHOT

    rows = re.findall(r"^\| `(\w+)` \|.* \| (all|pool|none) \| ", pages.text_of("docs/selectors.md"), re.MULTILINE)
    place = {True: "pool", False: "all"}
    known = {name: place[one.pool] for name, one in SELECTORS.items() if name not in (ANY_POLICY, FROM_FILE)}
    assert dict(rows) == known | {ZERO_SHOT: "none"}
    assert len(rows) == len(known)


def test_the_page_of_selectors_has_their_constants():
    from lever_lm.selectors import diverse, lever_lm, mmices
    from lever_lm.selectors.fixed_set import presence_scores
    from lever_lm.training.losses import epr_loss

    assert (diverse.MMR_WEIGHT, diverse.DPP_SCALE, diverse.DPP_NEAR, mmices.NEAR) == (0.5, 0.1, 100, 200)
    sizes = inspect.signature(lever_lm.LeverLM).parameters
    assert (sizes["num_layers"].default, sizes["hidden_dim"].default) == (2, 512)
    assert inspect.signature(presence_scores).parameters["prior"].default == 4
    assert [inspect.signature(epr_loss).parameters[name].default for name in ("top", "bottom")] == [5, 5]


def test_the_glossary_names_files_and_keys_that_are_there():
    rows = re.findall(r"^\| (.+?) \| .+ \| (.+?) \|$", pages.text_of("docs/glossary.md"), re.MULTILINE)[2:]
    assert len(rows) > 40
    terms = [term for term, _ in rows]
    assert terms == sorted(terms, key=lambda term: term.lower().lstrip("βτ, "))
    assert len(terms) == len(set(terms))
    for term, where in rows:
        for name in re.findall(r"`([\w/]+\.py|configs/[\w/.]*|\w+/)`", where):
            assert (CHECKOUT / "lever_lm" / name).exists() or (CHECKOUT / name).exists(), f"{term}: {name}"
