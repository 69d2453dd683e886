"""Rebuilds what `lever_lm/assets` holds: `python scripts/build_assets.py [digits|clip|lvlm|all|check]`.

digits  a knowledge-VQA world in OK-VQA's file layout; seconds; needs scikit-learn (for the images only)
clip    tiny-clip, a real CLIPModel trained on those digits; about a minute on one CPU core
lvlm    tiny-qwen2.5-vl, a real Qwen2_5_VLForConditionalGeneration that copies from its demonstrations; minutes on a GPU
check   measures both models of --out as they stand, through `from_pretrained` and `generate`
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package's compat.py, also where the package is not installed


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=["digits", "clip", "lvlm", "all", "check"])
    parser.add_argument("--out", type=Path, default=ROOT / "lever_lm" / "assets", help="folder of the assets")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="LVLM only: where it is trained")
    parser.add_argument("--steps", type=int, help="training steps of the one model named (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=256, help="LVLM only; under 128 it does not learn")
    parser.add_argument("--workers", type=int, default=4, help="LVLM only: processes that make training batches")
    args = parser.parse_args()
    if args.what not in ("clip", "lvlm") and args.steps is not None:
        parser.error("--steps belongs to one model: name `clip` or `lvlm`")
    return args


def build(what: str, args: argparse.Namespace) -> dict:
    if what == "digits":
        from assets_src import world

        return world.build(args.out / "digits", seed=args.seed)
    if what == "check":
        from assets_src import lvlm_check, tiny_clip

        lvlm = lvlm_check.check(args.out / "tiny-qwen2.5-vl", device=args.device)
        return {"tiny-clip": tiny_clip.check(args.out / "tiny-clip"), "tiny-qwen2.5-vl": lvlm}
    steps = {} if args.steps is None else {"steps": args.steps}
    if what == "clip":
        from assets_src import tiny_clip

        return tiny_clip.build(args.out / "tiny-clip", seed=args.seed, **steps)
    from assets_src import lvlm_training

    return lvlm_training.build(
        args.out / "tiny-qwen2.5-vl",
        seed=args.seed,
        device=args.device,
        batch_size=args.batch_size,
        workers=args.workers,
        **steps,
    )


def main() -> None:
    args = parse_args()
    for what in ("digits", "clip", "lvlm") if args.what == "all" else (args.what,):
        print(json.dumps({what: build(what, args)}, indent=1), flush=True)


if __name__ == "__main__":
    main()
