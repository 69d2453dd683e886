"""The policy against the lineage's golden vectors, against torch's own attention, and against enumeration.

B queries, K candidates, G rollouts, S shots, D embedding.
"""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import CHECKOUT
from safetensors.torch import load_file

from lever_lm.selectors.pointer.model import MASKED_LOGIT, PointerSelector
from lever_lm.training.grpo import best_rollouts
from lever_lm.training.losses import grpo_loss, rce_loss
from lever_lm.training.rewards import group_advantage

GOLDEN = CHECKOUT / "tests/data" / "policy"
CASES = sorted(file.stem for file in GOLDEN.glob("*.json"))


def golden(name):
    """(facts, tensors, the policy with the golden weights) of one case."""
    facts = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    config = facts["config"]
    policy = PointerSelector(
        d_model=config["d_model"],
        hidden_dim=config["hidden_dim"],
        num_layers=config["num_layers"],
        num_heads=config["num_heads"],
        state_update="gate" if config["gated"] else "none",
    ).eval()
    policy.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    return facts, tensors, policy


def grad_norms(policy, loss):
    """Gradient norm of the loss: over all parameters, and of each."""
    policy.zero_grad()
    loss.backward()
    norms = {name: float(p.grad.norm()) for name, p in policy.named_parameters() if p.grad is not None}
    return math.sqrt(sum(norm**2 for norm in norms.values())), norms


def assert_gradient(policy, loss, expected):
    total, norms = grad_norms(policy, loss)
    assert total == pytest.approx(expected["grad_norm"], rel=1e-4, abs=1e-6)
    for name, norm in (expected.get("grad_norm_per_param") or {}).items():
        assert norms[name] == pytest.approx(norm, rel=1e-4, abs=1e-6), name


def make(update="none", *, d_model=6, hidden_dim=8, seed=0, **kwargs):
    torch.manual_seed(seed)
    policy = PointerSelector(d_model=d_model, hidden_dim=hidden_dim, state_update=update, **kwargs).eval()
    with torch.no_grad():  # biases start at zero, where a wrong one would not show
        for name, parameter in policy.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return policy


def inputs(batch=2, pool=5, d_model=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, d_model, generator=generator), torch.randn(batch, pool, d_model, generator=generator)


# ---------------------------------------------------------------------- golden vectors


def test_all_twelve_golden_cases_are_here():
    assert len(CASES) == 12


@pytest.mark.parametrize("name", CASES)
def test_golden_logits_and_log_probs(name):
    _, t, policy = golden(name)
    with torch.no_grad():
        logits = policy.logits(t["query_emb"], t["cand_emb"], t["beam_labels"][:, 0])
        log_probs = policy.log_prob(t["query_emb"], t["cand_emb"], t["beam_labels"])
    torch.testing.assert_close(logits, t["logits_teacher_forced_beam0"], rtol=0, atol=1e-5)
    torch.testing.assert_close(log_probs, t["log_probs_per_beam"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_golden_greedy_picks_and_their_logits(name):
    facts, t, policy = golden(name)
    picks = policy.select(t["query_emb"], t["cand_emb"], facts["config"]["shot_num"])
    assert picks.tolist() == t["predictions"].tolist()
    with torch.no_grad():
        logits = policy.logits(t["query_emb"], t["cand_emb"], picks)
    torch.testing.assert_close(logits, t["logits_greedy"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_golden_supervised_loss_of_the_first_beam(name):
    facts, t, policy = golden(name)
    log_prob = policy.log_prob(
        t["query_emb"], t["cand_emb"], t["beam_labels"][:, :1], label_smoothing=facts["config"]["label_smoothing"]
    )
    # The lineage's supervised loss is the mean over queries and steps.
    loss = -float(log_prob.detach().mean()) / facts["config"]["shot_num"]
    assert loss == pytest.approx(facts["sft_ce_loss_beam0"], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_golden_rce_loss_and_gradient(name):
    facts, t, policy = golden(name)
    compared = 0
    for expected in facts["rce"]:
        ranked = expected.get("use_rank_normalization", False)
        if ranked and facts["config"]["ties"]:
            continue
        log_probs = policy.log_prob(
            t["query_emb"], t["cand_emb"], t["beam_labels"], label_smoothing=facts["config"]["label_smoothing"]
        )
        if expected.get("use_top1_only"):
            # The lineage's "top 1" is the first rollout of the list, and the mean over steps.
            loss = -log_probs[:, 0].mean() / facts["config"]["shot_num"]
        elif ranked:
            # The lineage ranks into [0, 1], ours into [−1, 1]: twice the range at twice the temperature.
            rewards = group_advantage(t["rewards"], method="rank")
            loss = rce_loss(log_probs, rewards, None, 2 * expected["temperature"])
        else:
            loss = rce_loss(log_probs, t["rewards"], None, expected["temperature"])
        assert float(loss.detach()) == pytest.approx(expected["loss"], rel=1e-4), expected
        assert_gradient(policy, loss, expected)
        compared += 1
    assert compared == (4 if facts["config"]["ties"] else 7)


@pytest.mark.parametrize("name", CASES)
def test_golden_advantages(name):
    facts, t, _ = golden(name)
    torch.testing.assert_close(group_advantage(t["rewards"]), t["advantage_zscore"], rtol=1e-4, atol=1e-5)
    if not facts["config"]["ties"]:
        torch.testing.assert_close(
            group_advantage(t["rewards"], method="rank"), t["advantage_rank"], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", CASES)
def test_golden_grpo_loss_and_gradient(name):
    facts, t, policy = golden(name)
    config = facts["config"]
    compared = 0
    for expected in facts["grpo"]:
        if expected["use_top_k"] is not None and config["ties"]:
            continue
        everything = torch.ones_like(t["rewards"], dtype=torch.bool)
        mask = best_rollouts(t["rewards"], everything, expected["use_top_k"])
        assert int(mask[0].sum()) == expected["effective_beams"]
        advantages = group_advantage(t["rewards"], mask, clip=config["advantage_clip"])
        log_probs = policy.log_prob(t["query_emb"], t["cand_emb"], t["beam_labels"])
        loss, metrics = grpo_loss(
            log_probs,
            t["old_log_probs"],
            advantages,
            mask,
            clip_epsilon=config["clip_epsilon"],
            kl_beta=config["kl_beta"],
        )
        # Sums of opposite terms: where a log-prob is −113, float32 knows a ratio to 1e-5 only.
        for metric in ("ppo_loss", "kl", "kl_loss", "mean_ratio"):
            assert float(metrics[metric]) == pytest.approx(expected[metric], rel=1e-4, abs=5e-6), metric
        assert float(loss.detach()) == pytest.approx(expected["loss"], rel=1e-4, abs=5e-6)
        assert float(advantages[mask].abs().max()) == pytest.approx(expected["max_advantage"], rel=1e-4, abs=1e-6)
        assert_gradient(policy, loss, expected)
        compared += 1
    assert compared == (1 if config["ties"] else 3)


# ---------------------------------------------------------------------- against a plain reference


def reference_logits(policy, query, candidates, sequence, real=None):
    """The maths of one query, written with torch's own attention: query (D,), candidates (K, D) → (S, K)."""
    x, e = query[None], candidates
    if policy.input_proj is not None:
        x, e = policy.input_proj(x), policy.input_proj(e)
    hidden = None if real is None else ~real[None]
    for layer, norm in zip(policy.cross_attn_layers, policy.attn_norms, strict=True):
        attended, _ = layer(x[None].transpose(0, 1), e[:, None], e[:, None], key_padding_mask=hidden)
        x = norm(attended[0] + x)
    state, cands = F.normalize(policy.query_proj(x[0]), dim=0), F.normalize(policy.cand_proj(e), dim=-1)
    taken = torch.zeros(len(e), dtype=torch.bool) if real is None else ~real
    rows = []
    for pick in sequence:
        rows.append((cands @ state / policy.temperature).masked_fill(taken, MASKED_LOGIT))
        taken = taken.clone()
        taken[pick] = True
        if policy.state_update == "gate":
            gate_module = policy.query_update_gate
            gate = torch.sigmoid(
                gate_module.weight @ torch.cat([state, cands[pick]]) + gate_module.bias,
            )
            state = F.normalize(gate * state + (1 - gate) * cands[pick], dim=0)
    return torch.stack(rows)


@pytest.mark.parametrize("update", ["none", "gate"])
@pytest.mark.parametrize(("layers", "heads", "d_model"), [(1, 1, 6), (1, 4, 6), (3, 2, 6), (2, 8, 8), (0, 1, 6)])
def test_logits_equal_those_through_torchs_own_attention(update, layers, heads, d_model):
    policy = make(update, d_model=d_model, num_layers=layers, num_heads=heads)
    query, candidates = inputs(2, 7, d_model)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    sequences = torch.tensor([[3, 0, 6], [4, 2, 1]])
    with torch.no_grad():
        ours = policy.logits(query, candidates, sequences, mask)
        theirs = [
            reference_logits(policy, query[i], candidates[i], sequences[i].tolist(), mask[i] if i else None)
            for i in range(2)
        ]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=0, atol=2e-5)


def test_attention_dropout_scales_the_value_bias_as_it_scales_the_weights():
    """Weights of which some are dropped do not sum to one."""
    policy = make(num_heads=2, dropout=0.0, attn_dropout=0.5).train()
    (query, candidates), layer = inputs(2, 5), policy.cross_attn_layers[0]
    noise = policy.draw_noise(query, candidates)
    x, c = policy.input_proj(query), policy.input_proj(candidates)
    parts = zip((x, c, c), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
    q, k, v = (F.linear(rows, weight, bias).unflatten(-1, (2, 4)) for rows, weight, bias in parts)
    weights = (torch.einsum("bns,bkns->bnk", q, k) / 2).softmax(-1) * noise.attention[0]
    attended = layer.out_proj(torch.einsum("bnk,bkns->bns", weights, v).flatten(1))
    expected = F.normalize(policy.query_proj(policy.attn_norms[0](attended + x)), dim=-1)
    torch.testing.assert_close(policy.encode(query, candidates, noise=noise)[0], expected, rtol=0, atol=1e-5)


def test_an_untrained_policy_without_attention_scores_by_cosine_over_temperature():
    torch.manual_seed(0)
    policy = PointerSelector(d_model=4, hidden_dim=4, num_layers=0, temperature=0.5).eval()
    with torch.no_grad():
        for projection in (policy.query_proj, policy.cand_proj):
            assert (projection.weight - torch.eye(4)).abs().max() < 0.06
            projection.weight.copy_(torch.eye(4))
    query = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    candidates = torch.tensor([[[1.0, 0, 0, 0], [0, 2.0, 0, 0], [-3.0, -4.0, 0, 0]]])
    with torch.no_grad():
        logits = policy.logits(query, candidates, torch.tensor([[1]]))
    torch.testing.assert_close(logits, torch.tensor([[[1.2, 1.6, -2.0]]]))


# ---------------------------------------------------------------------- padding and choosing


def test_a_masked_candidate_anywhere_in_the_pool_is_as_good_as_absent():
    policy = make("gate", num_layers=2, num_heads=2)
    query, candidates = inputs(1, 6)
    mask = torch.tensor([[True, False, True, True, False, True]])
    kept = mask[0].nonzero().flatten()
    sequences = torch.tensor([[[0, 2], [3, 1]]])  # among the kept ones
    alone = policy.log_prob(query, candidates[:, kept], sequences)
    masked = policy.log_prob(query, candidates, kept[sequences], mask)
    torch.testing.assert_close(masked, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", [1, 3, 200])
def test_pools_and_shot_numbers_of_any_size(pool):
    policy = make("gate")
    query, candidates = inputs(2, pool)
    shots = min(pool, 5)
    picks = policy.select(query, candidates, shots)
    assert picks.shape == (2, shots)
    assert torch.isfinite(policy.log_prob(query, candidates, picks.unsqueeze(1))).all()


def test_sampling_is_repeated_by_the_same_generator_and_only_by_it():
    policy = make()
    query, candidates = inputs(2, 12)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return policy.sample(query, candidates, 3, num_samples=20, temperature=5.0, generator=generator)

    assert draw(0).shape == (2, 20, 3)
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("pool", [2, 3, 4])
def test_a_beam_wider_than_there_are_sequences_returns_each_of_them_once(pool):
    policy = make()
    query, candidates = inputs(1, pool)
    sequences, log_probs, _ = policy.beams(query, candidates, 2, 50)
    assert sorted(map(tuple, sequences[0].tolist())) == sorted(itertools.permutations(range(pool), 2))
    assert torch.isfinite(log_probs).all()


def test_a_repeated_pick_is_all_but_impossible():
    policy = make()
    query, candidates = inputs(1, 5)
    log_prob = policy.log_prob(query, candidates, torch.tensor([[[2, 2]]]))
    assert float(log_prob.detach()) < -80


def test_dropout_is_drawn_in_training_and_absent_in_eval():
    policy = make(dropout=0.5, attn_dropout=0.5)
    query, candidates = inputs(2, 5)
    sequences = torch.tensor([[[0, 1]], [[2, 3]]])
    assert torch.equal(policy.log_prob(query, candidates, sequences), policy.log_prob(query, candidates, sequences))
    policy.train()
    assert not torch.equal(policy.log_prob(query, candidates, sequences), policy.log_prob(query, candidates, sequences))


def test_choosing_leaves_no_gradient_and_the_global_generator_alone():
    policy = make()
    query, candidates = inputs(1, 5)
    before = torch.get_rng_state()
    assert not policy.select(query, candidates, 2).requires_grad
    policy.sample(query, candidates, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------- shape and errors


def test_the_parameter_names_are_those_of_the_lineage():
    for name in ("p03_plain_d32_h16_L3_K64_S2_B1_nb9", "p06_gated_d32_h16_L1_K17_S4_B3_nb5"):
        _, tensors, policy = golden(name)
        theirs = {k.removeprefix("state.") for k in tensors if k.startswith("state.")}
        assert set(policy.state_dict()) == theirs


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="hidden_dim 10 is not divisible by num_heads 4"):
        PointerSelector(hidden_dim=10, num_heads=4)


@pytest.mark.parametrize("shots", [0, 4])
def test_more_shots_than_candidates_or_none_are_refused(shots):
    policy = make()
    query, candidates = inputs(2, 5)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])  # the smallest pool counts
    beams = lambda *given: policy.beams(*given[:3], 4, given[3])  # noqa: E731
    for choose in (policy.select, policy.sample, beams):
        with pytest.raises(ValueError, match=f"cannot pick {shots} shots from a pool of 3 candidates"):
            choose(query, candidates, shots, mask)
