"""What a run is made with: versions of packages, and the commit of this code."""

import importlib.metadata
import subprocess
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "hydra-core", "numpy")


def versions() -> dict[str, str]:
    """Versions of PACKAGES, "absent" where one is not installed, and of packages that add options."""
    points = importlib.metadata.entry_points(group="dsft.configs")
    found = {point.dist.name: point.dist.version for point in points if point.dist is not None}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> str | None:
    """The commit of the checkout that dsft runs from, with + if it has changes; None in an installed wheel."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") or None
