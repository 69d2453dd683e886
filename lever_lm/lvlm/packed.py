"""The language model of a Qwen over prompts one behind the other, and over the few tokens that are written after them.

B prompts of T tokens in all, N beams, R rows: the beams of all prompts, S new tokens; K heads of keys, G queries for
each, D numbers of each; H hidden, V vocabulary. Layers, norms and rotary positions stay the library's; ours is the
attention.

No prompt is padded, and no prompt's keys are copied for its beams: these are further queries to them. What they attend
to among their own new tokens is computed apart, and the two are joined by the sums of their exponentials, as
FlashAttention (arXiv:2205.14135, §3.1) joins blocks. Keys lie where they lay for the batch before, so that a step of
decoding is one CUDA graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lever_lm.lvlm.decoding import float32_logits

NAME = "lever_packed"
_MOST = 1e4  # in place of infinity, where a row is of no prompt: what is not finite would stay
_ROUND = 8192  # the room for keys grows by this many tokens


def attention(
    query: Tensor, key: Tensor, value: Tensor, ends: tuple[Tensor, Tensor], longest: tuple[int, int], **options
) -> tuple[Tensor, Tensor]:
    """Return FlashAttention (arXiv:2307.08691) of several sequences at once, (ΣQ, heads, D), and the logarithms of its
    sums of exponentials, (heads, ΣQ). query: (ΣQ, heads, D); key, value: (ΣK, K, D), where K divides heads; ends: int32
    of queries and of keys, 0 first; options: `scale`, `is_causal`."""
    causal, scale = options.get("is_causal", False), options["scale"]
    out = torch.ops.aten._flash_attention_forward(query, key, value, *ends, *longest, 0.0, causal, False, scale=scale)
    return out[0], out[1]


def _attend(module, query: Tensor, key: Tensor, value: Tensor, mask, *, attend: Callable, scaling: float, **_):
    """Attention by the library's signature: (B, heads, L, D) of queries → (B, L, heads, D)."""
    return attend(module.layer_idx, query, key, value, scaling), None


class Packed:
    """The language model of a Qwen for batches of at most so many prompts, with so many beams and new tokens. It holds
    the keys of one batch: a cache for `decoding.Prefilled`, as what follows on a prompt belongs to that batch."""

    def __init__(self, model, prompts: int, beams: int, new: int):
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _attend)
        self.decoder, self.head, self.embed = model.model.language_model, model.lm_head, model.get_input_embeddings()
        self.decoder.config._attn_implementation = NAME
        text, device = self.decoder.config, model.device
        self.heads = text.num_key_value_heads
        self.groups = text.num_attention_heads // self.heads
        self.size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.layers, self.prompts, self.beams = text.num_hidden_layers, prompts, beams
        rows = prompts * beams
        # Room for the keys and values of prompts comes with the first batch.
        self.past = model.lm_head.weight.new_empty(2, self.layers, 0, self.heads, self.size)
        self.own = self.past.new_zeros(2, self.layers, rows, new, self.heads, self.size)
        self.tokens, self.positions = torch.zeros(2, rows, 1, dtype=torch.long, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.ends = torch.zeros(prompts + 1, dtype=torch.int32, device=device)
        self.asked = torch.arange(prompts + 1, dtype=torch.int32, device=device) * beams * self.groups
        self._graph, self._logits = None, None
        # Experts are chosen on the host, which a graph has no part for.
        self._in_graph = device.type == "cuda" and not hasattr(text, "num_experts")

    def hidden(
        self, embeddings: Tensor, positions: Tensor, ends: Tensor, longest: int, more: dict, keep: bool
    ) -> Tensor:
        """Return the last hidden states (T, H) of prompts, and keep their keys, if that is asked for. embeddings:
        (1, T, H); positions: (3, 1, T); ends: (B,); longest: tokens of the longest; more: for the language model."""
        total, stops = embeddings.shape[1], F.pad(ends, (1, 0)).int()
        if keep:
            self._make_room(total)
            self.ends.fill_(total)
            self.ends[: len(stops)] = stops
            self.at.fill_(-1)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
            if keep:
                self.past[0, layer, :total], self.past[1, layer, :total] = key, value
            both = (stops, stops), (longest, longest)
            return attention(query, key, value, *both, scale=scale, is_causal=True)[0][None]

        return self._run(embeddings, positions, attend, more)[0]

    def _make_room(self, tokens: int) -> None:
        if tokens > self.past.shape[2]:
            self._graph, self._logits = None, None
            self.past = self.past.new_empty(0)  # the old room is given back first
            room = -(-tokens // _ROUND) * _ROUND
            self.past = self.past.new_zeros(2, self.layers, room, self.heads, self.size)

    def step(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return the logits (R, V) after one more token of each row. tokens, positions: (R, 1)."""
        rows = len(tokens)
        self.tokens[:rows], self.positions[:rows] = tokens, positions
        self.at += 1
        if not self._in_graph:
            return self._step()[:rows]
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._logits[:rows]

    def batch_repeat_interleave(self, beams: int) -> None:
        """Repeat nothing: beams look at the keys of their prompt. Their number is that of the start."""

    def reorder_cache(self, order: Tensor) -> None:
        """Let each row (R,) go on from another row of its prompt."""
        self.own[:, :, : len(order)] = self.own[:, :, order]

    # ------------------------------------------------------------------ one step

    def _step(self) -> Tensor:
        positions = self.positions.expand(3, -1, -1)
        hidden = self._run(self.embed(self.tokens), positions, self._attend_one, {})
        return float32_logits(self.head, hidden[:, -1])

    def _attend_one(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one token a row, (R, heads, 1, D), to its prompt and to the row's own tokens."""
        rows, size = len(query), self.size
        for whole, new in zip(self.own[:, layer], (key, value), strict=True):
            whole.index_copy_(1, self.at, new.transpose(1, 2))
        # queries of a prompt's beams, and of the heads that share keys, follow each other: (B, N, G, K, D)
        by_prompt = query.view(self.prompts, self.beams, self.heads, self.groups, size).transpose(2, 3)
        flat = by_prompt.reshape(-1, self.heads, size)
        longest = (self.beams * self.groups, self.past.shape[2])
        seen, log_sum = attention(flat, *self.past[:, layer], (self.asked, self.ends), longest, scale=scale)
        seen = seen.view(rows, self.groups, self.heads, size).transpose(1, 2).float()
        log_sum = log_sum.T.reshape(rows, self.groups, self.heads).transpose(1, 2)[..., None].clamp(max=_MOST)
        keys, values = self.own[:, layer].float()  # (R, S, K, D)
        scores = torch.einsum("rkgd,rskd->rkgs", query.view(rows, self.heads, self.groups, size).float(), keys) * scale
        scores = scores.masked_fill(torch.arange(scores.shape[-1], device=scores.device) > self.at, -torch.inf)
        weights = torch.cat([log_sum, scores], -1).softmax(-1)
        joined = weights[..., :1] * seen + torch.einsum("rkgs,rskd->rkgd", weights[..., 1:], values)
        return joined.to(query.dtype).view(rows, 1, -1, size)

    def _capture(self) -> None:
        """Record a step. The step that it is called for runs in its replay."""
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):  # kernels are loaded, and compiled, before
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(warm)
        self._graph = torch.cuda.CUDAGraph()
        # the thread that prepares the next batch goes on meanwhile
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = self._step()

    def _run(self, embeddings: Tensor, positions: Tensor, attend: Callable, more: dict) -> Tensor:
        out = self.decoder(inputs_embeds=embeddings, position_ids=positions, use_cache=False, attend=attend, **more)
        return out.last_hidden_state
