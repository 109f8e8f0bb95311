"""dsft: the fine-tuning framework that proves the run was right."""

import os
import sys

# python -m dsft.VERB has put the folder in which it was typed before all that is installed. It is not searched, so that
# no file in it is taken for a library; a verb that runs what was typed searches it last (searched.py).
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].partition(".")[0].removeprefix("-m") == "dsft":
    del sys.path[: 0 if sys.flags.safe_path else 1]

from dsft.imports import keep_remarks

__version__ = "0.1.0"

# Read by GNU OpenMP when torch is loaded, so before it. By default its threads spin at a barrier for milliseconds, 20
# times slower beside another process; not to spin costs a fifth alone (benchmarks/results/omp-wait-policy.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

keep_remarks()  # before anything imports torchao
