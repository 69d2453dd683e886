"""Rebuilds what `lever_lm/assets` holds: `python scripts/build_assets.py [digits|clip|lvlm|…|all|check]`.

digits  a knowledge-VQA world in OK-VQA's file layout; seconds; needs scikit-learn (for the images only)
clip    tiny-clip, a real CLIPModel trained on those digits; about a minute on one CPU core
lvlm    tiny-qwen2.5-vl, a real Qwen2_5_VLForConditionalGeneration that copies from its demonstrations; minutes on a GPU
lvlm-qwen3
        tiny-qwen3-vl, a real Qwen3VLForConditionalGeneration of the same world
sets, sets-clip, sets-lvlm
        the same of the world in which the set of demonstrations matters: digits_sets, which asks about the images of
        digits, tiny-clip-sets and tiny-qwen2.5-vl-sets
clip-answers
        tiny-clip-answers: tiny-clip, with the answers among the captions of their digit; is not shipped
check   measures the models of --out as they stand, through `from_pretrained` and `generate`
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package's compat.py, also where the package is not installed


LVLMS = {  # name here → name of the asset, and its family
    "lvlm": ("tiny-qwen2.5-vl", "qwen2_5_vl"),
    "lvlm-qwen3": ("tiny-qwen3-vl", "qwen3_vl"),
    "sets-lvlm": ("tiny-qwen2.5-vl-sets", "qwen2_5_vl"),
}
ALL = ("digits", "clip", "lvlm", "lvlm-qwen3", "sets", "sets-clip", "sets-lvlm")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=[*ALL, "clip-answers", "all", "check"])
    parser.add_argument("--out", type=Path, default=ROOT / "lever_lm" / "assets", help="folder of the assets")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="LVLM only: where it is trained")
    parser.add_argument("--steps", type=int, help="training steps of the one model named (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=256, help="LVLM only; under 128 it does not learn")
    parser.add_argument("--workers", type=int, default=4, help="LVLM only: processes that make training batches")
    args = parser.parse_args()
    if args.steps is not None and args.what in ("digits", "sets", "all", "check"):
        parser.error("--steps belongs to one model: name it")
    return args


def check(args: argparse.Namespace) -> dict:
    from assets_src import lvlm_check, tiny_clip
    from assets_src.lvlm_sequences import codes_world, digits_world

    found = {}
    for end, texts in (("", tiny_clip.DIGITS), ("-sets", tiny_clip.CODES)):
        found[f"tiny-clip{end}"] = tiny_clip.check(args.out / f"tiny-clip{end}", texts)
    for what, (name, _) in LVLMS.items():
        world = codes_world() if what.startswith("sets") else digits_world()
        found[name] = lvlm_check.check(args.out / name, world, device=args.device)
    return found


def build(what: str, args: argparse.Namespace) -> dict:
    if what == "check":
        return check(args)
    steps = {} if args.steps is None else {"steps": args.steps}
    if what == "digits":
        from assets_src import world

        return world.build(args.out / "digits", seed=args.seed)
    if what == "sets":
        from assets_src import sets_world

        return sets_world.build(args.out / "digits_sets", seed=args.seed)
    if "clip" in what:
        from assets_src import tiny_clip

        name = {"clip": "tiny-clip", "clip-answers": "tiny-clip-answers", "sets-clip": "tiny-clip-sets"}[what]
        texts = {"clip": tiny_clip.DIGITS, "clip-answers": tiny_clip.ANSWERS, "sets-clip": tiny_clip.CODES}[what]
        return tiny_clip.build(args.out / name, texts, seed=args.seed, **steps)
    from assets_src import lvlm_check, lvlm_training
    from assets_src.lvlm_sequences import codes_world, digits_world

    (name, family), asked = LVLMS[what], codes_world() if what.startswith("sets") else digits_world()
    options = {
        "family": family,
        "seed": args.seed,
        "device": args.device,
        "batch_size": args.batch_size,
        "workers": args.workers,
    }
    summary = lvlm_training.build(args.out / name, asked, **options, **steps)
    return {**summary, "accuracy": lvlm_check.check(args.out / name, asked, count=100, device=args.device)}


def main() -> None:
    args = parse_args()
    for what in ALL if args.what == "all" else (args.what,):
        print(json.dumps({what: build(what, args)}, indent=1), flush=True)


if __name__ == "__main__":
    main()
