"""Several processes of one torchrun job: each answers its share, and what they make is what one process makes.

The jobs are real ones: torchrun, gloo, two processes on the CPU.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CHECKOUT, INFERENCE, ROLLOUTS, Done, answers_in, clean_environment, files_in, run_here

from lever_lm.utils.console import Screen
from lever_lm.utils.device import resolve_device
from lever_lm.utils.distributed import Shards
from lever_lm.utils.errors import LeverError

JOB = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "1",
    "WORLD_SIZE": "3",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
CACHE = Path("results/digits/cache")
# Answers, log-probs and a search that hangs on the log-probs before; many batches.
ROLLOUT = ("rollout", "--limit", "4", "--set", "rollout.gt_prob=true", "--set", "rollout.infoscore=1")
ROLLOUT = (*ROLLOUT, "--set", "rollout.infoscore_candidates=4", "--set", "lvlm.batch_size=16")
PROBED = ("rollout", "--limit", "8", "--set", "rollout.probe=3", "--seed", "1")  # in two steps
PROBED = (*PROBED, "--run-name", "probed")
ANSWERS = ("rollout", "--limit", "8", "--set", "lvlm.batch_size=16")  # answers alone
INFER = ("infer", "--limit", "8", "--shots", "2", "--baselines")


def torchrun(*command, cwd: Path, timeout: int = 200) -> Done:
    """A job of two processes: `-m lever_lm …`, or a script with its arguments."""
    job = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job += map(str, command)
    path = os.pathsep.join([str(CHECKOUT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = clean_environment(PYTHONPATH=path)
    done = subprocess.run(job, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    return Done(done.returncode, done.stdout, done.stderr)


def made_in(folder: Path) -> set[str]:
    """All files but those of image features, which each process writes for its share of the images, and the digests,
    which a process that knows them already does not write."""
    return {name for name in files_in(folder) if "/vision_" not in name and not name.endswith("/digests.json")}


@pytest.fixture
def rank_1(monkeypatch):
    """This process is one of a job."""
    for variable, value in JOB.items():
        monkeypatch.setenv(variable, value)


# ---------------------------------------------------------------------- which process this is


def test_torchrun_says_which_process_this_is():
    assert Shards.from_environment(JOB) == Shards(rank=1, world=3, local=0)
    assert not Shards.from_environment(JOB).leader
    assert Shards.from_environment({**JOB, "RANK": "0"}).leader
    assert Shards.from_environment({**JOB, "LOCAL_WORLD_SIZE": "8"}).neighbours == 8


NO_JOB = [{"WORLD_SIZE": "abc"}, {"RANK": "3"}, {"RANK": "-1"}, {"LOCAL_RANK": "x"}]
NO_JOB += [{name: ""} for name in JOB if name != "LOCAL_RANK"]


@pytest.mark.parametrize("odd", NO_JOB, ids=str)
def test_leaked_variables_and_such_that_make_no_sense_are_no_job(odd):
    assert Shards.from_environment({**JOB, **odd}) == Shards()


@pytest.mark.parametrize(("world", "count"), [(1, 5), (2, 5), (3, 9), (4, 2), (2, 0), (2, 8), (4, 40), (8, 96)])
def test_work_is_dealt_so_that_all_have_as_much_to_do(world, count):
    sizes = list(range(count, 0, -1))
    shares = [Shards(rank, world).share(sizes) for rank in range(world)]
    assert sorted((size for share in shares for size in share), reverse=True) == sizes
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(share == sorted(share, reverse=True) for share in shares)
    if count % (2 * world) == 0:
        assert len({sum(share) for share in shares}) == 1


def test_alone_nothing_is_waited_for():
    alone, made = Shards(), []
    alone.wait()
    with alone.leader_first():
        made.append("first")
    assert alone.from_leader(lambda: made.append("second") or 7) == 7
    assert made == ["first", "second"]
    alone.leave()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "call", [lambda job: job.wait(), lambda job: job.from_leader(dict)], ids=["wait", "from leader"]
)
def test_a_process_that_ended_is_missed_in_one_line(monkeypatch, call):
    def fail(*_):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:1453. Good luck!")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", fail)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", fail)
    with pytest.raises(LeverError) as caught:
        call(Shards(1, 3))
    assert str(caught.value).startswith("rank 1 of 3 has lost the others (Connection closed by peer [10.0.0.7]:1453): ")


@pytest.fixture
def two_gpus(monkeypatch) -> list:
    """Two GPUs, as far as torch says; the devices that became its current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(("name", "expected"), [("auto", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")])
def test_each_process_of_a_host_gets_a_gpu_in_turn(monkeypatch, two_gpus, name, expected):
    assert resolve_device("auto") == torch.device("cuda")
    assert two_gpus == []
    for variable, value in {**JOB, "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(variable, value)
    assert resolve_device(name) == torch.device(expected)
    assert two_gpus == ([torch.device(expected)] if name == "auto" else [])


def test_a_gpu_that_is_not_there_is_named(two_gpus):
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(LeverError, match="'cuda:2', but torch sees 2 GPUs"):
        resolve_device("cuda:2")


def test_only_the_leader_talks(monkeypatch, capsys, rank_1):
    screen = Screen()
    screen.say("a line")
    screen.table("a title", ["method"], [["a cell"]])
    assert list(screen.track([1, 2], "a bar", 2)) == [1, 2]
    assert tuple(capsys.readouterr()) == ("", "")
    monkeypatch.setenv("RANK", "0")
    Screen(to_stderr=True).say("a line")
    assert "a line" in capsys.readouterr().err


def test_what_one_process_does_is_refused_under_torchrun(lever, monkeypatch, tmp_path, rank_1):
    for command in ("train", "demo", "best-ckpt", "convert", "report", "diagnose"):
        refused = lever(command)
        assert refused.status == 2
        assert refused.err.startswith("[rank 1] lever: ")
        assert f"`lever {command} …` plainly" in refused.err
    assert files_in(tmp_path) == {}
    monkeypatch.delenv("MASTER_ADDR")  # leaked variables
    assert "torchrun" not in lever("best-ckpt").err


# ---------------------------------------------------------------------- two processes

PARTS = """
import json, sys, time
from pathlib import Path
from lvlm_helpers import Counting
from lever_lm.data import Example
from lever_lm.utils.errors import LeverError
from lever_lm.lvlm import CachedLvlm, Prompt
from lever_lm.lvlm.answer_cache import AnswerCache
from lever_lm.utils.distributed import Shards

job, folder = Shards.from_environment(), Path(sys.argv[1])
facts = {"job": [job.rank, job.world, job.local]}
image = folder / "image.jpg"

if job.leader:
    time.sleep(0.5)
    image.write_bytes(b"an image")
job.wait()
facts["image there"] = image.is_file()
with job.leader_first():
    facts["left by the leader"] = (folder / "left").is_file()
    (folder / "left").touch()
facts["from the leader"] = job.from_leader(lambda: {"rank": job.rank})

class Backend(Counting):
    def batches(self, prompts, answers=None):
        job.wait()  # it may be a call of the whole job
        return super().batches(prompts, answers)

prompts = [Prompt((), Example(i, i, f"q{i:02}", ("a",), ("a",), str(image))) for i in range(11)]
made = []
def load(prompts):
    made.append(Backend())
    return made[-1]
lvlm = CachedLvlm(load, "model-1", AnswerCache(folder / "answers.sqlite", job), lambda items, what, total: items)
facts["nothing"] = [lvlm.generate([]), len(made)]
facts["one batch"] = [lvlm.generate(prompts[:2]), made[0].asked]
facts["all"] = [lvlm.generate(prompts + prompts[:3]), made[0].asked, lvlm.asked, lvlm.known]
facts["known"] = [lvlm.generate(prompts[::-1]), made[0].asked]
facts["log-probs"] = [lvlm.answer_log_prob(prompts[:6], ["yes"] * 6), made[0].asked]
facts["speed"] = lvlm.speed
try:
    lvlm.generate(prompts[: 5 + job.rank])
except LeverError as error:
    facts["others"] = str(error)
(folder / f"facts{job.rank}.json").write_text(json.dumps(facts))
job.wait()
"""
COMMANDS = """
from lever_lm.cli import commands

leave, Shards.leave = Shards.leave, lambda job: None
for words in json.loads(sys.argv[2]):
    sys.argv[1:] = words
    try:
        commands.main()
    except SystemExit as ended:
        assert ended.code == 0
leave(job)
"""


@pytest.fixture(scope="module")
def job(trained_once, tmp_path_factory) -> tuple[Done, Path, Path]:
    """One job that does first PARTS and then the commands: what it said, and the folders of the two."""
    parts, two = (tmp_path_factory.mktemp(name) for name in ("parts", "two"))
    shutil.copytree(trained_once / "results", two / "results")
    (parts / "job.py").write_text(PARTS + COMMANDS)
    commands = json.dumps([[*words, "--json"] for words in (ROLLOUT, PROBED, INFER)])
    return torchrun(parts / "job.py", parts, commands, cwd=two), parts, two


def test_two_processes_deal_the_batches_and_both_have_all_answers(job):
    done, parts, _ = job
    assert done.status == 0, done.err
    leader, other = (json.loads((parts / f"facts{rank}.json").read_text()) for rank in range(2))
    assert (leader["job"], other["job"]) == ([0, 2, 0], [1, 2, 1])
    assert (leader["left by the leader"], other["left by the leader"]) == (False, True)
    answers = [f"q{i:02} a, and more" for i in range(11)]
    for facts in (leader, other):
        assert facts["image there"], "it waited for the leader"
        assert facts["from the leader"] == {"rank": 0}
        assert facts["nothing"] == [[], 0]
        assert facts["one batch"][0] == answers[:2]
        assert facts["all"][0] == answers + answers[:3]
        assert facts["known"][0] == answers[::-1]
        assert facts["log-probs"][0] == [-3.123456] * 6
    one, two = ([f"q{i:02}" for i in numbers] for numbers in ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10]))
    assert leader["one batch"][1] == one[:2]
    assert other["one batch"][1] == [], "there was one batch for two processes"
    assert (leader["all"][1:], other["all"][1:]) == ([one, 6, 2], [two, 5, 2])
    assert (leader["known"][1], other["known"][1]) == (one, two), "nothing is asked again"
    assert (leader["log-probs"][1], other["log-probs"][1]) == ([*one, *one[:4]], [*two, "q04", "q05"])
    assert leader["speed"] == other["speed"] > 0
    assert "others" not in leader
    assert "rank 1 would ask other prompts" in other["others"]
    assert {path.name for path in parts.glob("answers*")} == {"answers.sqlite"}


MANY = """
import os, socket, sys
from pathlib import Path
import torch.distributed  # once, and not in every process
from lever_lm.data import Example
from lever_lm.lvlm import CachedLvlm, Prompt
from lever_lm.lvlm.answer_cache import AnswerCache
from lever_lm.lvlm.protocol import Backend
from lever_lm.utils.distributed import Shards
from lever_lm.utils.progress import untracked

class Echo(Backend):
    def batches(self, prompts, answers=None):
        return [list(range(start, min(start + 3, len(prompts)))) for start in range(0, len(prompts), 3)]

    def ask(self, prompts, batches, answers=None, *, end=False):
        for batch in batches:
            (folder / f"batch{batch[0]}").open("x").close()
            yield batch, [prompts[i].query.question for i in batch]

def work():
    job = Shards.from_environment()
    prompts = [Prompt((), Example(i, i, f"q{i}", ("a",), ("a",), None)) for i in range(100)]
    lvlm = CachedLvlm(lambda prompts: Echo(), "model-1", AnswerCache(folder / "answers.sqlite", job), untracked)
    assert lvlm.generate(prompts) == [f"q{i}" for i in range(100)]
    (folder / f"asked{job.rank}").write_text(str(lvlm.asked))
    job.wait()
    job.leave()

folder, world = Path(sys.argv[1]), sys.argv[2]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
os.environ |= {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
started = []
for rank in range(int(world)):  # each has what torchrun would give it
    if not (child := os.fork()):
        os.environ["RANK"] = str(rank)
        try:
            work()
        except BaseException as error:
            print(rank, repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    started.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started))
"""


@pytest.mark.parametrize("processes", [4, 8])
def test_any_number_of_processes_deal_the_batches_among_themselves(tmp_path, processes):
    command = [sys.executable, "-c", MANY, str(tmp_path), str(processes)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    asked = [int((tmp_path / f"asked{rank}").read_text()) for rank in range(processes)]
    assert sum(asked) == 100
    assert max(asked) - min(asked) <= 3, "a batch"
    assert len(list(tmp_path.glob("batch*"))) == 34, "each once, as a second would find the file"
    assert {path.name for path in tmp_path.glob("answers*")} == {"answers.sqlite"}


def test_a_process_that_fails_says_who_it_is(lever, digits_folder, monkeypatch, rank_1):
    monkeypatch.setattr(Shards, "wait", lambda job: None)
    monkeypatch.setattr(Shards, "from_leader", lambda job, make: make())
    done = lever("rollout", "--limit", "4", "--set", "data.okvqa_path=nowhere", "--json")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("[rank 1] lever: ")
    assert "a defect of lever_lm" not in done.err
    assert not (digits_folder / ROLLOUTS).exists()


# ---------------------------------------------------------------------- the commands


def test_rollouts_and_inference_of_two_processes_are_those_of_one(job, lever, trained):
    done, _, two = job
    alone = [lever(*words, "--json") for words in (ROLLOUT, PROBED, INFER)]
    assert [one.status for one in alone] == [0, 0, 0], "".join(one.err for one in alone)
    assert done.status == 0, done.err
    assert done.out == "".join(one.out for one in alone), "a line each, of the leader"
    made = {name for name in files_in(trained) if name.startswith(str(INFERENCE))}
    made |= {str(ROLLOUTS), str(ROLLOUTS.with_stem(f"{ROLLOUTS.stem}_probed"))}
    assert len(made) == 2 * 7 + 2 + 2
    assert all((two / name).read_bytes() == (trained / name).read_bytes() for name in made)
    assert made_in(two) == made_in(trained)
    assert answers_in(two) == answers_in(trained)
    assert done.err.count("data: digits") == 3
    assert done.err.count("(rollout.probe)") == alone[1].err.count("(rollout.probe)") == 1
    assert "the share of rank 0 of 2" in done.err
    assert "Warning" not in done.err


@pytest.mark.slow
def test_choices_of_a_file_are_answered_by_two_processes_as_by_one(lever, trained, tmp_path_factory):
    assert lever(*INFER, "--json").status == 0
    next((trained / INFERENCE).rglob("icds.jsonl")).rename(trained / "mine.jsonl")
    two = tmp_path_factory.mktemp("two")
    shutil.copytree(trained, two, dirs_exist_ok=True)
    command = ("infer", "--icds", "mine.jsonl", "--shots", "2", "--limit", "12", "--json")
    alone, done = lever(*command), torchrun("-m", "lever_lm", *command, cwd=two)
    assert done.status == 0, done.err
    assert done.json == alone.json


@pytest.mark.slow
def test_two_processes_make_everything_from_an_empty_folder(lever, tmp_path, tmp_path_factory):
    two = tmp_path_factory.mktemp("two")
    alone, done = lever(*ROLLOUT, "--json"), torchrun("-m", "lever_lm", *ROLLOUT, "--json", cwd=two)
    assert done.status == 0, done.err
    assert done.json == alone.json
    same = {name for name in made_in(tmp_path) if not name.endswith(".sqlite")}
    assert same == {str(ROLLOUTS), str(CACHE / "features_tiny-clip.safetensors")}
    assert all((two / name).read_bytes() == (tmp_path / name).read_bytes() for name in same)


# ---------------------------------------------------------------------- killed

KILLED = """
import os, signal, time
from pathlib import Path
from lever_lm.cli import commands as cli
from lever_lm.lvlm.answer_cache import AnswerCache

put, done = AnswerCache.put, []
def stopping(self, items):
    put(self, items)
    done.append(len(items))
    if os.environ["RANK"] == "0" and len(done) == 3:
        Path("three").touch()
        time.sleep(120)  # until torchrun ends it
    if os.environ["RANK"] == "1" and len(done) == 2:
        while not Path("three").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
AnswerCache.put = stopping
cli.main()
"""


def test_after_a_kill_the_rest_is_asked_and_the_result_is_the_unbroken_one(features_file, tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    for folder in (unbroken, killed):
        (folder / CACHE).mkdir(parents=True)
        shutil.copy2(features_file, folder / CACHE)
    assert run_here(*ANSWERS, cwd=unbroken).status == 0
    (killed / "killed.py").write_text(KILLED)
    done = torchrun("killed.py", *ANSWERS, cwd=killed)
    assert done.status != 0
    assert "SIGKILL" in done.err
    assert not (killed / ROLLOUTS).exists()
    for rank, count in ((0, 48), (1, 32)):
        with sqlite3.connect(killed / CACHE / f"answers_tiny-qwen2_5-vl.rank{rank}.sqlite") as db:
            assert db.execute("SELECT count(*) FROM answers").fetchone()[0] == count
        db.close()
    again, total = run_here(*ANSWERS, cwd=killed), answers_in(unbroken)
    assert again.status == 0, again.err
    assert f"{total - 80} prompts to ask, 80 known" in again.out
    assert (killed / ROLLOUTS).read_bytes() == (unbroken / ROLLOUTS).read_bytes()
    assert answers_in(killed) == total
    assert [path.name for path in (killed / CACHE).glob("answers_*")] == ["answers_tiny-qwen2_5-vl.sqlite"]
