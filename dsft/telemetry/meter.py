"""How fast and how large: seconds and tokens per second of a step, peak memory of this process, memory there is."""

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
    return _status("VmHWM")


def resident_bytes() -> int:
    """Memory that this process holds now. Raises RuntimeError where the system does not tell."""
    return _status("VmRSS")


def _status(key: str) -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024  # the kernel counts in KiB
    raise RuntimeError(f"{status} must tell {key} to measure memory; this system has none: run on Linux")


def host_memory_bytes() -> int | None:
    """This machine's, or what the control group (a container's, a SLURM job's) allows if that is less."""
    info, limits = Path("/proc/meminfo"), []
    if info.is_file():
        limits = [int(line.split()[1]) * 1024 for line in info.read_text().splitlines() if line.startswith("MemTotal:")]
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        root, name = Path("/sys/fs/cgroup"), "memory.max"
        if controllers:
            root, name = root / "memory", "memory.limit_in_bytes"
        place = root / path.lstrip("/")
        for folder in (place, *place.parents) if controllers in ("", "memory") else ():
            text = (folder / name).read_text().strip() if (folder / name).is_file() else ""
            limits += [int(text)] if text.isdigit() else []
    return min(limits, default=None)


def available_bytes() -> int | None:
    """Bytes of this machine's memory that a new process can have, without swapping; None if the system does not say."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
