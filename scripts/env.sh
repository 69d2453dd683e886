# Sourced by the other scripts: a virtual environment in .venv with the package and its constraints, made once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
stamp=$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
if [ "$(cat .venv/.lever_lm 2>/dev/null || true)" != "$stamp" ]; then
    # torch first, and alone: asked for beside other packages, pip may settle on a build with gigabytes of CUDA.
    .venv/bin/python -m pip install --quiet "$(grep '^torch==' constraints.txt)"
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
    echo "$stamp" > .venv/.lever_lm
fi
