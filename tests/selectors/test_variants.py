"""The policy's variants, all 36 of them, against equations written out in numpy, against enumeration, and at work.

B queries, K candidates, G rollouts, S shots, D embedding, H hidden; O options, K and with `stop` one more. Everything
but the training at the end is in float64, so that a tolerance of 1e-9 tells one formula from another.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from lever_lm.selectors.pointer.checkpoint import infer_shape, load_policy, save_torch, to_v2, to_v3, v3_content
from lever_lm.selectors.pointer.model import MASKED_LOGIT, PointerSelector
from lever_lm.selectors.pointer.variants import VARIANTS
from lever_lm.utils.errors import LeverError
from lever_lm.utils.safe_torch_load import load_torch

CHOICES = {
    "state_update": ("none", "gate", "gru"),
    "scorer": ("dot", "additive", "bilinear"),
    "diversity": ("none", "mmr"),
    "stop": (False, True),
}
EVERY = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
EXACT = {"rtol": 0, "atol": 1e-9}


def name_of(variant):
    return "-".join("stop" if value is True else str(value) for value in variant.values() if value is not False)


# Nine in which every two values of two options meet: the parts know nothing of one another.
PAIRED = [
    dict(zip(CHOICES, (update, scorer, ("none", "mmr")[(i + j) % 2], (i - j) % 3 == 1), strict=True))
    for i, update in enumerate(CHOICES["state_update"])
    for j, scorer in enumerate(CHOICES["scorer"])
]
every_variant = pytest.mark.parametrize("variant", EVERY, ids=name_of)
paired_variants = pytest.mark.parametrize("variant", PAIRED, ids=name_of)
with_stop = pytest.mark.parametrize("variant", [v for v in PAIRED if v["stop"]], ids=name_of)


def make(variant, *, d_model=3, hidden_dim=4, num_layers=1, temperature=0.5, seed=0, **kwargs):
    """A policy in float64 whose every weight matters: nothing zero, symmetric or the identity."""
    torch.manual_seed(seed)
    policy = PointerSelector(d_model, hidden_dim, num_layers, temperature=temperature, **kwargs, **variant)
    policy = policy.double().eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.startswith(("additive_scorer", "bilinear_scorer", "query_update")):
                parameter.normal_(std=0.8)
            elif name.endswith("bias") or name == "mmr_penalty.weight":
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return policy


def inputs(batch=2, pool=5, d_model=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, d_model, generator=generator, dtype=torch.float64)
    return query, torch.randn(batch, pool, d_model, generator=generator, dtype=torch.float64)


def possible(places, shots, stop):
    """Every sequence over these places that the policy can give, −1 after a stop."""
    lengths = range(1, shots + 1) if stop else (shots,)
    return [
        (*picks, *[-1] * (shots - length)) for length in lengths for picks in itertools.permutations(places, length)
    ]


def as_group(sequences):
    return torch.tensor(sequences).unsqueeze(0)


# ---------------------------------------------------------------------- the equations, written out


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unit(x):
    return x / np.sqrt((x * x).sum())


def written_out(policy, query, candidates, picks, real=None):
    """One query, (D,) and (K, D): the logits of each step up to the one after the last pick, as rows of O numbers.

    Only the encoding, which test_model.py holds against torch's own attention, is asked of the policy.
    """
    w = {name: tensor.detach().numpy() for name, tensor in policy.state_dict().items()}
    with torch.no_grad():
        state, cands = policy.encode(query[None], candidates[None], None if real is None else real[None])
    state, cands = state[0].numpy(), nn.functional.normalize(cands[0], dim=-1).numpy()
    free = [k for k in range(len(cands)) if real is None or real[k]]

    def score(vector):
        if policy.scorer == "dot":
            return sum(s * v for s, v in zip(state, vector, strict=True))
        if policy.scorer == "bilinear":
            weight = w["bilinear_scorer.weight"]
            return math.tanh(
                sum(state[i] * weight[i, j] * vector[j] for i in range(len(state)) for j in range(len(vector)))
            )
        both = w["additive_scorer.state.weight"] @ state + w["additive_scorer.candidate.weight"] @ vector
        hidden = [math.tanh(x) for x in both + w["additive_scorer.state.bias"]]
        return math.tanh(sum(a * b for a, b in zip(w["additive_scorer.score.weight"][0], hidden, strict=True)))

    def moved(pick):
        if policy.state_update == "gate":
            weight, bias = w["query_update_gate.weight"], w["query_update_gate.bias"]
            g = sigmoid(weight @ np.concatenate([state, pick]) + bias)
            return unit(g * state + (1 - g) * pick)
        if policy.state_update == "gru":
            x = w["query_update_gru.weight_ih"] @ pick + w["query_update_gru.bias_ih"]
            h = w["query_update_gru.weight_hh"] @ state + w["query_update_gru.bias_hh"]
            (x_r, x_z, x_n), (h_r, h_z, h_n) = np.split(x, 3), np.split(h, 3)
            r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
            return unit((1 - z) * np.tanh(x_n + r * h_n) + z * state)
        return state

    rows, chosen = [], []
    for pick in [*picks, None]:
        row = []
        for k in range(len(cands)):
            value = score(cands[k])
            if policy.diversity == "mmr" and chosen:
                value -= float(w["mmr_penalty.weight"]) * max(float(cands[j] @ cands[k]) for j in chosen)
            row.append(value / policy.temperature if k in free and k not in chosen else MASKED_LOGIT)
        if policy.stop:
            row.append(score(unit(w["stop_embedding"])) / policy.temperature if chosen else MASKED_LOGIT)
        rows.append(row)
        if pick is not None:
            chosen.append(pick)
            state = moved(cands[pick])
    return rows


def log_softmax(row):
    top = max(row)
    total = top + math.log(sum(math.exp(x - top) for x in row))
    return [x - total for x in row]


def written_out_sequence(policy, query, candidates, sequence, real=None):
    """log-prob of a sequence, and the mean entropy of its steps, the decision to stop among them."""
    picks = [pick for pick in sequence if pick >= 0]
    labels = picks + [len(candidates)] * (policy.stop and 0 < len(picks) < len(sequence))
    rows = [log_softmax(row) for row in written_out(policy, query, candidates, picks, real)][: len(labels)]
    entropies = [-sum(math.exp(x) * x for x in row) for row in rows]
    return sum(row[label] for row, label in zip(rows, labels, strict=True)), sum(entropies) / max(len(entropies), 1)


def test_the_variants_tested_here_are_all_that_there_are():
    assert {option: tuple(known) for option, known in VARIANTS.items()} == {
        option: values for option, values in CHOICES.items() if option != "stop"
    }
    assert len(EVERY) == 36
    for one, other in itertools.combinations(CHOICES, 2):
        met = {(variant[one], variant[other]) for variant in PAIRED}
        assert met == set(itertools.product(CHOICES[one], CHOICES[other]))


@every_variant
def test_every_logit_is_that_of_the_equations_written_out(variant):
    policy = make(variant, num_heads=2)
    query, candidates = inputs(2, 5)
    mask = torch.tensor([[True] * 5, [True, False, True, True, True]])
    sequences = torch.tensor([[3, 0, 4], [4, 2, 0]])
    with torch.no_grad():
        ours = policy.logits(query, candidates, sequences, mask)
    theirs = [written_out(policy, query[i], candidates[i], sequences[i].tolist(), mask[i])[:3] for i in range(2)]
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), **EXACT)


@every_variant
def test_log_prob_and_entropy_of_every_sequence_are_the_sums_over_its_written_out_steps(variant):
    policy = make(variant)
    query, candidates = inputs(1, 3)
    sequences = [*possible(range(3), 3, variant["stop"]), (2, -1, -1), (-1, -1, -1)]
    with torch.no_grad():
        log_probs, entropies = policy.evaluate(query, candidates, as_group(sequences))
    expected = [written_out_sequence(policy, query[0], candidates[0], sequence) for sequence in sequences]
    torch.testing.assert_close(log_probs[0], torch.tensor([e[0] for e in expected], dtype=torch.float64), **EXACT)
    torch.testing.assert_close(entropies[0], torch.tensor([e[1] for e in expected], dtype=torch.float64), **EXACT)


def bare(degrees, temperature=0.5, **variant):
    """A policy that takes plane vectors as they are, a query along the first axis, and candidates at these angles."""
    policy = PointerSelector(2, 2, 0, temperature=temperature, **variant).double().eval()
    with torch.no_grad():
        policy.query_proj.weight.copy_(torch.eye(2))
        policy.cand_proj.weight.copy_(torch.eye(2))
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return policy, torch.tensor([[1.0, 0.0]]).double(), torch.stack([angles.cos(), angles.sin()], -1).unsqueeze(0)


def test_mmr_costs_the_likeness_to_the_nearest_pick_and_the_first_step_nothing():
    policy, query, candidates = bare([0, 90, 60, 180], diversity="mmr")
    with torch.no_grad():
        policy.mmr_penalty.weight.fill_(0.8)
        logits = policy.logits(query, candidates, torch.tensor([[0, 1, 2]]))[0]
    hidden = MASKED_LOGIT
    near = math.cos(math.radians(30))  # of 60° to the pick at 90°, nearer than the one at 0°
    expected = [
        [2.0, 0.0, 1.0, -2.0],
        [hidden, 0.0, (0.5 - 0.8 * 0.5) / 0.5, (-1 + 0.8) / 0.5],
        [hidden, hidden, (0.5 - 0.8 * near) / 0.5, -2.0],  # 180° is at a right angle to the pick at 90°
    ]
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_untrained_mmr_takes_half_the_likeness_and_an_untrained_bilinear_scorer_ranks_by_cosine():
    policy, query, candidates = bare([0, 90, 60, 180], diversity="mmr", scorer="bilinear")
    with torch.no_grad():
        logits = policy.logits(query, candidates, torch.tensor([[0, 1]]))[0]
    expected = [math.tanh(0.5) / 0.5 - 0.5, (math.tanh(-1) + 0.5) / 0.5]
    torch.testing.assert_close(logits[1, 2:], torch.tensor(expected, dtype=torch.float64), **EXACT)
    assert logits[0].argsort(descending=True).tolist() == [0, 2, 1, 3]


# ---------------------------------------------------------------------- probabilities


@paired_variants
def test_the_probabilities_of_all_sequences_sum_to_one(variant):
    policy = make(variant)
    query, candidates = inputs(1, 5)
    mask = torch.tensor([[True, True, False, True, True]])
    with torch.no_grad():
        for shots, temperature in itertools.product((1, 2, 3, 4), (1.0, 2.0)):
            group = as_group(possible((0, 1, 3, 4), shots, variant["stop"]))
            total = policy.log_prob(query, candidates, group, mask, temperature=temperature).exp().sum()
            assert float(total) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize("weight", [0.5, 12.0])
def test_they_do_so_at_any_temperature_and_under_any_penalty(temperature, weight):
    """A masked candidate's −100 is no longer the smallest logit there: it must have no share in the sum."""
    policy = make({"state_update": "none", "scorer": "dot", "diversity": "mmr", "stop": False}, temperature=0.1)
    query, candidates = inputs(1, 5)
    candidates = candidates[:, :1] + 0.01 * candidates  # near-duplicates
    with torch.no_grad():
        policy.mmr_penalty.weight.fill_(weight)
        group = as_group(possible(range(5), 3, False))
        total = policy.log_prob(query, candidates, group, temperature=temperature).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-6)


@with_stop
def test_a_short_sequence_pays_for_its_stop_once_and_a_full_one_never(variant):
    policy = make(variant)
    query, candidates = inputs(1, 4)
    with torch.no_grad():
        steps = policy.logits(query, candidates, torch.tensor([[2, 0, 3]])).log_softmax(-1)[0]
        ours = policy.log_prob(query, candidates, torch.tensor([[[2, 0, 3], [2, 0, -1], [2, -1, -1]]]))[0]
        alone = policy.log_prob(query, candidates, torch.tensor([[[2]]]))[0, 0]
    first, second, third, stop = steps[0, 2], steps[1, 0], steps[2, 3], 4
    expected = [first + second + third, first + second + steps[2, stop], first + steps[1, stop]]
    torch.testing.assert_close(ours, torch.stack(expected), **EXACT)
    torch.testing.assert_close(alone, first, **EXACT)


@pytest.mark.parametrize("variant", [v for v in EVERY if v["stop"] and v["scorer"] == "dot"], ids=name_of)
def test_the_first_step_cannot_stop_however_much_it_is_wanted(variant):
    policy = make(variant, temperature=0.01)
    query, candidates = inputs(1, 4)
    with torch.no_grad():
        policy.stop_embedding.copy_(policy.encode(query, candidates)[0][0])  # the likest of all
        logits = policy.logits(query, candidates, torch.tensor([[0]]))[0, 0]
    assert logits[-1] == MASKED_LOGIT
    generator = torch.Generator().manual_seed(0)
    drawn = policy.sample(query, candidates, 3, num_samples=300, temperature=1e6, generator=generator)
    assert (drawn[..., 0] >= 0).all()
    assert (drawn[..., 1] == -1).any()
    assert (policy.beams(query, candidates, 3, 100)[0][..., 0] >= 0).all()
    assert policy.select(query, candidates, 3)[0, 0] == logits[:4].argmax()
    if variant["state_update"] == "none" and variant["diversity"] == "none":
        assert policy.select(query, candidates, 3)[0, 1:].tolist() == [-1, -1]


@paired_variants
def test_label_smoothing_is_torchs_smoothed_cross_entropy_over_the_options(variant):
    policy = make(variant)
    query, candidates = inputs(1, 4)
    sequences = torch.tensor([[[1, 3, 0], [2, 0, -1]]])
    labels = torch.tensor([[1, 3, 0], [2, 0, 4 if variant["stop"] else -100]])  # −100: torch's "counts for nothing"
    with torch.no_grad():
        ours = policy.log_prob(query, candidates, sequences, label_smoothing=0.1)[0]
        logits = policy.logits(query.expand(2, -1), candidates.expand(2, -1, -1), sequences[0]).transpose(1, 2)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(ours, -losses.sum(-1), rtol=0, atol=1e-6)  # the share of an option, 1/O, is in float32


@paired_variants
def test_gradient_of_log_prob_and_entropy_is_right(variant):
    policy = make(variant, num_heads=2)
    query, candidates = (x.requires_grad_() for x in inputs(1, 4))
    mask = torch.tensor([[True, True, True, False]])
    sequences = torch.tensor([[[0, 2, 1], [2, -1, -1]]])
    names, weights = zip(*policy.named_parameters(), strict=True)
    policy.forward = policy.evaluate

    def evaluate(query, candidates, *weights):
        state = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(policy, state, (query, candidates, sequences, mask))

    assert torch.autograd.gradcheck(evaluate, (query, candidates, *weights), atol=1e-6, fast_mode=True)
    gradients = torch.autograd.grad(evaluate(query, candidates, *weights)[0].sum(), weights)
    assert [name for name, gradient in zip(names, gradients, strict=True) if gradient.abs().max() < 1e-9] == []


# ---------------------------------------------------------------------- padding and batches


@paired_variants
def test_padding_the_pool_changes_nothing(variant):
    policy = make(variant, num_layers=2, num_heads=2)
    query, candidates = inputs(2, 4)
    padded = torch.cat([candidates, torch.full((2, 3, 3), 50.0).double()], 1)
    mask = torch.tensor([[True] * 4 + [False] * 3] * 2)
    sequences = torch.tensor([[[0, 1, 2], [3, 0, -1]], [[2, 3, 1], [-1, -1, -1]]])
    options = {"label_smoothing": 0.1, "temperature": 1.5}
    plain = policy.evaluate(query, candidates, sequences, **options)
    with_padding = policy.evaluate(query, padded, sequences, mask, **options)
    for ours, theirs in zip(with_padding, plain, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    assert torch.equal(policy.select(query, padded, 4, mask), policy.select(query, candidates, 4))
    for width in (3, 100):
        ours, theirs = policy.beams(query, padded, 3, width, mask), policy.beams(query, candidates, 3, width)
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1:], theirs[1:], **EXACT)


# ---------------------------------------------------------------------- choosing


@paired_variants
def test_select_is_the_largest_logit_step_by_step(variant):
    policy, shots = make(variant), 5
    query, candidates = inputs(8, 5)
    picks = policy.select(query, candidates, shots)
    for i in range(8):
        prefix = []
        while len(prefix) < shots:
            with torch.no_grad():
                logits = policy.logits(query[i : i + 1], candidates[i : i + 1], torch.tensor([[*prefix, 0]]))
            choice = int(logits[0, -1].argmax())
            if choice == 5:
                break
            prefix.append(choice)
        assert picks[i].tolist() == prefix + [-1] * (shots - len(prefix))
        assert len(set(prefix)) == len(prefix) >= 1
    for fewer in range(1, shots):
        assert torch.equal(policy.select(query, candidates, fewer), picks[:, :fewer])


@paired_variants
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_samples_come_with_the_probability_that_log_prob_gives_them(variant, temperature):
    policy = make(variant)
    query, candidates = inputs(1, 4)
    mask = torch.tensor([[True, False, True, True]])
    count, every = 4000, possible((0, 2, 3), 3, variant["stop"])
    generator = torch.Generator().manual_seed(0)
    options = {"num_samples": count, "temperature": temperature, "generator": generator}
    drawn = policy.sample(query, candidates, 3, mask, **options)[0]
    with torch.no_grad():
        expected = policy.log_prob(query, candidates, as_group(every), mask, temperature=temperature)[0].exp()
    found = (drawn.unsqueeze(1) == torch.tensor(every)).all(-1)
    assert found.any(-1).all()  # nothing was drawn that is not among them: no repeat, no padding, no pick after a stop
    spread = (expected * (1 - expected) / count).sqrt()
    assert ((found.double().mean(0) - expected).abs() <= 5 * spread + 1e-3).all()


@paired_variants
def test_beams_wide_enough_are_all_sequences_likeliest_first(variant):
    policy = make(variant)
    query, candidates = inputs(2, 4)
    mask = torch.tensor([[True, False, True, True], [True, True, True, False]])
    sequences, log_probs, probs = policy.beams(query, candidates, 3, 1000, mask)
    for i in range(2):
        every = as_group(possible(mask[i].nonzero().flatten().tolist(), 3, variant["stop"]))
        with torch.no_grad():
            scores = policy.log_prob(query[i : i + 1], candidates[i : i + 1], every, mask[i : i + 1])[0]
        scores, order = scores.sort(descending=True)
        torch.testing.assert_close(log_probs[i], scores, **EXACT)
        assert sequences[i].tolist() == every[0][order].tolist()
        for sequence, total in list(zip(sequences[i].tolist(), probs[i].tolist(), strict=True))[::3]:
            picks = [pick for pick in sequence if pick >= 0]
            rows = written_out(policy, query[i], candidates[i], picks, mask[i])
            labels = picks + [4] * (len(picks) < 3)
            steps = [math.exp(log_softmax(row)[label]) for row, label in zip(rows[: len(labels)], labels, strict=True)]
            assert total == pytest.approx(sum(steps), abs=1e-9)


@paired_variants
def test_a_pool_in_another_order_gives_the_same_picks_at_their_new_places(variant):
    policy = make(variant)
    query, candidates = inputs(2, 5)
    order = torch.tensor([3, 0, 4, 2, 1])
    place = order.argsort()  # candidate k stands at place[k] of candidates[:, order]
    picks = policy.select(query, candidates, 4)
    assert torch.equal(policy.select(query, candidates[:, order], 4), torch.where(picks < 0, -1, place[picks]))


# ---------------------------------------------------------------------- checkpoints and after_input


def content_of(policy):
    return v3_content(policy.float(), epoch=0, phase="rce", kl_beta=0.0, metrics={}, config={})


def assert_same_policy(ours, theirs):
    query, candidates = (x.float() for x in inputs(2, 5))
    sequences = torch.tensor([[3, 0, 4], [1, 2, 0]])
    with torch.no_grad():
        assert torch.equal(ours.logits(query, candidates, sequences), theirs.logits(query, candidates, sequences))


@paired_variants
def test_a_v3_file_gives_the_policy_back_with_our_config_and_without(tmp_path, variant):
    policy = make(variant, temperature=0.1, num_layers=2)
    content = content_of(policy)
    save_torch(tmp_path / "whole.pt", content)
    loaded = load_policy(tmp_path / "whole.pt")
    assert loaded.shape == policy.shape
    assert {option: loaded.shape[option] for option in CHOICES} == variant
    assert_same_policy(loaded, policy)

    del content["config"], content["format"]
    save_torch(tmp_path / "bare.pt", content)
    inferred = load_policy(tmp_path / "bare.pt")
    assert inferred.shape == policy.shape
    assert_same_policy(inferred, policy)
    shape = {"d_model": 3, "hidden_dim": 4, "num_layers": 2, "num_heads": 1, **variant}
    assert infer_shape(content["model_state_dict"], 1) == shape


@paired_variants
def test_v2_refuses_what_it_cannot_express_by_name_and_takes_the_rest(tmp_path, variant):
    path = tmp_path / "grpo_epoch1.pt"
    policy = make(variant, temperature=0.1)
    save_torch(path, content_of(policy))
    unknown = {"state_update": "gru", "scorer": "additive bilinear", "diversity": "mmr", "stop": "True"}
    named = [f"{option}={value}" for option, value in variant.items() if str(value) in unknown[option].split()]
    if not named:
        save_torch(tmp_path / "back.pt", to_v3(to_v2(load_torch(path), path)[0], path))
        assert_same_policy(load_policy(tmp_path / "back.pt"), policy)
        return
    with pytest.raises(LeverError) as caught:
        to_v2(load_torch(path), path)
    assert f"v2 cannot express a policy with {', '.join(named)};" in str(caught.value)
    with pytest.raises(LeverError, match="v2 cannot express"):
        to_v2(load_torch(path), path, allow_truncate=True)


@pytest.mark.parametrize(
    ("option", "said", "held"),
    [(option, *pair) for option, values in CHOICES.items() for pair in itertools.permutations(values, 2)],
)
def test_weights_of_another_variant_than_the_file_says_are_refused(tmp_path, option, said, held):
    content = content_of(make({option: held}))
    content["config"]["policy"][option] = said
    save_torch(tmp_path / "mixed.pt", content)
    with pytest.raises(LeverError, match=rf"mixed.pt does not hold the weights of a PointerSelector with .*{option}"):
        load_policy(tmp_path / "mixed.pt")


@pytest.mark.parametrize("option", sorted(set(CHOICES) - {"stop"}))
def test_an_unknown_variant_is_refused_with_the_known_ones(option):
    with pytest.raises(ValueError, match=f"unknown {option} 'lstm'; choose one of {', '.join(CHOICES[option])}$"):
        PointerSelector(**{option: "lstm"})


@paired_variants
@pytest.mark.parametrize("size", [2, 40], ids=["in two products", "in one"])
@pytest.mark.parametrize("training", [False, True])
def test_projected_once_the_features_give_what_the_policy_makes_of_them(variant, size, training):
    policy = make(variant, d_model=12, dropout=0.4, attn_dropout=0.3).train(training)
    query, candidates = inputs(size, 5, d_model=12)
    sequences = torch.tensor([[[0, 1, 2], [4, 3, -1]]]).expand(size, -1, -1)
    inner, queries, icds = policy.project(query, candidates.flatten(0, 1))
    noise = policy.draw_noise(query, candidates)
    ours = inner.log_prob(queries, icds.view(size, 5, -1), sequences, noise=noise)
    torch.testing.assert_close(ours, policy.log_prob(query, candidates, sequences, noise=noise), **EXACT)
    assert (ours != ours.roll(1, 0)).any()
    again = inner.project(queries, icds)  # what is projected already stays as it is
    assert torch.equal(again[1], queries)
    assert torch.equal(again[2], icds)


@paired_variants
def test_the_noise_is_what_a_pass_would_have_drawn(variant):
    policy = make(variant, num_layers=2, dropout=0.4, attn_dropout=0.3).train()
    query, candidates = inputs(3, 5)
    sequences = torch.tensor([[[0, 1, 2], [4, 3, -1]]]).expand(3, -1, -1)
    torch.manual_seed(5)
    drawn = policy.log_prob(query, candidates, sequences)
    torch.manual_seed(5)
    noise = policy.draw_noise(query, candidates)
    assert torch.equal(policy.log_prob(query, candidates, sequences, noise=noise), drawn)
    for mask, p in ((noise.attention[1], 0.3), (noise.query, 0.4), (noise.candidates, 0.4)):
        assert sorted(set(mask.flatten().tolist())) == [0.0, pytest.approx(1 / (1 - p))]
    torch.manual_seed(5)  # seeded numbers are printed: they are bernoulli_'s
    for mask, p in ((noise.attention[0], 0.3), (noise.attention[1], 0.3), (noise.query, 0.4), (noise.candidates, 0.4)):
        assert torch.equal(mask > 0, torch.empty(mask.shape).bernoulli_(1 - p) > 0)

    policy.eval()
    nothing = policy.draw_noise(query, candidates)
    assert (nothing.attention, nothing.query, nothing.candidates) == ([None, None], None, None)


# ---------------------------------------------------------------------- what a variant can learn


class TypedPools:
    """Pools of three candidates of type A, then three of type B, in float32; the reward is 1 for one word of types.

    A candidate is its type's direction plus noise, which differs from pool to pool and is the same for all of its
    type: what is left to learn is the word, not a favourite among the equals.
    """

    EACH = 3

    def __init__(self, word):
        self.sequences = torch.tensor(list(itertools.permutations(range(2 * self.EACH), len(word))))
        types = torch.tensor(["AB".index(letter) for letter in word])
        self.rewards = (self.sequences // self.EACH == types).all(-1).float()

    def pools(self, count, generator):
        types = 0.3 * torch.randn(count, 2, 6, generator=generator)
        types[:, 0, 0] += 1
        types[:, 1, 1] += 1
        query = 0.3 * torch.randn(count, 6, generator=generator)
        query[:, 2] += 1
        return query, types.repeat_interleave(self.EACH, 1)

    def expected_rewards(self, policy, query, candidates):
        """The exact expected reward of each pool, (B,), from all ordered sequences."""
        group = self.sequences.unsqueeze(0).expand(len(query), -1, -1)
        return (policy.log_prob(query, candidates, group).exp() * self.rewards).sum(-1)

    def learned(self, **variant):
        """What a policy trained on the log of the expected reward earns on new pools, (64,)."""
        torch.manual_seed(0)
        policy = PointerSelector(6, 16, dropout=0, attn_dropout=0, **variant)
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)
        generator = torch.Generator().manual_seed(1)
        for _ in range(150):
            loss = -(self.expected_rewards(policy, *self.pools(16, generator)) + 1e-9).log().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            return self.expected_rewards(policy.eval(), *self.pools(64, generator))


# Equal candidates are equally likely: with α the probability that the first pick is an A, each of the n = 3 As has α/n.
# A stateless policy keeps its logits, and so once an A is gone a B follows with (1 − α) / (1 − α/n). A then B thus has
# f(α) = α (1 − α) n / (n − α), largest at α = n − √(n² − n), where it is n (2n − 1 − 2 √(n² − n)).
STATELESS_BOUND = 3 * (5 - 2 * math.sqrt(6))  # 0.303


@pytest.mark.parametrize(
    ("variant", "learns"),
    [
        ({}, False),
        ({"scorer": "additive"}, False),
        ({"state_update": "gate"}, True),
        ({"state_update": "gru", "scorer": "bilinear"}, True),
        ({"diversity": "mmr"}, True),
    ],
    ids=str,
)
def test_an_order_is_learnt_with_a_state_or_a_penalty_and_by_no_stateless_policy(variant, learns):
    earned = TypedPools("AB").learned(**variant)
    if learns:
        assert earned.mean() > 0.9
    else:
        assert earned.max() <= STATELESS_BOUND + 1e-4
        assert earned.mean() > 0.9 * STATELESS_BOUND  # it does learn as much as it can
