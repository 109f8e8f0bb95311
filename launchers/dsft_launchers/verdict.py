"""What the ranks of a launch say with their last words, which of them failed first, and what to show of its log."""

import re
import signal
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dsft_launchers.codes import CRASHED, DIVERGED, USER_ERROR

TRACEBACK = "Traceback (most recent call last):"
TORCH_PREFIX = re.compile(r"^\[rank\d+\]: ?")
"""Before every line of an uncaught exception once a process group exists."""
LINES_BEFORE, LINES_AFTER = 10, 4
"""How much of a traceback to show around the line that names the exception."""

CONSEQUENCE = re.compile(
    r"connection (reset|closed|refused|was aborted)|broken pipe|pair closure|socket timeout|/gloo/\S+\.cc:\d+\]|"
    r"Dist(Network|Store|Backend)Error|remote process exited|ncclRemoteError|ncclSystemError|recvValue failed|"
    r"watchdog caught collective",
    re.IGNORECASE,
)
"""What a process writes (gloo, NCCL, the store) that lost a peer and died without one of the words below."""

CRASH = "dsft: this rank crashed: "
"""How a rank's last word begins when it raised an error."""
LOST_PEER = "dsft: this rank lost a peer: "
"""How the last word of a rank begins, in place of CRASH, whose error is only that another rank left."""
HANGS = "dsft: this rank hangs: "
"""How the last word of a rank begins that overran its limit while it did not wait for others; its stacks follow."""
WAITED = "dsft: this rank waited too long for another: "
"""How the last word of a rank begins that gave up; its stacks follow."""
WENT_ON = "dsft: this rank goes on after all"
"""What it says if what it waited for came before it left."""
CANNOT_BEGIN = "dsft: cannot begin: "
"""How the only word of a rank begins where the ranks do not fit together, or not all came."""
REFUSED = "dsft: cannot go on: "
"""How the only word of a rank begins whose run cannot go on without a decision of its user."""
DIVERGES = "dsft: diverged: "
"""How the only word of a rank begins whose run has left the numbers that a computer has."""
WAY_OUT = "lower optim.lr and begin again with resume.anew=true"
OVERTAKEN = "was taken over by "
"""What a line of ours holds, of a rank that lost its run folder to another start."""


WORDS = (CRASH, LOST_PEER, HANGS, WAITED, CANNOT_BEGIN, REFUSED, DIVERGES)


class CannotBeginError(RuntimeError):
    """A rank is missing, or the ranks do not fit together: the cluster's state, in one line."""


class RefusedError(RuntimeError):
    """The run cannot go on without a decision of its user; the message says in one line why, and the way out."""


class DivergedError(RuntimeError):
    """A loss, a gradient or a logit is no number any more, on every rank; one line, with the step and the way out."""


class LastWord(NamedTuple):
    """How a rank left, in its own words. word: one of those above; said: the rest of its line; before: the log before.

    What follows in the log is no part of it: stacks, or the interpreter's end going wrong too.
    """

    word: str
    said: str
    before: str


def last_word(text: str) -> LastWord | None:
    """Return the last word of the rank that wrote text, None if it said none.

    A rank that gave up, and then sees its peers leave as well, has not lost them: the others wait for the same one.
    """
    found, before = None, 0
    for line in text.split("\n"):
        word = next((each for each in WORDS if line.startswith(each)), None)
        gave_up = found is not None and found.word in (WAITED, HANGS)
        if line.startswith(WENT_ON) and gave_up:
            found = None
        elif word is not None and not (word == LOST_PEER and gave_up):
            found = LastWord(word, line.removeprefix(word).strip(), text[:before])
        before += len(line) + 1
    return found


@dataclass(frozen=True)
class Failure:
    """A rank that ended wrongly. code as in subprocess: negative = signal; at: when seen; text: end of its log."""

    rank: int
    code: int
    at: float
    text: str

    @property
    def own_code(self) -> int:
        """What the rank left with; what became of it after its last word is not its doing."""
        word = last_word(self.text)
        if word is None or self.code >= 0:
            return self.code
        return {REFUSED: USER_ERROR, DIVERGES: DIVERGED}.get(word.word, CRASHED)


def cause(failures: Iterable[Failure]) -> Failure:
    """Return the failure that the others follow from.

    Among ranks that died close together: one killed by a signal, then one with an error of its own, then one without
    any, then those that only lost a peer; among equals the first.
    """
    return min(failures, key=lambda failure: (weight(failure), failure.at, failure.rank))


KILLED, RAISED, SILENT, FOLLOWED = range(4)
"""Weights of failures: the lower, the likelier it is what the others follow from."""


def weight(failure: Failure) -> int:
    """Return which of the four kinds above a failure is: by its last word, else by its signal and its error's text."""
    if word := last_word(failure.text):
        return FOLLOWED if word.word == LOST_PEER else RAISED
    if failure.code < 0 and failure.code != -signal.SIGABRT:  # C++ libraries abort when they lose a peer
        return KILLED
    error = "\n".join(error_lines(failure.text))
    if CONSEQUENCE.search(error):
        return FOLLOWED
    if failure.code < 0:
        return KILLED
    return RAISED if error else SILENT


def followed(failure: Failure) -> bool:
    """Return True if a rank may have failed only because another left, or never came."""
    word = last_word(failure.text)
    return weight(failure) == FOLLOWED or (word is not None and word.word in (WAITED, CANNOT_BEGIN))


def error_lines(text: str) -> list[str]:
    """Return the end of the last traceback in text, or the last lines if there is none."""
    lines = _lines(text)
    start, named = _traceback(lines)
    return lines[-LINES_BEFORE:] if start is None else lines[max(start, named - LINES_BEFORE) : named + LINES_AFTER + 1]


def error_line(text: str) -> str:
    """Return the line that names the exception of the last traceback in text, or the last line; empty if none."""
    lines = _lines(text)
    start, named = _traceback(lines)
    return (lines[-1] if lines else "") if start is None else lines[named]


def _lines(text: str) -> list[str]:
    return [line for line in (TORCH_PREFIX.sub("", line.rstrip()) for line in text.splitlines()) if line]


def _traceback(lines: Sequence[str]) -> tuple[int | None, int]:
    """Return where the last traceback begins, None if there is none, and the line that names its exception."""
    starts = [index for index, line in enumerate(lines) if line.endswith(TRACEBACK)]
    if not starts:
        return None, 0
    named = next((i for i in range(starts[-1] + 1, len(lines)) if not lines[i].startswith(" ")), len(lines) - 1)
    return starts[-1], named


def raised(text: str) -> bool:
    """Return True if the rank that wrote text raised an error of its own, not for the loss of a peer."""
    word = last_word(text)
    return word is not None and word.word == CRASH


def hung(texts: Sequence[str], left: Collection[int] = ()) -> list[int] | None:
    """Return the ranks that hang, from what each wrote; None if none said that it hangs or gave up waiting.

    Those that say so themselves, else those without a word while others gave up, else those that went on once others
    had left, as a stopped rank does that SLURM wakes to end it; empty: all gave up. left: ranks that ended by
    themselves, which hang no more.
    """
    words = [word.word if (word := last_word(text)) else None for text in texts]
    if HANGS in words:
        return [rank for rank, word in enumerate(words) if word == HANGS]
    if WAITED not in words:
        return None
    silent = [rank for rank, word in enumerate(words) if word is None and rank not in left]
    return silent or [rank for rank, word in enumerate(words) if word == LOST_PEER]


def missing(texts: Sequence[str]) -> list[int]:
    """Return the ranks that never said what the others did, that they cannot begin; none if nobody or everybody did."""
    mine = [CANNOT_BEGIN in text for text in texts]
    return [rank for rank, said in enumerate(mine) if not said] if any(mine) else []


def how(code: int) -> str:
    """In words, how a process with this return code ended."""
    if code >= 0:
        return f"left with exit code {code}"
    if -code == signal.SIGKILL:
        return "was killed by SIGKILL (kill -9, or the machine ran out of memory)"
    return f"was killed by {signal_name(-code)}"


def signal_name(number: int) -> str:
    """SIGTERM for 15."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def report(failure: Failure, num_processes: int, log: str) -> str:
    """Return what the user reads on stderr when a launch fails."""
    word = last_word(failure.text)
    lines = error_lines(word.before if word else failure.text) or ([word.said] if word else [])
    shown = "".join(f"\n    {line}" for line in lines) if lines else "\n    (it wrote nothing)"
    return f"dsft: rank {failure.rank} of {num_processes} {how(failure.own_code)}; its last lines ({log}):{shown}\n"
