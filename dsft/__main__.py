"""The console script: dsft VERB ... is python -m dsft.VERB ..."""

import importlib
import sys
from typing import NoReturn

from dsft.entry import enter

VERBS = ("run", "plan", "stage", "export", "chat", "sweep")


def main() -> NoReturn:
    """Begin, and hand the arguments to the verb."""
    enter(_hand_over)


def _hand_over() -> int:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb not in VERBS:
        print(f"usage: dsft {{{','.join(VERBS)}}} ...", file=sys.stderr)
        return 2
    code: int = importlib.import_module(f"dsft.{verb}").main(sys.argv[2:])
    return code


if __name__ == "__main__":
    main()
