"""Check 0: what the machine is, and the two ceilings that every speed is held to: a copy, and a plain product."""

import platform
import shutil
import subprocess
from importlib import metadata

import torch

from benchmarks.gpu.facts import Facts
from benchmarks.gpu.scene import Scene, cores

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "triton", "liger-kernel", "torchao")
ASKED = "name,driver_version,memory.total,memory.free,power.limit,clocks.max.sm,mig.mode.current"


def ceilings(scene: Scene, facts: Facts) -> None:
    """Copy: bytes read and written per second; product: n x n x n, 10 calls between two events."""
    facts.note("machine", f"{cores()} cores, Python {platform.python_version()}")
    facts.note("versions", ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    if scene.cuda:
        with facts.part("what the driver says"):
            _driver(facts)
    size, side, dtype = (2**32, 8192, torch.bfloat16) if scene.cuda else (2**24, 512, torch.float32)
    with facts.part("copy"):
        _copy(scene, facts, size)
    scene.forget()
    with facts.part("product"):
        left, right = scene.normal(side, side, dtype=dtype), scene.normal(side, side, dtype=dtype, seed=1)
        took = scene.seconds(lambda: left @ right)
        facts.note(f"product of {side}^3 in {str(dtype).removeprefix('torch.')}", round(2 * side**3 / took / 1e12, 3),
                   "TFLOP/s", ok=took > 0)  # fmt: skip


def _copy(scene: Scene, facts: Facts, size: int) -> None:
    source = torch.ones(size, dtype=torch.uint8, device=scene.device)
    target = torch.empty_like(source)
    took = scene.seconds(lambda: target.copy_(source))
    facts.note("copy, read and written", round(2 * size / took / 1e9, 1), "GB/s", ok=bool(target[-1] == 1))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _driver(facts: Facts) -> None:
    ask = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"]
    said = "nvidia-smi is not there"
    if shutil.which(ask[0]):
        done = subprocess.run(ask, capture_output=True, text=True, check=False, timeout=20)
        said = " | ".join((done.stdout or done.stderr).splitlines())
    facts.note(f"nvidia-smi: {ASKED}", said)
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    facts.note(
        "torch sees", f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB, "
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}",
    )  # fmt: skip
