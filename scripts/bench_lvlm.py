"""Prompts a second: the lineage's way and ours, side by side in one process.

    python scripts/bench_lvlm.py                        # the 3B shape with random weights; wants a GPU
    python scripts/bench_lvlm.py --shape qwen3-4b       # that of Qwen3-VL-4B; --family generic: not on the fast path
    python scripts/bench_lvlm.py --model asset:tiny-qwen2.5-vl   # the shipped model on the digits; for a CPU

The lineage's way: one prompt at a time, 3 beams, every image through the vision tower for every prompt, through the
library's `generate`. Ours: what `lever rollout` does, without its answer cache. Prompts of 4 shots and 5 new tokens;
images of 640 × 480 for the 3B shape. Prints tables in Markdown; `--json FILE` keeps the numbers.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch

from lever_lm.config.schema import DataConfig, LvlmConfig, PromptConfig
from lever_lm.data import Example, load_dataset
from lever_lm.lvlm import build_prompt
from lever_lm.lvlm.backend import load_local
from lever_lm.lvlm.generic import Generic
from lever_lm.lvlm.local import LocalLvlm
from lever_lm.lvlm.prompt import to_messages
from lever_lm.utils.device import resolve_device
from lever_lm.utils.paths import asset_path
from lever_lm.utils.transformers_compat import import_transformers

SHOTS, NEW_TOKENS = 4, 5
GIB = 1 << 30


# A shape → the shipped model whose processor it gets, and what its config has of the released one of this size.
SHAPES = {
    "qwen2.5-3b": (
        "asset:tiny-qwen2.5-vl",
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "layer_types": ["full_attention"] * 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    ),
    "qwen3-4b": (
        "asset:tiny-qwen3-vl",
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 2560,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    ),
}


def build_shape(folder: Path, device: torch.device, shape: str) -> None:
    """Save a model of a shape with random weights, behind the tokenizer and processor of a shipped one."""
    transformers = import_transformers()
    asset, text, vision = SHAPES[shape]
    tiny = asset_path(asset)
    config = transformers.AutoConfig.from_pretrained(tiny)
    for part, values in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in values.items():
            setattr(part, name, value)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = transformers.AutoModelForImageTextToText.from_config(config)
    torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    model.generation_config = transformers.GenerationConfig.from_pretrained(tiny)
    model.save_pretrained(folder)
    for file in tiny.iterdir():
        if not (folder / file.name).exists() and file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)
    of_processor = folder / "processor_config.json"
    described = json.loads(of_processor.read_text())
    for part in ("image_processor", "video_processor"):
        described[part]["patch_size"] = config.vision_config.patch_size
    of_processor.write_text(json.dumps(described))


def make_examples(folder: Path, count: int) -> list[Example]:
    """Questions about photographs of 640 × 480, each about its own."""
    import numpy as np
    from PIL import Image

    examples = []
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 255, (15, 20, 3), dtype=np.uint8)
        path = folder / f"{i}.jpg"
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
        answers = ("mars",) * 10
        examples.append(Example(i, i, "Which planet has this digit?", answers, answers, str(path)))
    return examples


def timed(device: torch.device, work) -> tuple[float, object]:
    """Return the seconds of a call, the device's work included, and what it returned."""
    wait(device)
    began = time.perf_counter()
    result = work()
    wait(device)
    return time.perf_counter() - began, result


def wait(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device, reset: bool = False) -> float:
    """Return the most memory allocated on a GPU since the last reset; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / GIB
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return peak


class Lineage:
    """One prompt at a time, pixels and all, through `generate`."""

    def __init__(self, path: str, config: LvlmConfig, device: torch.device):
        transformers = import_transformers()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        where = str(asset_path(path))
        self.device, self.config = device, config
        self.processor = transformers.AutoProcessor.from_pretrained(where)
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            where, dtype=dtype, attn_implementation="sdpa"
        )
        self.model = self.model.to(device).eval()

    def inputs(self, prompt):
        """Return what the processor makes of a prompt."""
        from qwen_vl_utils import process_vision_info

        budget = {"min_pixels": self.config.min_pixels, "max_pixels": self.config.max_pixels}
        messages = to_messages(
            prompt, PromptConfig(), lambda image: {"type": "image", "image": f"file://{image}", **budget}
        )
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pictures, _ = process_vision_info(messages, image_patch_size=self.processor.image_processor.patch_size)
        return self.processor(text=[text], images=pictures, return_tensors="pt").to(self.device)

    @torch.inference_mode()
    def generate(self, prompts, beams: int) -> list[str]:
        """Return the answers, made one after another."""
        answers = []
        for prompt in prompts:
            inputs = self.inputs(prompt)
            tokens = self.model.generate(**inputs, num_beams=beams, do_sample=False, max_new_tokens=NEW_TOKENS)
            new = tokens[:, inputs["input_ids"].shape[1] :]
            answers += self.processor.batch_decode(new, skip_special_tokens=True)
        return answers

    @torch.inference_mode()
    def logits(self, prompt) -> torch.Tensor:
        """Return the logits of the first new token."""
        return self.model(**self.inputs(prompt)).logits[0, -1].float()


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of an 8,192-wide bfloat16 matrix product on a GPU, a 2,048-wide float32 one on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    for _ in range(3):
        a @ b
    seconds, _ = timed(device, lambda: [a @ b for _ in range(20)])
    return 20 * 2 * size**3 / seconds


def tokens_of(lvlm: LocalLvlm, prompt) -> int:
    """Return the length of a prompt."""
    of_family = lvlm.family
    return (
        of_family.prepare([prompt])["input_ids"].shape[1]
        if isinstance(of_family, Generic)
        else len(of_family.token_ids(prompt))
    )


def prefill_flop(lvlm: LocalLvlm, tokens: int) -> float:
    """Multiplications and additions of the language model over one prompt: its products, and causal attention."""
    config = lvlm.family.model.config.text_config
    layers = lvlm.family.model.model.language_model.layers
    weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    return 2 * weights * tokens + 2 * config.num_hidden_layers * tokens**2 * config.hidden_size


def ours(path: str, prompts, beams: int, device: str, settings: dict, repeats: int, bank: Path):
    """(row of the table, the model): images first, then prompts, best of `repeats`."""
    config = LvlmConfig(path=path, num_beams=beams, max_new_tokens=NEW_TOKENS, **settings)
    lvlm = load_local(config, PromptConfig(), device, folder=bank)
    images = list(dict.fromkeys(image for prompt in prompts for image in prompt.images))
    peak_gib(lvlm.family.device, reset=True)
    vision, _ = timed(lvlm.family.device, lambda: lvlm.family.vision.see(images))
    vision_peak = peak_gib(lvlm.family.device, reset=True)
    batches = lvlm.batches(prompts)
    timed(lvlm.family.device, lambda: lvlm.generate([prompts[i] for i in batches[0]]))
    runs = [timed(lvlm.family.device, lambda: lvlm.generate(prompts)) for _ in range(repeats)]
    tokens = tokens_of(lvlm, prompts[0])
    row = {
        "beams": beams,
        "prompts_s": len(prompts) / min(seconds for seconds, _ in runs),
        "images_s": None if isinstance(lvlm.family, Generic) else len(images) / vision,
        "peak_gib": peak_gib(lvlm.family.device),
        "vision_peak_gib": vision_peak,
        "tokens": tokens,
        "flop": prefill_flop(lvlm, tokens),
        "batch": len(batches[0]),
        "answers": runs[0][1],
    }
    return row, lvlm


def library_logits(lineage: Lineage, prompts) -> list[torch.Tensor]:
    """Return the logits of the first new token by the library: in its precision, and in float32."""
    found = [torch.stack([lineage.logits(prompt) for prompt in prompts])]
    before = next(lineage.model.parameters()).dtype
    lineage.model.float()
    found.append(torch.stack([lineage.logits(prompt) for prompt in prompts]))
    lineage.model.to(before)
    return found


def numerics(lvlm: LocalLvlm, library: torch.Tensor, exact: torch.Tensor, prompts) -> dict:
    """Relative error of the first new token's logits against float32: the library's and ours, the mean over prompts."""
    with torch.inference_mode():
        mine = lvlm.family.prefill(lvlm.family.prepare(prompts)).logits.float()
    error = lambda logits: float(((logits - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())  # noqa: E731
    return {"library": error(library), "ours": error(mine)}


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a directory or asset; empty: the shape with random weights")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-3b")
    parser.add_argument("--family", default="auto", help="lvlm.family")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--lineage-prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=LvlmConfig.batch_tokens)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="lvlm.compile")
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = resolve_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        path = options.model
        if path:
            examples = load_dataset(DataConfig()).train_examples
            settings: dict = {}
        else:
            path = f"{scratch}/random"
            build_shape(Path(path), device, options.shape)
            examples = make_examples(Path(scratch), options.images)
            settings = {"max_pixels": 640 * 480}
        settings |= {"batch_tokens": options.batch_tokens, "workers": options.workers, "compile": options.compile}
        settings |= {"family": options.family}
        prompts = [
            build_prompt(picks[1:], picks[0], PromptConfig())
            for picks in (rng.sample(examples, SHOTS + 1) for _ in range(options.prompts))
        ]
        rate = matmul_rate(device)
        lineage = Lineage(path, LvlmConfig(path=path, **settings), device)
        peak_gib(device, reset=True)
        lineage.generate(prompts[:1], 3)
        few = prompts[: options.lineage_prompts]
        seconds, theirs = timed(device, lambda: lineage.generate(few, 3))
        baseline = {"prompts_s": len(few) / seconds, "peak_gib": peak_gib(device, reset=True)}
        theirs_of_few = library_logits(lineage, prompts[:16])  # before what makes ours faster touches the library
        lineage.model.cpu()  # its memory is not ours
        rows, same = [], None
        for beams in (3, 1):
            row, lvlm = ours(
                path, prompts, beams, options.device, settings, options.repeats, Path(scratch) / f"bank{beams}"
            )
            if beams == 3:
                same = sum(a == b for a, b in zip(theirs, row["answers"][: len(theirs)], strict=True))
            rows.append({name: value for name, value in row.items() if name != "answers"})
            if beams == 3:
                del lvlm
        errors = {} if isinstance(lvlm.family, Generic) else numerics(lvlm, *theirs_of_few, prompts[:16])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"\n{name}; torch {torch.__version__}, transformers {import_transformers().__version__}; matmul "
        f"{rate / 1e12:.3g} TFLOP/s; {rows[0]['tokens']} tokens a prompt, {options.prompts} prompts\n"
    )
    print("| way | beams | batch | prompts/s | × lineage | of the matmul rate | images/s | peak GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print(f"| lineage | 3 | 1 | {baseline['prompts_s']:.2f} | 1 | | | {baseline['peak_gib']:.1f} |")
    for row in rows:
        ratio, share = row["prompts_s"] / baseline["prompts_s"], row["prompts_s"] * row["flop"] / rate
        images = f"{row['images_s']:.0f}" if row["images_s"] else ""
        print(
            f"| ours | {row['beams']} | {row['batch']} | {row['prompts_s']:.1f} | {ratio:.1f} | {share:.0%} | "
            f"{images} | {max(row['peak_gib'], row['vision_peak_gib']):.1f} |"
        )
    if options.model:  # random weights write what no tokenizer reads
        print(f"\nThe same answers with 3 beams: {same} of {len(theirs)}.")
    if errors:
        print(
            "\nRelative error of the logits against float32: "
            f"library {errors['library']:.2e}, ours {errors['ours']:.2e}."
        )
    if options.json:
        options.json.write_text(json.dumps({"lineage": baseline, "ours": rows, "errors": errors, "matmul": rate}))


if __name__ == "__main__":
    main()
