"""Checkpoints of the learnt selectors beside the policy: the file keeps every pick, and what is none is refused."""

import resource

import pytest
import torch

from lever_lm.selectors.fixed_set import FixedSet
from lever_lm.selectors.learned import choose
from lever_lm.selectors.lever_lm import LeverLM
from lever_lm.selectors.pointer.checkpoint import load_policy, read_checkpoint, save_torch, to_v2, v3_content
from lever_lm.selectors.pointer.hub_format import write_exported
from lever_lm.selectors.pointer.model import PointerSelector
from lever_lm.utils.errors import LeverError

WIDTH, EXAMPLES = 6, 5


def made(kind, width=WIDTH, examples=EXAMPLES):
    """A selector whose every weight is its own."""
    torch.manual_seed(4)
    policy = {
        "epr": lambda: PointerSelector(d_model=width, hidden_dim=8, num_layers=0),
        "lever_lm": lambda: LeverLM(width, examples, hidden_dim=8, num_layers=2, num_heads=2),
        "fixed_set": lambda: FixedSet(examples),
    }[kind]()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return policy.eval()


def content_of(learner, **config):
    return v3_content(learner, epoch=0, phase="rce", kl_beta=0.0, metrics={}, config=config)


def written(path, learner, **config):
    save_torch(path, content_of(learner, **config))
    return path


KINDS = ("epr", "lever_lm", "fixed_set")


@pytest.mark.parametrize("way", ["file", "folder"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_and_an_exported_folder_give_the_same_picks_to_the_bit(tmp_path, digits_problem, kind, way):
    policy = made(kind, digits_problem.features[1].shape[1], len(digits_problem.train))
    path = tmp_path / "rce_epoch1.pt"
    if way == "file":
        written(path, policy, seed=1)
    else:
        path = tmp_path / "shared"
        path.mkdir()
        write_exported(path, policy.state_dict(), {"policy": policy.shape, "phase": "rce", "epoch": 1}, "", {})
    loaded = load_policy(path)
    assert type(loaded) is type(policy)
    assert loaded.shape == policy.shape
    assert not loaded.training
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in policy.state_dict().items())
    assert choose(loaded, digits_problem, 3) == choose(policy, digits_problem, 3)


@pytest.mark.parametrize(
    ("kind", "what"), [("epr", "num_layers=0"), ("lever_lm", "LeverLM"), ("fixed_set", "FixedSet")]
)
def test_v2_cannot_hold_them_and_says_so(kind, what):
    with pytest.raises(LeverError, match=rf"v2 cannot express.*{what}.*v3"):
        to_v2(content_of(made(kind)), "x.pt")


SPOILT = {
    "lever_lm": {
        "query_proj.weight": torch.zeros(8, 7),
        "gpt.wte.weight": torch.zeros(4, 8),
        "gpt.wpe.weight": torch.zeros(2, 8),
        "gpt.h.0.attn.c_attn.weight": torch.zeros(8),
        "query_vector": torch.zeros(()),
        "gpt.h.7.ln_1.weight": torch.zeros(8),
        "gpt.h.x.ln_1.weight": torch.zeros(8),
        "surplus": torch.zeros(1),
    },
    "fixed_set": {"scores": torch.zeros(4), "surplus": torch.zeros(1)},
    "epr": {"icd_proj.weight": torch.zeros(8, 7), "surplus": torch.zeros(1)},
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in SPOILT for name in SPOILT[kind]])
def test_weights_of_another_shape_or_name_are_refused(tmp_path, kind, name):
    content = content_of(made(kind))
    content["model_state_dict"][name] = SPOILT[kind][name]
    save_torch(tmp_path / "odd.pt", content)
    with pytest.raises(LeverError, match=r"odd\.pt"):
        load_policy(tmp_path / "odd.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_needed(tmp_path, kind):
    whole = content_of(made(kind))
    for name in whole["model_state_dict"]:
        state = {other: tensor for other, tensor in whole["model_state_dict"].items() if other != name}
        save_torch(tmp_path / "less.pt", {**whole, "model_state_dict": state})
        with pytest.raises(LeverError, match=r"less\.pt"):
            load_policy(tmp_path / "less.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, kind, value):
    policy = made(kind)
    name, tensor = next(iter(policy.state_dict().items()))
    tensor.view(-1)[0] = value
    with pytest.raises(LeverError, match=rf"NaN or infinite weights in {name}"):
        load_policy(written(tmp_path / "broken.pt", policy))


@pytest.mark.parametrize(
    ("kind", "claim"),
    [
        ("lever_lm", {"vocabulary": EXAMPLES + 1}),
        ("lever_lm", {"num_heads": 3}),
        ("lever_lm", {"num_layers": 3}),
        ("lever_lm", {"dropout": 0.1}),
        ("fixed_set", {"vocabulary": EXAMPLES - 1}),
        ("fixed_set", {"vocabulary": True}),
        ("fixed_set", {"num_heads": 2}),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path, kind, claim):
    policy = made(kind)
    path = written(tmp_path / "claims.pt", policy, policy={**policy.shape, **claim})
    with pytest.raises(LeverError, match=rf"claims\.pt does not hold the weights of a {type(policy).__name__}"):
        load_policy(path)


def test_a_model_of_few_weights_that_claims_to_be_wide_takes_no_memory(tmp_path):
    """GPT-2 layers of this width would have 12 · 200,000² weights."""
    content = content_of(made("lever_lm"))
    wide = {"query_proj.weight": (200_000, 1), "icd_proj.weight": (200_000, 1), "gpt.wte.weight": (1, 200_000)}
    content["model_state_dict"] |= {name: torch.zeros(shape) for name, shape in wide.items()}
    del content["config"]
    save_torch(tmp_path / "wide.pt", content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LeverError, match=r"wide\.pt does not hold the weights of a LeverLM"):
        load_policy(tmp_path / "wide.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("kind", ["lever_lm", "fixed_set"])
def test_a_vocabulary_of_another_training_split_is_refused_where_it_chooses(digits_problem, kind):
    policy = made(kind, digits_problem.features[1].shape[1], EXAMPLES)
    with pytest.raises(LeverError, match=rf"{EXAMPLES} examples.*{len(digits_problem.train)}.*--dataset"):
        choose(policy, digits_problem, 2)


def test_features_of_another_width_and_more_shots_than_places_are_refused(digits_problem):
    width, count = digits_problem.features[1].shape[1], len(digits_problem.train)
    with pytest.raises(LeverError, match=r"features\.encoder"):
        choose(made("lever_lm", width + 1, count), digits_problem, 2)
    with pytest.raises(LeverError, match="--shots"):
        choose(made("lever_lm", width, count), digits_problem, 65)


def test_what_is_read_is_what_was_written(tmp_path):
    content = read_checkpoint(written(tmp_path / "rce_epoch1.pt", made("fixed_set"), warmup="fixed_set", lvlm_calls=7))
    assert content["config"] == {"policy": {"vocabulary": EXAMPLES}, "warmup": "fixed_set", "lvlm_calls": 7}
