"""python -m benchmarks: every benchmark that fits this machine; each writes its file under benchmarks/results/."""

import subprocess
import sys

MODULES = ("benchmarks.load_memory", "benchmarks.saving")


def main() -> int:
    """Run them one after the other; the largest exit code."""
    return max(subprocess.run([sys.executable, "-m", module], check=False).returncode for module in MODULES)


if __name__ == "__main__":
    sys.exit(main())
