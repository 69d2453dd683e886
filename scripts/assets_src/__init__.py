"""Sources of everything under `lever_lm/assets`; `scripts/build_assets.py` is their command line."""
