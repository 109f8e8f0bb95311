"""The console script: dsft VERB ... is python -m dsft.VERB ..."""

import importlib
import sys
from typing import NoReturn

from dsft import __version__
from dsft.entry import enter
from dsft.searched import own_folder_last

VERBS = {
    "run": "[overrides]: compose, check, launch, train, evaluate, export; -m runs a sweep",
    "plan": "[overrides] [--gpu N] [--json]: what a run would be, without weights",
    "stage": "[overrides]: fetch what a run needs of the network, and tokenise",
    "sweep": "status|resume|retry|cancel|table SWEEP",
    "export": "RUN --to adapter|merged OUT",
    "chat": "RUN [RUN2 ...]: talk to the base and to what was trained",
}
"""Verb -> what it takes and does."""

TYPED = ("run", "plan", "stage", "sweep")
"""Verbs that run what is typed, and so may import modules of the folder in which it is."""

USAGE = "usage: dsft VERB ... | --help | --version\n" + "\n".join(
    f"  dsft {verb} {does}" for verb, does in VERBS.items()
)


def main() -> NoReturn:
    """Begin, and hand the arguments to the verb."""
    enter(hand_over)


def hand_over() -> int:
    """Do what sys.argv says; returns the exit code, 2 where it names no verb."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in ("--version", "-V"):
        print(f"dsft {__version__}")
        return 0
    if verb in ("--help", "-h"):
        print(USAGE)
        return 0
    if verb not in VERBS:
        print(USAGE, file=sys.stderr)
        return 2
    if verb in TYPED:
        own_folder_last()
    code: int = importlib.import_module(f"dsft.{verb}").main(sys.argv[2:])
    return code


if __name__ == "__main__":
    main()
