"""The tiny Qwens, and a batched forward pass for images of one size that shares the real classes' weights.

Shapes: N images of P x P pixels, T = 16 patches an image, M = 4 tokens an image after merging, H hidden, W = H numbers
a token, or 2 H of a Qwen3-VL, whose tower shows an early layer to the language model too; B prompts of L tokens. The
library's vision tower attends image by image in a Python loop; a training step encodes a thousand images, so here one
batched attention does it. `lvlm_check.py` compares both paths.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from assets_src.digit_images import IMAGE_SIZE, PIXEL_MEAN, PIXEL_STD
from assets_src.lvlm_processor import MERGE_SIZE, PATCH_SIZE

GRID = IMAGE_SIZE // PATCH_SIZE  # patches a side
SIDE = GRID // MERGE_SIZE  # tokens a side
TOKENS_PER_IMAGE = SIDE**2
TEMPORAL_PATCH = 2  # Qwen2-VL treats an image as two equal frames


def build_config(tokenizer, family: str):
    """About 0.9 M parameters: 3 layers of 128 (4 heads, 2 of them kv) and a vision tower of 2 layers of 64.

    Time, height and width share the 16 frequencies of a 32-wide head about as in the released models."""
    from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

    def token_id(token: str) -> int:
        return tokenizer.convert_tokens_to_ids(token)

    text = {
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH,
        "out_hidden_size": text["hidden_size"],
    }
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if family == "qwen3_vl":
        config = Qwen3VLConfig
        text |= {"head_dim": 32, "rope_parameters": {**rope, "mrope_section": [6, 5, 5], "mrope_interleaved": True}}
        vision |= {"num_position_embeddings": GRID**2, "deepstack_visual_indexes": [0]}
    else:
        config = Qwen2_5_VLConfig
        text |= {"rope_parameters": {**rope, "mrope_section": [4, 6, 6]}}
        # A window wider than an image: every layer sees all of it.
        vision |= {"tokens_per_second": 2, "window_size": 112, "fullatt_block_indexes": [1]}
    return config(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def _merge_order(grid: Tensor) -> Tensor:
    """(..., GRID, GRID) -> (..., T): patches in Qwen's order, the four that are merged into one token side by side."""
    blocks = grid.unflatten(-1, (SIDE, MERGE_SIZE)).unflatten(-3, (SIDE, MERGE_SIZE))  # ..., sh, mh, sw, mw
    return blocks.transpose(-3, -2).flatten(-4)


def patchify(images: Tensor) -> Tensor:
    """Grey images (N, P, P) in 0..1 -> (N, T, 3 * 2 * 14 * 14), as Qwen2VLImageProcessor gives them for RGB."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    rgb = (images[:, None] - mean) / std
    cut = rgb.unflatten(3, (GRID, PATCH_SIZE)).unflatten(2, (GRID, PATCH_SIZE))  # N, C, gh, ph, gw, pw
    patches = _merge_order(cut.permute(0, 1, 3, 5, 2, 4))  # N, C, ph, pw, T
    frames = patches.permute(0, 4, 1, 2, 3).unsqueeze(3).expand(-1, -1, -1, TEMPORAL_PATCH, -1, -1)
    return frames.flatten(2)


def _vision_rotation(head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, head_dim), of the vision tower's two-dimensional rotary embedding."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, head_dim // 2, 2, device=device).float() / (head_dim // 2))
    line = torch.arange(GRID, device=device)
    rows = _merge_order(line[:, None].expand(GRID, GRID))
    columns = _merge_order(line[None, :].expand(GRID, GRID))
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def encode_images(visual: torch.nn.Module, patches: Tensor) -> Tensor:
    """patches (N, T, D) -> features (N, M, W): the library's vision tower with one attention over all images."""
    num_images, num_patches, _ = patches.shape
    weight = visual.patch_embed.proj.weight
    x = F.linear(patches.to(weight.dtype), weight.flatten(1), visual.patch_embed.proj.bias)
    if hasattr(visual, "pos_embed"):  # learnt for a grid of the size of ours
        x = x + visual.pos_embed.weight[_merge_order(torch.arange(num_patches, device=x.device).view(GRID, GRID))]
    deep, shown = list(getattr(visual, "deepstack_visual_indexes", ())), []
    for i, block in enumerate(visual.blocks):
        qkv = block.attn.qkv(block.norm1(x)).view(num_images, num_patches, 3, block.attn.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        cos, sin = (t.to(query.dtype) for t in _vision_rotation(query.shape[-1], x.device))
        query, key = (t * cos + _rotate_half(t) * sin for t in (query, key))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + block.attn.proj(attended)
        x = x + block.mlp(block.norm2(x))
        if i in deep:
            shown.append(visual.deepstack_merger_list[deep.index(i)](x))
    return torch.cat([of_layer.view(num_images, TOKENS_PER_IMAGE, -1) for of_layer in (visual.merger(x), *shown)], -1)


def rope_positions(ids: np.ndarray, image_token_id: int) -> np.ndarray:
    """Multimodal positions (3, B, L) of right-padded ids (B, L), for images of our one size; = get_rope_index.

    A text token advances all three axes by one. An image's tokens share their start in time and count rows and columns
    from it; the text after it goes on at start + SIDE.
    """
    is_image = ids == image_token_id
    within = np.where(is_image, (np.cumsum(is_image, axis=1) - 1) % TOKENS_PER_IMAGE, 0)
    advance = np.where(is_image, np.where(within == TOKENS_PER_IMAGE - 1, SIDE, 0), 1)
    start = np.cumsum(advance, axis=1) - advance
    return np.stack([start, start + within // SIDE, start + within % SIDE]).astype(np.int64)


def hidden_states(
    model: torch.nn.Module, ids: Tensor, positions: Tensor, features: Tensor, image_rows: Tensor
) -> Tensor:
    """(B, L, H): the language model over right-padded prompts (causal attention never sees the padding).

    ids (B, L), positions (3, B, L), features (N, M, W), image_rows (all images in the prompts,): rows of features.
    """
    embedded = model.model.language_model.embed_tokens(ids)
    is_image = ids == model.config.image_token_id
    tokens, *deep = features[image_rows].flatten(0, 1).to(embedded.dtype).split(embedded.shape[-1], -1)
    embedded = embedded.masked_scatter(is_image[..., None], tokens)
    more = {"visual_pos_masks": is_image, "deepstack_visual_embeds": deep} if deep else {}
    out = model.model.language_model(inputs_embeds=embedded, position_ids=positions, use_cache=False, **more)
    return out.last_hidden_state
