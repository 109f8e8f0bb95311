"""The console script: dsft VERB ... is python -m dsft.VERB ..."""

import importlib
import sys

VERBS = ("run", "plan", "export")


def main() -> int:
    """Hand the arguments to the verb."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb not in VERBS:
        print(f"usage: dsft {{{','.join(VERBS)}}} ...", file=sys.stderr)
        return 2
    code: int = importlib.import_module(f"dsft.{verb}").main(sys.argv[2:])
    return code


if __name__ == "__main__":
    sys.exit(main())
