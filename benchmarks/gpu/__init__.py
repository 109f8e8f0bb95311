"""What a machine with a GPU is asked in a few minutes: see docs/gpu.md."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("dsft_launchers") is None:  # a bare machine: nothing is installed, the checkout is all there is
    sys.path.insert(0, str(Path(__file__).parents[2] / "launchers"))
