"""`lever convert` under Lever-Plus's flags; options it does not know are passed on."""

import argparse
import os
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("--v3_ckpt", "--v3-ckpt", metavar="PATH", required=True, help="grpo_epoch25.pt, say")
parser.add_argument("--output", metavar="PATH", help="where to, in place of <stem>_v2format.ckpt beside it")
known, others = parser.parse_known_args()

arguments = [known.v3_ckpt, *(["--output", known.output] if known.output else [])]
os.environ.setdefault("PYTHON", sys.executable)  # the last resort of lever.sh
os.execvp("bash", ["bash", str(Path(__file__).resolve().with_name("lever.sh")), "convert", *arguments, *others])
