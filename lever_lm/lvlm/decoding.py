"""Greedy and beam decoding over a language model's own layers and cache, one prefill per prompt.

B prompts, N beams, L prompt length, V vocabulary. Both equal the library's `generate` for the same logits; beams share
their prompt's prefill instead of repeating it N times. Logits that are not finite would pass for the first or the last
token: a flag on the device notes them, and is looked at once a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

NEVER = -1.0e9


class NotFinite(ArithmeticError):
    """Logits are not finite. places: of the prompts concerned, in the batch."""

    def __init__(self, places: list[int]):
        super().__init__(f"the logits of prompts {places} are not finite")
        self.places = places


@dataclass
class Prefilled:
    """Prompts after their prefill: logits (B, V) of the first new token, cache, attention mask (B, L), next position
    (B,). `step(tokens (B, 1), positions (B, 1), mask)` gives the logits (B, V) after one more token. ids (B, L): the
    tokens of each prompt, in place of padding one of them again."""

    logits: Tensor
    cache: object
    mask: Tensor
    position: Tensor
    step: Callable[[Tensor, Tensor, Tensor], Tensor]
    ids: Tensor | None = None


# Tokens so far (B, T) and scores (B, V) of the next one → other scores: a LogitsProcessor of the library.
Process = Callable[[Tensor, Tensor], Tensor]


def greedy(prefilled: Prefilled, max_new_tokens: int, eos: Tensor, pad: int, process: Process | None = None) -> Tensor:
    """Return the likeliest token, again and again: (B, T) int64 with T ≤ max_new_tokens, `pad` after an end-of-turn.
    `process` changes the logits, as float32. Raises NotFinite."""
    logits, mask = prefilled.logits, prefilled.mask
    finished = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    sound = ~finished
    tokens = []
    for t in range(max_new_tokens):
        if process is not None:
            logits = process(torch.cat([prefilled.ids, *(token[:, None] for token in tokens)], 1), logits.float())
        likeliest = logits.argmax(-1)  # NaN and +inf are above all else
        sound &= logits.gather(-1, likeliest[:, None]).squeeze(-1).isfinite() | finished
        token = likeliest.masked_fill(finished, pad)
        tokens.append(token)
        finished |= torch.isin(token, eos)
        if finished.all() or t + 1 == max_new_tokens:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = prefilled.step(token[:, None], prefilled.position[:, None] + t, mask)
    _check(sound)
    return torch.stack(tokens, 1)


def beam_search(
    prefilled: Prefilled,
    num_beams: int,
    max_new_tokens: int,
    eos: Tensor,
    pad: int,
    penalty: float,
    process: Process | None = None,
) -> Tensor:
    """Return the best of `num_beams` beams: (B, T) int64. Scores are summed log-probabilities over
    length^penalty; `process` changes the log-probabilities of each step.

    Semantics of the library (early_stopping=False): of each step's (1 + |eos|)·N best continuations those that end
    among the first N may enter the finished ones, and the best N others run on; a prompt is settled once its best
    running beam, at the present length, falls below its worst finished one. Raises NotFinite.
    """
    batch, device = len(prefilled.logits), prefilled.logits.device
    keep = max(2, 1 + len(eos)) * num_beams
    running = torch.full((batch, num_beams, max_new_tokens), pad, device=device)
    finished = running.clone()
    running_scores = torch.zeros(batch, num_beams, device=device)
    running_scores[:, 1:] = NEVER  # all beams start as the same prompt: only the first may branch
    finished_scores = torch.full((batch, num_beams), NEVER, device=device)
    is_finished = torch.zeros(batch, num_beams, dtype=torch.bool, device=device)
    open_ = torch.ones(batch, 1, dtype=torch.bool, device=device)
    sound = open_[:, 0].clone()
    among_first = torch.arange(keep, device=device) < num_beams
    prefilled.cache.batch_repeat_interleave(num_beams)
    parts = (prefilled.mask, prefilled.position, prefilled.logits)
    mask, position, logits = (part.repeat_interleave(num_beams, 0) for part in parts)
    first_row = torch.arange(batch, device=device)[:, None] * num_beams
    for t in range(max_new_tokens):
        log_probs = logits.float().log_softmax(-1)
        if process is not None:
            written = torch.cat([prefilled.ids.repeat_interleave(num_beams, 0), running[..., :t].flatten(0, 1)], 1)
            log_probs = process(written, log_probs)
        log_probs = log_probs.view(batch, num_beams, -1) + running_scores[..., None]
        scores, flat = log_probs.flatten(1).topk(keep, -1)
        sound &= scores[:, 0].isfinite()  # a NaN comes first
        parent, token = flat // log_probs.shape[-1], flat % log_probs.shape[-1]
        grown = running.gather(1, parent[..., None].expand(-1, -1, max_new_tokens))
        grown[..., t] = token
        ends = torch.isin(token, eos) | (t + 1 == max_new_tokens)
        running_scores, survivors = (scores + ends * NEVER).topk(num_beams, -1)  # the best that have not ended run on
        running = grown.gather(1, survivors[..., None].expand(-1, -1, max_new_tokens))
        # beams that ended among the first N compete with the finished ones
        ended = ends & among_first
        candidate = scores / (t + 1) ** penalty + ~open_ * NEVER + ~ended * NEVER
        finished_scores, best = torch.cat([finished_scores, candidate], 1).topk(num_beams, -1)
        finished = torch.cat([finished, grown], 1).gather(1, best[..., None].expand(-1, -1, max_new_tokens))
        is_finished = torch.cat([is_finished, ended], 1).gather(1, best)
        worst = torch.where(is_finished, finished_scores.amin(1, keepdim=True), NEVER)
        open_ &= (running_scores[:, :1] / (t + 1) ** penalty > worst).any(-1, keepdim=True)
        if not open_.any() or ends.all():
            break
        prefilled.cache.reorder_cache((first_row + parent.gather(1, survivors)).flatten())
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = prefilled.step(running[..., t].reshape(-1, 1), position[:, None] + t, mask)
    _check(sound)
    return finished[:, 0]


def repeatable_attention():
    """Return a context in which attention takes the same sums in the same order in every run.

    cuDNN's kernel for one query position under a mask does not: its answers differ from run to run. The others do.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def float32_logits(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """Return the logits (…, V) of hidden states (…, H) in float32, whatever the precision of the weights (V, H).

    The two largest of 150,000 logits are often equal in bfloat16; what picks a token is compared in float32. Ties that
    are left go to the lowest token id, as `torch.argmax` has it.
    """
    if hidden.dtype == torch.float32:
        return head(hidden)
    if not hidden.is_cuda:
        return F.linear(hidden.float(), head.weight.float())
    # The products of half-precision numbers are summed in float32 either way: here the sum is not rounded.
    flat = torch.mm(hidden.flatten(0, -2), head.weight.T, out_dtype=torch.float32)
    return flat.view(*hidden.shape[:-1], -1)


def _check(sound: Tensor) -> None:
    if not sound.all():
        raise NotFinite((~sound).nonzero().flatten().tolist())
