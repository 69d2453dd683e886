"""What `lever` does to its process before any work."""

import os
import subprocess
import sys

import pytest

from lever_lm.cli.entrypoint import wait_asleep


@pytest.mark.parametrize(
    ("said", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_that_wait_sleep_soon_unless_the_user_said_otherwise(said, spins):
    environment = dict(said)
    wait_asleep(environment)
    assert environment.get("GOMP_SPINCOUNT") == spins


def test_this_is_said_before_torch_is_there(tmp_path):
    """libgomp looks at its environment once, when it is loaded."""
    code = "import os, sys, lever_lm.cli; assert 'torch' not in sys.modules; sys.argv = ['lever', '--version']"
    code += "\ntry: lever_lm.cli.main()\nfinally: print(os.environ['GOMP_SPINCOUNT'])"
    said = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in said}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "1000", done.stderr
