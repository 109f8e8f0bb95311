"""What a figure was measured on and with."""

import os
import subprocess
from pathlib import Path


def here() -> str:
    """One line: cores, what they compute in, accelerator, torch, commit."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
    return f"{hardware()}, commit {commit or 'unknown'}"


def hardware() -> str:
    """The same without the commit."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    level = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores ({level}), {gpu}, torch {torch.__version__}"
