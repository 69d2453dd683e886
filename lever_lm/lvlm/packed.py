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
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lever_lm.lvlm.decoding import float32_logits

NAME = "lever_packed"
_ROUND = 8192  # the room for keys grows by this many tokens


def attention(
    query: Tensor, key: Tensor, value: Tensor, ends: tuple[Tensor, Tensor], longest: tuple[int, int], **options
) -> tuple[Tensor, Tensor]:
    """Return FlashAttention (arXiv:2307.08691) of several sequences at once, (ΣQ, heads, D), and the logarithms of its
    sums of exponentials, (heads, ΣQ), infinite where a sequence has no keys. query: (ΣQ, heads, D); key, value:
    (ΣK, K, D), where K divides heads; ends: int32 of queries and of keys, 0 first; options: `scale`, `is_causal`, and
    `used`, how many keys of each sequence there are yet, int32."""
    causal, more = options.get("is_causal", False), {"scale": options["scale"], "seqused_k": options.get("used")}
    out = torch.ops.aten._flash_attention_forward(query, key, value, *ends, *longest, 0.0, causal, False, **more)
    return out[0], out[1]


def _attend(module, query: Tensor, key: Tensor, value: Tensor, mask, *, attend: Callable, scaling: float, **_):
    """Attention by the library's signature: (B, heads, L, D) of queries → (B, L, heads, D)."""
    return attend(module.layer_idx, query, key, value, scaling), None


class _Places:
    """What the last layer adds behind its attention matters at the places that are asked for alone: hooks that let its
    other half see these, and have 0 elsewhere."""

    def __init__(self, mlp):
        self.forget()
        mlp.register_forward_pre_hook(self._before)
        mlp.register_forward_hook(self._after)

    def _before(self, mlp, given: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.asked is None:
            return None
        (self._whole,) = given
        return (self._whole[:, self.asked],)

    def _after(self, mlp, given: tuple[Tensor], out: Tensor) -> Tensor | None:
        if self.asked is None:
            return None
        whole = torch.zeros_like(self._whole).index_copy_(1, self.asked, out)
        self.forget()
        return whole

    def forget(self) -> None:
        """Hold nothing."""
        self._whole = self.asked = None


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
        self.own = model.lm_head.weight.new_zeros(2, self.layers, rows, new, self.heads, self.size)
        self.past = self._room(0)  # of the keys and values of prompts: made with the first batch
        self.tokens, self.positions = torch.zeros(2, rows, 1, dtype=torch.long, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.ends = torch.zeros(prompts + 1, dtype=torch.int32, device=device)
        self.asked = torch.arange(prompts + 1, dtype=torch.int32, device=device) * beams * self.groups
        each = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.own_ends = each * self.groups, each * new
        self._graph, self._logits, self._places = None, None, _Places(self.decoder.layers[-1].mlp)
        # Experts may be chosen on the host, and positions scaled by how far they go: a graph has no part for either.
        scaled = text.rope_parameters.get("rope_type") in ("dynamic", "longrope")
        self._in_graph = device.type == "cuda" and not scaled and not hasattr(text, "num_experts")

    def hidden(
        self,
        embeddings: Tensor,
        positions: Tensor,
        ends: Tensor,
        longest: int,
        more: dict,
        places: Tensor,
        keep: bool,
    ) -> Tensor:
        """Return the last hidden states (n, H) of prompts at some places (n,), and keep their keys, if that is asked
        for. embeddings: (1, T, H); positions: (3, 1, T); ends: (B,); longest: tokens of the longest; more: for the
        language model."""
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

        self._places.asked = places
        return self._run(embeddings, positions, attend, more)[0, places]

    def _make_room(self, tokens: int) -> None:
        if tokens > self.past.shape[2]:
            self._graph, self._logits = None, None
            self.past = self._room(0)  # the old one is given back first, and this one stands where there is no other
            self.past = self._room(-(-tokens // _ROUND) * _ROUND)

    def give_back(self) -> None:
        """Let go of the room for keys, where memory has run out: a smaller batch makes a smaller one."""
        self._graph, self._logits, self.past = None, None, self._room(0)
        self._places.forget()

    def _room(self, tokens: int) -> Tensor:
        return self.own.new_zeros(2, self.layers, tokens, self.heads, self.size)

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
        attend = partial(self._attend_one, (self.at + 1).int().repeat(len(self.tokens)))
        hidden = self._run(self.embed(self.tokens), self.positions.expand(3, -1, -1), attend, {})
        return float32_logits(self.head, hidden[:, -1])

    def _attend_one(self, used: Tensor, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one token a row, (R, heads, 1, D), to its prompt and to the row's own tokens."""
        for whole, new in zip(self.own[:, layer], (key, value), strict=True):
            whole.index_copy_(1, self.at, new.transpose(1, 2))
        # the queries of a prompt's beams, and of the heads that share keys, follow each other
        flat = (
            query.view(len(query), self.heads, self.groups, self.size)
            .transpose(1, 2)
            .reshape(-1, self.heads, self.size)
        )
        own, past, new = self.own[:, layer].flatten(1, 2), self.past[:, layer], self.own.shape[3]
        longest = self.beams * self.groups, past.shape[1]
        seen, of_seen = attention(flat, *past, (self.asked, self.ends), longest, scale=scale)
        said, of_said = attention(flat, *own, self.own_ends, (self.groups, new), scale=scale, used=used)
        joined = torch.lerp(seen.float(), said.float(), (of_said - of_seen).sigmoid().T[..., None])
        by_head = joined.to(query.dtype).view(len(query), self.groups, self.heads, self.size).transpose(1, 2)
        return by_head.reshape(len(query), 1, -1, self.size)

    def _capture(self) -> None:
        """Record a step. The step that it is called for runs in its replay."""
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):  # kernels are loaded, and compiled, before
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        # the thread that prepares the next batch goes on meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = self._step()
        self._graph = graph

    def _run(self, embeddings: Tensor, positions: Tensor, attend: Callable, more: dict) -> Tensor:
        out = self.decoder(inputs_embeds=embeddings, position_ids=positions, use_cache=False, attend=attend, **more)
        return out.last_hidden_state
