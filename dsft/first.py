"""What a process of dsft does before it imports anything: no file of the folder that it starts in passes for a library.

`python -m dsft.VERB` puts that folder before all that is installed, and an empty entry of PYTHONPATH means it too. A
verb that runs what was typed searches it last (searched.py). Nothing changes in programs that only import dsft.
"""

import os
import sys

SCRIPT = "dsft"
"""What the console script is called."""


def _forget_the_folder() -> None:
    by_module = sys.argv[:1] == ["-m"] and _name(sys.orig_argv[-len(sys.argv)]) == SCRIPT
    if not by_module and os.path.basename(sys.argv[0] if sys.argv else "") != SCRIPT:
        return
    if by_module and not sys.flags.safe_path:
        del sys.path[0]
    try:
        os.getcwd()
    except OSError:  # it was deleted: nothing is found there
        return
    listed = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if len(listed) > 1 and "" in listed:
        named = {os.path.realpath(entry) for entry in listed if entry}
        here = os.path.realpath(os.curdir)
        sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != here or here in named]


def _name(word: str) -> str:
    """The package that the word behind -m names, or the one that is written as one with it."""
    return word.removeprefix("-m").partition(".")[0]


_forget_the_folder()
