#!/usr/bin/env bash
# The whole way on the embedded data and model: bash scripts/demo.sh [options of `lever demo`]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec .venv/bin/lever demo "$@"
