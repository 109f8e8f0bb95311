"""dsft: the fine-tuning framework that proves the run was right."""

import os

__version__ = "0.1.0"

# Read by OpenMP when torch is loaded, so before it: threads that spin at a barrier while another process has the core
# made small CPU operations 5 to 20 times slower on a busy machine (benchmarks/results/omp-wait-policy.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
