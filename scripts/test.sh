#!/usr/bin/env bash
# Style and tests, a process for each core, files kept together: bash scripts/test.sh [options of pytest; -n 0 for one]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONDONTWRITEBYTECODE=  # else pytest rewrites the assertions of all files anew, five seconds in each process
# Files are begun in the order of tests/conftest.py, not by their number of tests.
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
