"""One check in its process: python -m benchmarks.gpu.check NAME [--cpu] [--plant hang|die]; started by the runner."""

import os
import signal
import sys
import time
from collections.abc import Sequence

CODES = {False: 0, True: 1}


def planted(argv: Sequence[str]) -> None:
    """The fault that --plant names happens here: before torch is imported, so that it costs no more than its limit."""
    if "--plant" in argv:
        if argv[argv.index("--plant") + 1] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            time.sleep(3600)


def main() -> int:
    """Import, wait for the word to begin, check. 1 if a fact is not as it must be."""
    words = sys.argv[1:]
    planted(words)
    from importlib import import_module

    from benchmarks.gpu.facts import Facts
    from benchmarks.gpu.listed import place
    from benchmarks.gpu.scene import Scene

    module, _, function = place(words[0]).partition(":")
    check = getattr(import_module(module), function)
    from dsft.entry import collect_again

    collect_again()
    given = sys.stdin.readline()
    if not given:
        return 1  # the runner is gone
    facts = Facts.here()
    with facts.part("the whole check"):
        check(Scene.here(cpu="--cpu" in words, seconds=float(given)), facts)
    return CODES[facts.failed]


if __name__ == "__main__":
    from dsft.entry import enter

    enter(main)
