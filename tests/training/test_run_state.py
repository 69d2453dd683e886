"""What an epoch leaves behind, and what a killed run finds again."""

import json
import math

import pytest
import torch

from lever_lm.selectors.pointer.checkpoint import load_policy
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.metrics import table_header, table_row
from lever_lm.training.reference_policy import snapshot
from lever_lm.training.run_dir import RunFolder
from lever_lm.training.run_state import Journal
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_torch_load import load_torch

INPUTS = {"rollouts": "aaaa", "features": "bbbb"}
ROUND = {"sequences": torch.tensor([[[0, 1]]]), "rewards": torch.tensor([[0.5]]), "mask": torch.tensor([[True]])}


def make():
    torch.manual_seed(0)
    policy = PointerSelector(d_model=4, hidden_dim=4, dropout=0.0)
    return policy, torch.optim.AdamW(policy.parameters(), lr=0.1)


def begin(folder, policy, inputs=None, said=None):
    folder.mkdir(exist_ok=True)
    journal = Journal(
        RunFolder(folder),
        {"policy": policy.shape, "seed": 5},
        inputs or INPUTS,
        (said if said is not None else []).append,
    )
    journal.resume()
    return journal


def step(policy, optimizer):
    loss = policy.log_prob(torch.ones(1, 4), torch.randn(1, 3, 4), torch.tensor([[[0, 1]]])).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def row(phase="grpo", epoch=1, **values):
    base = {"train_loss": 0.5, "val_loss": 1.5}
    own = {"ppo_loss": -0.25, "kl": 0.05, "adv_std": 0.9, "adv_max": 1.7, "beta": 0.12}
    return {"phase": phase, "epoch": epoch, **base, **(own if phase == "grpo" else {"temperature": 2.0}), **values}


def record(journal, policy, optimizer, rows):
    for entry in rows:
        step(policy, optimizer)
        frozen = snapshot(policy)
        extra = {"old": frozen, "reference": frozen, "beta": 0.12, "online": ROUND}
        journal.commit(entry, policy, optimizer, extra if entry["phase"] == "grpo" else {})


# ---------------------------------------------------------------------- an epoch


def test_an_epoch_leaves_state_checkpoint_metrics_and_log(tmp_path):
    policy, optimizer = make()
    said = []
    journal = begin(tmp_path, policy, said=said)
    record(journal, policy, optimizer, [row("rce"), row("grpo")])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "grpo_epoch1.pt",
        "metrics.jsonl",
        "rce_epoch1.pt",
        "state.pt",
        "train.log",
    ]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == journal.rows
    assert (tmp_path / "train.log").read_text(encoding="utf-8").splitlines() == said
    content = load_torch(tmp_path / "grpo_epoch1.pt")
    assert (content["epoch"], content["phase"], content["kl_beta"]) == (0, "grpo", 0.12)
    assert content["metrics"]["val_loss"] == 1.5
    assert content["config"]["seed"] == 5
    assert torch.equal(content["model_state_dict"]["query_proj.weight"], policy.query_proj.weight)


def test_the_log_is_the_table_that_scripts_parse(tmp_path):
    policy, optimizer = make()
    record(begin(tmp_path, policy), policy, optimizer, [row("rce"), row("grpo", train_loss=-0.00432, val_loss=5.12036)])
    assert (tmp_path / "train.log").read_text(encoding="utf-8").splitlines() == [
        "阶段2：RCE预热",
        " Epoch   Train Loss     Val Loss  Temperature",
        "-" * 45,
        "     1      0.50000      1.50000        2.000",
        "阶段3：GRPO训练",
        " Epoch   Train Loss     Val Loss     PPO Loss         KL    Adv Std    Adv Max     Beta",
        table_header("grpo")[2],
        "     1     -0.00432      5.12036     -0.25000    0.05000     0.9000     1.7000   0.1200",
    ]


def test_the_rule_is_as_wide_as_the_table():
    for phase in ("rce", "grpo"):
        _, names, rule = table_header(phase)
        assert rule == "-" * len(names)
        assert len(table_row(row(phase))) == len(names)


def test_a_missing_metric_shows_as_a_dash():
    assert table_row({"phase": "rce", "epoch": 12, "train_loss": 1.0}).split() == ["12", "1.00000", "-", "-"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", ["train_loss", "val_loss", "grad_norm"])
def test_a_metric_that_is_not_finite_is_refused_before_anything_is_written(tmp_path, metric, value):
    policy, optimizer = make()
    journal = begin(tmp_path, policy)
    record(journal, policy, optimizer, [row("grpo")])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(LeverError, match=rf"GRPO epoch 2: {metric} is {value}.*lower grpo\.lr"):
        journal.commit(row("grpo", 2, **{metric: value}), policy, optimizer, {})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert journal.done("grpo") == 1


# ---------------------------------------------------------------------- going on


def test_done_counts_the_epochs_of_a_phase(tmp_path):
    policy, optimizer = make()
    journal = begin(tmp_path, policy)
    record(journal, policy, optimizer, [row("rce"), row("rce", 2), row("grpo")])
    assert (journal.done("rce"), journal.done("grpo")) == (2, 1)
    again = begin(tmp_path, policy)
    assert (again.done("rce"), again.done("grpo")) == (2, 1)


def test_restore_gives_back_weights_optimizer_random_state_and_extra(tmp_path):
    policy, optimizer = make()
    journal = begin(tmp_path, policy)
    record(journal, policy, optimizer, [row("grpo"), row("grpo", 2)])
    drawn = torch.rand(3)  # what an unbroken run would draw next
    step(policy, optimizer)
    torch.manual_seed(99)
    fresh, fresh_optimizer = make()
    extra = begin(tmp_path, fresh).restore("grpo", fresh, fresh_optimizer)
    assert (extra["beta"], extra["online"]["rewards"].tolist()) == (0.12, [[0.5]])
    assert torch.equal(torch.rand(3), drawn)
    step(fresh, fresh_optimizer)  # the optimizer's moments are back: the next step is the same
    for name, tensor in policy.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_a_phase_that_has_not_begun_takes_the_weights_and_nothing_else(tmp_path):
    policy, optimizer = make()
    record(begin(tmp_path, policy), policy, optimizer, [row("rce")])
    fresh, fresh_optimizer = make()
    assert begin(tmp_path, fresh).restore("grpo", fresh, fresh_optimizer) is None
    assert torch.equal(fresh.query_proj.weight, policy.query_proj.weight)
    assert fresh_optimizer.state_dict()["state"] == {}


def test_what_a_kill_left_out_is_written_on_resume(tmp_path):
    policy, optimizer = make()
    record(begin(tmp_path, policy), policy, optimizer, [row("rce"), row("grpo"), row("grpo", 2)])
    whole = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    expected = load_torch(tmp_path / "grpo_epoch2.pt")
    # Killed right after the state was written: no checkpoint, no row, no line of this epoch.
    (tmp_path / "grpo_epoch2.pt").unlink()
    for name in ("metrics.jsonl", "train.log"):
        (tmp_path / name).write_bytes(whole[name][: whole[name][:-1].rindex(b"\n") + 1])
    said = []
    begin(tmp_path, policy, said=said)
    for name in ("metrics.jsonl", "train.log"):
        assert (tmp_path / name).read_bytes() == whole[name]
    mended = load_torch(tmp_path / "grpo_epoch2.pt")
    assert mended.keys() == expected.keys()
    assert {k: v for k, v in mended.items() if k != "model_state_dict"} == {
        k: v for k, v in expected.items() if k != "model_state_dict"
    }
    for name, tensor in expected["model_state_dict"].items():
        assert torch.equal(mended["model_state_dict"][name], tensor)
    assert load_policy(tmp_path / "grpo_epoch2.pt").shape == policy.shape
    assert said == [f"going on after grpo epoch 2 in {tmp_path}"]


def test_finished_checkpoints_are_not_written_again(tmp_path):
    policy, optimizer = make()
    record(begin(tmp_path, policy), policy, optimizer, [row("grpo"), row("grpo", 2)])
    stamps = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*_epoch*.pt")}
    inodes = {p.name: p.stat().st_ino for p in tmp_path.glob("*_epoch*.pt")}
    record(begin(tmp_path, policy), policy, optimizer, [row("grpo", 3)])
    for name, stamp in stamps.items():
        assert (tmp_path / name).stat().st_mtime_ns == stamp
        assert (tmp_path / name).stat().st_ino == inodes[name]


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({**INPUTS, "rollouts": "xxxx"}, "the rollouts of the run"),
        ({**INPUTS, "features": "xxxx"}, "the features of the run"),
        ({"rollouts": "x", "features": "y"}, "the rollouts and features of the run"),
    ],
)
def test_changed_inputs_are_refused_by_name(tmp_path, inputs, named):
    policy, optimizer = make()
    record(begin(tmp_path, policy), policy, optimizer, [row("rce")])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(
        LeverError, match=rf"{named} .* have changed since it was begun; .*--run-name NAME.*--overwrite"
    ):
        begin(tmp_path, policy, inputs=inputs)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"broken", b"PK\x03\x04"])
def test_a_broken_state_is_refused_by_name(tmp_path, content):
    policy, _ = make()
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(LeverError, match=r"state\.pt"):
        begin(tmp_path, policy)


def test_the_state_is_data_not_code(tmp_path):
    policy, optimizer = make()
    record(begin(tmp_path, policy), policy, optimizer, [row("grpo")])
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    assert content["epoch"] == 1
    assert content["inputs"] == INPUTS
