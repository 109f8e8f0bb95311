"""python -m benchmarks: every benchmark that fits this machine; each writes its file under benchmarks/results/."""

import subprocess
import sys

COMMANDS = (
    ["benchmarks.load_memory"],
    ["benchmarks.saving"],
    ["benchmarks.scaling"],
    ["benchmarks.memory"],
    *(["benchmarks.speed", "--mode", mode] for mode in ("lora", "full")),
    ["benchmarks.speed", "--mode", "qlora", "--peers", "dsft-1024,plain,trl,trl-best"],
    ["benchmarks.speed_ranks"],
)


def main() -> int:
    """Run them one after the other; the largest exit code."""
    return max(subprocess.run([sys.executable, "-m", *words], check=False).returncode for words in COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
