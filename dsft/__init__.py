"""dsft: the fine-tuning framework that proves the run was right."""

import os

from dsft import first as first  # before all other imports
from dsft.imports import keep_remarks

__version__ = "0.1.0"

# Read by GNU OpenMP when torch is loaded, so before it. By default its threads spin at a barrier for milliseconds, 20
# times slower beside another process; not to spin costs a fifth alone (benchmarks/results/omp-wait-policy.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

keep_remarks()  # before anything imports torchao
