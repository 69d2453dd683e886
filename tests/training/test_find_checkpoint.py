"""Which checkpoint of a run is meant, and whether it fits the features that it is to be used with."""

import json

import pytest
import torch

from lever_lm.selectors.pointer.checkpoint import save_torch, v3_content
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.training.find_checkpoint import find_checkpoint, load_for
from lever_lm.training.run_dir import RunFolder
from lever_lm.utils.errors import LeverError

ROWS = [{"phase": "rce", "epoch": i, "val_loss": 1.0, "val_reward": 0.9} for i in (1, 2)]
ROWS += [
    {"phase": "grpo", "epoch": i + 1, "val_loss": loss, "kl": 0.05, "val_reward": reward}
    for i, (loss, reward) in enumerate([(3.0, 0.1), (1.0, 0.2), (2.0, 0.7), (4.0, 0.3)])
]


def put_rows(run, rows) -> None:
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def put_best(run, epoch: int, strategy: str = "val_loss", **more) -> None:
    name = f"where/it/was/grpo_epoch{epoch}.pt"
    run.best.write_text(json.dumps({"checkpoint": name, "strategy": strategy, "phase": "grpo", "epoch": epoch, **more}))


@pytest.fixture
def run(tmp_path):
    """A run folder of two RCE and four GRPO epochs: 3 is best by val_reward, 2 by val_loss."""
    run = RunFolder(tmp_path)
    put_rows(run, ROWS)
    for row in ROWS:
        run.checkpoint(row["phase"], row["epoch"]).write_bytes(b"weights")
    return run


def test_a_named_checkpoint_wins_over_everything(run):
    put_best(run, 2)
    named = run.checkpoint("rce", 1)
    environ = {"LEVER_LM_CHECKPOINT_PATH": str(run.checkpoint("grpo", 3))}
    assert find_checkpoint(run, str(named), environ) == (named, "named by --ckpt")


def test_the_environment_wins_over_best_json_but_not_over_a_flag(run):
    put_best(run, 2)
    environ = {"LEVER_LM_CHECKPOINT_PATH": str(run.checkpoint("grpo", 3))}
    path, why = find_checkpoint(run, None, environ)
    assert path == run.checkpoint("grpo", 3)
    assert "LEVER_LM_CHECKPOINT_PATH" in why
    assert find_checkpoint(run, "best", environ)[0] == run.checkpoint("grpo", 2)
    assert find_checkpoint(run, "latest", environ)[0] == run.checkpoint("grpo", 4)
    assert find_checkpoint(run, None, {"LEVER_LM_CHECKPOINT_PATH": " "})[0] == run.checkpoint("grpo", 2)


def test_best_json_names_the_checkpoint_also_in_a_moved_folder(run):
    put_best(run, 2, "adv_std")
    path, why = find_checkpoint(run, None, {})
    assert path == run.checkpoint("grpo", 2)
    assert "best.json" in why
    assert "adv_std" in why


def test_without_best_json_the_largest_val_reward_is_best(run):
    path, why = find_checkpoint(run, None, {})
    assert path == run.checkpoint("grpo", 3)
    assert "val_reward" in why


def test_where_val_reward_was_not_logged_the_least_val_loss_is_best(run):
    put_rows(run, [{k: v for k, v in row.items() if k != "val_reward"} for row in ROWS])
    path, why = find_checkpoint(run, None, {})
    assert path == run.checkpoint("grpo", 2)
    assert "val_loss" in why


def test_a_best_json_whose_checkpoint_is_gone_is_passed_over_and_said(run):
    put_best(run, 77)
    path, why = find_checkpoint(run, None, {})
    assert path == run.checkpoint("grpo", 3)
    assert "best.json names grpo_epoch77.pt, which is gone" in why


@pytest.mark.parametrize("content", ["not json", "[]", '{"epoch": 3}', '{"checkpoint": 3, "strategy": "kl"}', ""])
def test_a_broken_best_json_is_named(run, content):
    run.best.write_text(content)
    with pytest.raises(LeverError, match=r"best\.json.*lever best-ckpt"):
        find_checkpoint(run, None, {})


def test_a_choice_among_fewer_epochs_than_there_are_now_is_said_to_be_stale(run):
    put_best(run, 2, rows=4)
    assert "again" not in find_checkpoint(run, None, {})[1]
    put_best(run, 2, rows=3)
    path, why = find_checkpoint(run, None, {})
    assert path == run.checkpoint("grpo", 2)
    assert "3 of 4" in why
    assert "`lever best-ckpt` again" in why


def test_a_choice_of_an_epoch_that_broke_is_said_to_be_one(run):
    put_best(run, 3, "val_reward")
    put_rows(run, [{**row, "kl": float("nan")} if row["epoch"] == 3 else row for row in ROWS])
    path, why = find_checkpoint(run, None, {})
    assert path == run.checkpoint("grpo", 3)
    assert "an epoch that broke" in why
    run.best.unlink()
    assert find_checkpoint(run, None, {})[0] == run.checkpoint("grpo", 4)


def test_the_latest_is_by_number_and_grpo_comes_after_rce(run):
    run.checkpoint("grpo", 10).write_bytes(b"weights")
    assert run.latest_checkpoint() == run.checkpoint("grpo", 10)
    for path in run.path.glob("grpo_*"):
        path.unlink()
    assert run.latest_checkpoint() == run.checkpoint("rce", 2)
    for path in run.path.glob("rce_*"):
        path.unlink()
    with pytest.raises(LeverError, match="lever train"):
        run.latest_checkpoint()


def test_a_missing_checkpoint_says_who_named_it(run):
    with pytest.raises(LeverError, match=r"gone\.pt.*--ckpt"):
        find_checkpoint(run, "gone.pt", {})
    with pytest.raises(LeverError, match=r"gone\.pt.*LEVER_LM_CHECKPOINT_PATH"):
        find_checkpoint(run, None, {"LEVER_LM_CHECKPOINT_PATH": "gone.pt"})


# ---------------------------------------------------------------------- the checkpoint and its features


@pytest.mark.parametrize(
    ("key", "value", "refused"),
    [
        (None, None, None),
        ("encoder", "other@0123", r"other@0123.*tiny-clip"),
        ("features", "query_img_icd_img", r"query_img_icd_img.*query_img_text_icd_img_text"),
    ],
)
def test_features_of_another_encoder_or_setting_are_refused(tmp_path, digits_config, key, value, refused):
    from lever_lm.data.embeddings import encoder_fingerprint

    policy = PointerSelector(d_model=64, hidden_dim=8).eval()
    own = {"encoder": encoder_fingerprint(digits_config.features.encoder), "features": digits_config.features.name}
    own |= {key: value} if key else {}
    content = v3_content(policy, epoch=0, phase="grpo", kl_beta=0.1, metrics={}, config=own)
    save_torch(tmp_path / "a.pt", content)
    if refused:
        with pytest.raises(LeverError, match=refused):
            load_for(tmp_path / "a.pt", digits_config)
    else:
        loaded = load_for(tmp_path / "a.pt", digits_config)
        assert torch.equal(loaded.query_proj.weight, policy.query_proj.weight)
