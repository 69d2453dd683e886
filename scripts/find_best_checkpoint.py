"""`lever best-ckpt` under Lever-Plus's flags; options it does not know are passed on."""

import argparse
import os
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("--checkpoint_dir", "--checkpoint-dir", metavar="DIR", help="folder of the run")
parser.add_argument("--strategy", help="val_loss (the default), ppo_loss, kl, adv_std or val_reward")
parser.add_argument("--show_all", "--show-all", action="store_true", help="print every epoch")
parser.add_argument("--log_file", "--log-file", "--log", metavar="FILE", help="choose from a training log")
known, others = parser.parse_known_args()
if not known.checkpoint_dir and not known.log_file:
    parser.error("name the folder of the run with --checkpoint_dir, or a training log with --log_file")

arguments = [known.checkpoint_dir] if known.checkpoint_dir else []
arguments += ["--strategy", known.strategy] if known.strategy else []
arguments += ["--show-all"] if known.show_all else []
arguments += ["--log", known.log_file] if known.log_file else []
os.environ.setdefault("PYTHON", sys.executable)  # the last resort of lever.sh
os.execvp("bash", ["bash", str(Path(__file__).resolve().with_name("lever.sh")), "best-ckpt", *arguments, *others])
