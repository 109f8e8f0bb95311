"""How fast and how large: seconds and tokens per second of a step, peak memory of this process."""

import time
from pathlib import Path

import torch


class Meter:
    """A stopwatch for steps. The caller has read the step's loss before stop, so no kernel is still running."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def start(self) -> None:
        """A step begins."""
        self.began = time.perf_counter()

    def stop(self, tokens: float) -> dict[str, float]:
        """The step ended: step_s, seconds since start, and tokens_per_s for its tokens (over all ranks)."""
        seconds = time.perf_counter() - self.began
        return {"step_s": seconds, "tokens_per_s": tokens / max(seconds, 1e-9)}


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory that this process has held so far, in bytes.

    On CUDA: what torch's allocator gave out on device. Else: resident memory (VmHWM in /proc/self/status), which
    counts mapped files too. Raises RuntimeError where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024  # the kernel counts in KiB
    raise RuntimeError(f"{status} must tell VmHWM to measure memory; this system has none: run on Linux")
