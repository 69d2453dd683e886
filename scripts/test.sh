#!/usr/bin/env bash
# Style and tests: bash scripts/test.sh [options of pytest]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
