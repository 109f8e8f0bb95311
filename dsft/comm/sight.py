"""Whether torch can use the GPUs that a process is to compute on; a run that finds none would train on the CPU."""

import warnings
from collections.abc import Mapping

import torch
from dsft_launchers.join import VISIBLE, count_devices, promised_devices

ON_CPUS = "take launcher.gpus=none to train on the CPU"
TOO_OLD = "driver on your system is too old"
"""How torch begins to say it."""


def refuse_unusable(env: Mapping[str, str]) -> None:
    """Raise ValueError, one line, if torch can use none of the GPUs that env lets this process see."""
    if why := unusable(env):
        raise ValueError(why)


def unusable(env: Mapping[str, str]) -> str | None:
    """Why torch can use none of the GPUs that env promises, with the way out, in one line.

    None if it can use some, or none are promised: then nothing is asked. Starts CUDA, which takes no memory of a GPU.
    """
    count = promised_devices(env)
    if not count:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch would warn of is said below
        if torch.cuda.is_available():
            return None
    what = "GPU" if count == 1 else f"{count} GPUs"
    place = f"{VISIBLE}={env[VISIBLE]}" if VISIBLE in env else "this machine" if count_devices(env) else "the SLURM job"
    return f"the {what} of {place} must be usable by torch {torch.__version__}, got: {'; '.join(_why())}, or {ON_CPUS}"


def without_cuda() -> bool:
    """Whether this torch is a build for CPUs alone."""
    return torch.version.cuda is None and torch.version.hip is None


def _why() -> tuple[str, str]:
    """Start CUDA through torch, and return its message and the way out."""
    if without_cuda():
        return "it was built without CUDA", "install a build for CUDA"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        said = " ".join(str(error).split()).partition(". Please")[0].removesuffix(".")
        if TOO_OLD in said:
            return said, f"update the driver, or install a torch for an older CUDA than {torch.version.cuda}"
        return said, "look at nvidia-smi (a container needs its option for GPUs, as apptainer exec --nv)"
    return "it finds none", "look at nvidia-smi"
