"""Which rank is the cause when a launch fails, and what to show of its log."""

import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TRACEBACK = "Traceback (most recent call last):"
TORCH_PREFIX = re.compile(r"^\[rank\d+\]: ?")
"""Before every line of an uncaught exception once a process group exists."""
LINES_BEFORE, LINES_AFTER = 10, 4
"""How much of a traceback to show around the line that names the exception."""

CONSEQUENCE = re.compile(
    r"connection (reset|closed|refused|was aborted)|broken pipe|pair closure|socket timeout|"
    r"Dist(Network|Store|Backend)Error|remote process exited|ncclRemoteError|ncclSystemError|recvValue failed|"
    r"timed out|watchdog caught collective",
    re.IGNORECASE,
)
"""What a rank says (gloo, NCCL, the store) when it lost a peer."""

CRASH = "dsft: this rank crashed: "
"""How a rank's last word begins when it raised an error."""
WAITED = "dsft: this rank waited too long for another: "
"""How the last word of a rank begins that gave up; its stacks follow."""
WENT_ON = "dsft: this rank goes on after all"
"""What it says if what it waited for came before it left."""
CANNOT_BEGIN = "dsft: cannot begin: "
"""How the only word of a rank begins where the ranks do not fit together, or not all came."""
OVERTAKEN = "was taken over by "
"""What a rank says that lost its run folder to another start."""


class CannotBeginError(RuntimeError):
    """A rank is missing, or the ranks do not fit together: the cluster's state, in one line."""


@dataclass(frozen=True)
class Failure:
    """A rank that ended wrongly. code as in subprocess: negative = signal; at: when seen; text: end of its log."""

    rank: int
    code: int
    at: float
    text: str


def cause(failures: Iterable[Failure]) -> Failure:
    """The failure that the others follow from.

    Among ranks that died close together: one killed by a signal, then one with an error of its own, then one without
    any, then those that only lost a peer; among equals the first.
    """
    return min(failures, key=lambda failure: (_weight(failure), failure.at, failure.rank))


def _weight(failure: Failure) -> int:
    if failure.code < 0 and failure.code != -signal.SIGABRT:  # C++ libraries abort when they lose a peer
        return 0
    error = "\n".join(error_lines(failure.text))
    if CONSEQUENCE.search(error):
        return 3
    if failure.code < 0:
        return 0
    return 1 if error else 2


def error_lines(text: str) -> list[str]:
    """The end of the last traceback in text, or the last lines if there is none."""
    lines = [line for line in (TORCH_PREFIX.sub("", line.rstrip()) for line in text.splitlines()) if line]
    starts = [index for index, line in enumerate(lines) if line.endswith(TRACEBACK)]
    if not starts:
        return lines[-LINES_BEFORE:]
    start = starts[-1]
    named = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith(" ")), len(lines) - 1)
    return lines[max(start, named - LINES_BEFORE) : named + LINES_AFTER + 1]


def raised(text: str) -> bool:
    """Whether the rank that wrote text raised an error of its own, not for the loss of a peer."""
    return any(line.startswith(CRASH) and not CONSEQUENCE.search(line) for line in text.splitlines())


def hung(texts: Sequence[str]) -> list[int] | None:
    """Ranks that others gave up waiting for, from what each wrote; empty: all waited. None if nobody gave up."""
    waited = [text.rfind(WAITED) > text.rfind(WENT_ON) for text in texts]
    return [rank for rank, mine in enumerate(waited) if not mine] if any(waited) else None


def missing(texts: Sequence[str]) -> list[int]:
    """Ranks that never said what the others did, that they cannot begin; none if nobody or everybody did."""
    mine = [CANNOT_BEGIN in text for text in texts]
    return [rank for rank, said in enumerate(mine) if not said] if any(mine) else []


def cannot_begin(texts: Iterable[str]) -> str | None:
    """Why the ranks that wrote texts could not begin; None if none of them says so."""
    lines = (line for text in texts for line in text.splitlines() if line.startswith(CANNOT_BEGIN))
    return next((line.removeprefix(CANNOT_BEGIN) for line in lines), None)


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
    """What the user reads on stderr when a launch fails."""
    lines = error_lines(failure.text)
    shown = "".join(f"\n    {line}" for line in lines) if lines else "\n    (it wrote nothing)"
    return f"dsft: rank {failure.rank} of {num_processes} {how(failure.code)}; its last lines ({log}):{shown}\n"
