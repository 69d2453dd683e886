"""Pick demonstrations for a folder of images and one question, and print the prompt that shows them.

    python scripts/pick_for_my_images.py IMAGES "What is the French word for this digit?" --policy RUN

RUN is a run folder, a checkpoint, a folder of `lever export`, or a hub id OWNER/NAME; by default that of `lever demo`.
--examples FILE brings demonstrations of your own in place of the training split: a JSON list of [image, question,
answer], images relative to the file. Without network where data and models are here, as those of the demo are.
"""

import argparse
import json
import sys
from pathlib import Path

from lever_lm import Retriever
from lever_lm.utils.errors import LeverError
from lever_lm.utils.terminal import printable

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("question")
    parser.add_argument("--policy", default="results/digits/model_cpk/demo", help="run, checkpoint, export or hub id")
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--examples", type=Path, help="JSON list of [image, question, answer]")
    parser.add_argument("--answer", action="store_true", help="also ask the vision-language model")
    options = parser.parse_args()

    examples = None
    if options.examples:
        rows = json.loads(options.examples.read_text(encoding="utf-8"))
        examples = [(options.examples.parent / image, question, answer) for image, question, answer in rows]
    images = sorted(path for path in options.images.iterdir() if path.suffix.lower() in IMAGES)
    questions = [options.question] * len(images)

    retriever = Retriever(options.policy, examples=examples)
    picks = retriever.pick(images, questions, shots=options.shots)
    answers = retriever.answer(images, questions, picks) if options.answer else [None] * len(images)
    for image, chosen, answer in zip(images, picks, answers, strict=True):
        print(printable(f"{image.name}: {options.question}" + (f" {answer}" if answer is not None else "")))
        for pick in chosen:
            example = pick.example
            file = Path(str(example.image)).name
            print(printable(f"  {pick.probability:.3f}  {file}  {example.question} → {example.answer}"))
    if images:
        text = retriever.prompt(images[0], questions[0], picks[0], form="text")
        print(printable(f"\nthe prompt for {images[0].name}:\n{text}"))


if __name__ == "__main__":
    try:
        main()
    except (LeverError, OSError) as error:
        sys.exit(printable(f"{Path(__file__).name}: {error}"))
