"""What a figure was measured on and with."""

import os
import shutil
import subprocess
from pathlib import Path


def here() -> str:
    """One line: cores, what they compute in, accelerator, torch, commit."""
    return f"{hardware()}, commit {commit()}"


def commit() -> str:
    """Of the checkout; unknown where there is no git."""
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "describe", "--always", "--dirty"]
    said = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
    return said or "unknown"


def hardware() -> str:
    """The same without the commit."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    level = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores ({level}), {gpu}, torch {torch.__version__}"
