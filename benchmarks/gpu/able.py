"""Whether a machine can run the checks: asked in a process of its own, as a driver may hang, and before any check."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

LIMIT_S = 90.0
"""Importing torch from a cold disk takes half a minute."""
NEEDED = (
    "torch", "transformers", "hydra", "omegaconf", "pydantic", "numpy", "pyarrow", "rich", "filelock", "jinja2", "yaml",
    "safetensors", "tokenizers",
)  # fmt: skip
"""What every run of dsft imports. Without peft, bitsandbytes or deepspeed what needs them fails, and says so."""
LEAST_GIB = 4.0
"""Free memory of the card that the tiny checks want: a context takes half of one, and two ranks share it."""


@dataclass(frozen=True)
class Found:
    """absent: modules that are not there; torch, build: versions, build None for a CPU's; error: why CUDA does not
    start, empty if it does; name, free_gib: of the first GPU.
    """

    absent: tuple[str, ...] = ()
    torch: str = ""
    build: str | None = None
    error: str = ""
    name: str = ""
    free_gib: float = 0.0


def refusal(found: Found, *, cpu: bool) -> str | None:
    """Why no check can run, one line; None if they can."""
    if found.absent:
        return (
            f"python must have {', '.join(found.absent)}, which are not there; docs/gpu.md says which wheels to bring"
        )
    if cpu:
        return None
    way = "--cpu rehearses without a GPU"
    if found.build is None:
        return f"torch must be built for CUDA, got {found.torch}; install one that suits the driver, or {way}"
    if found.error:
        return f"the machine must have a GPU that torch {found.torch} can use, got: {found.error}; {way}"
    if found.free_gib < LEAST_GIB:
        return (
            f"{found.name} must have {LEAST_GIB:g} GiB of free memory, got {found.free_gib:.1f}; end what holds the "
            f"rest (nvidia-smi names it), or {way}"
        )
    return None


def look(env: Mapping[str, str]) -> Found:
    """What a process with env finds. One that does not answer in time, or dies, is an error of the driver's."""
    command = [sys.executable, "-m", "benchmarks.gpu.able"]
    try:
        done = subprocess.run(
            command, env=dict(env), capture_output=True, text=True, check=False, timeout=LIMIT_S, start_new_session=True
        )
    except subprocess.TimeoutExpired:
        return Found(torch="", build="unknown", error=f"no answer from torch within {LIMIT_S:g} s")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = " ".join(done.stderr.split())[-200:]
        return Found(build="unknown", error=f"torch ended with {done.returncode}: {said}")
    return Found(**json.loads(lines[-1]))


def _here() -> Found:
    """Of this process; starts CUDA."""
    absent = tuple(name for name in NEEDED if importlib.util.find_spec(name) is None)
    if "torch" in absent:
        return Found(absent)
    import torch

    version, build = torch.__version__, torch.version.cuda
    if build is None:
        return Found(absent, version)
    try:
        torch.cuda.init()
        free, _ = torch.cuda.mem_get_info(0)
        torch.zeros(1, device="cuda").add_(1).item()
    except Exception as error:  # of the driver, of no kernel for this card, of no memory: each is a reason
        return Found(absent, version, build, " ".join(str(error).split())[:200] or type(error).__name__)
    return Found(absent, version, build, "", torch.cuda.get_device_name(0), free / 2**30)


if __name__ == "__main__":
    print(json.dumps(asdict(_here())))
