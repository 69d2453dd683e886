#!/usr/bin/env bash
# What the scripts with Lever-Plus's words run in the end: bash scripts/lever.sh [arguments of `lever`]
# The lever of this checkout's .venv, else that of PATH, else that of the Python. No cd: results/ is the caller's.
set -euo pipefail
own=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.venv/bin/lever
[ ! -x "$own" ] || exec "$own" "$@"
[ -z "$(type -P lever)" ] || exec lever "$@"
exec "${PYTHON:-python3}" -m lever_lm "$@"
