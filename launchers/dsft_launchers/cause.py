"""What a launch failed of: the one cause among all that its ranks said and how they ended."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dsft_launchers import verdict
from dsft_launchers.codes import CRASHED, DIVERGED, HOPELESS, USER_ERROR
from dsft_launchers.verdict import Failure, LastWord

Kind = Literal[
    "refused",
    "diverged",
    "user error",
    "raised",
    "cannot begin",
    "gave up",
    "hangs",
    "stuck",
    "died",
    "lost",
    "node lost",
]
ENDS = {"refused": ("failed", HOPELESS, "cannot go on: "), "diverged": ("diverged", DIVERGED, "diverged: ")}
"""Causes that another start would meet again: the run's state, a job's exit code, and what its log says."""
NAMED = 16
"""Ranks that one line names."""


class Cause(NamedTuple):
    """What the end of a launch follows from. rank: whose doing it is; reason: in a line, with the rank and its error.

    kind "gave up": a rank left with a line of its own, as one whose run folder was taken over or removed; "stuck": all
    ranks hang, or waited for each other; "lost": nothing is known but who lost a peer first.
    """

    kind: Kind
    rank: int
    reason: str

    @property
    def counts(self) -> bool:
        """Whether it would come again wherever the ranks run: an error of the program, or of what it is given."""
        return self.kind in ("raised", "cannot begin", "stuck")


@dataclass(frozen=True)
class _Scene:
    """texts, words: what each rank wrote in this launch, and its last word; failures: of ranks that left by themselves.

    order: all ranks, those that left by themselves first, by time.
    """

    texts: Sequence[str]
    words: Sequence[LastWord | None]
    failures: Sequence[Failure]
    order: Sequence[int]

    def first(self, word: str) -> tuple[int, str] | None:
        """Return the first rank whose last word is word, and what it said."""
        said = ((rank, self.words[rank]) for rank in self.order)
        return next(((rank, last.said) for rank, last in said if last is not None and last.word == word), None)

    def unsaid(self) -> Failure | None:
        """Return the failure that others follow from among those of ranks without a last word."""
        found = [failure for failure in self.failures if self.words[failure.rank] is None]
        likeliest = verdict.cause(found) if found else None
        return None if likeliest is None or verdict.weight(likeliest) == verdict.FOLLOWED else likeliest


def find(texts: Sequence[str], failures: Iterable[Failure]) -> Cause | None:
    """Return the cause; None if no rank said anything and none is known to have ended by itself.

    texts: what each rank wrote in this launch. Words of the ranks come before guesses from signals and exit codes; a
    rank that was killed before what others say of it.
    """
    ended = sorted(failures, key=lambda failure: (failure.at, failure.rank))
    first = [failure.rank for failure in ended]
    order = [*first, *(rank for rank in range(len(texts)) if rank not in first)]
    scene = _Scene(texts, [verdict.last_word(text) for text in texts], ended, order)
    for look in (_refused, _diverged, _killed, _raised, _cannot_begin, _gave_up, _hangs, _died, _lost):
        if (found := look(scene)) is not None:
            return found
    return None


def _refused(scene: _Scene) -> Cause | None:
    said = scene.first(verdict.REFUSED)
    return Cause("refused", *said) if said else None


def _diverged(scene: _Scene) -> Cause | None:
    said = scene.first(verdict.DIVERGES)
    return Cause("diverged", *said) if said else None


def _killed(scene: _Scene) -> Cause | None:
    found = scene.unsaid()
    if found is None or verdict.weight(found) != verdict.KILLED:
        return None
    return Cause("died", found.rank, f"rank {found.rank} {verdict.how(found.code)}")


def _raised(scene: _Scene) -> Cause | None:
    said = scene.first(verdict.CRASH)
    return Cause("raised", said[0], f"rank {said[0]}: {said[1]}") if said else None


def _cannot_begin(scene: _Scene) -> Cause | None:
    said = scene.first(verdict.CANNOT_BEGIN)
    return Cause("cannot begin", said[0], f"cannot begin: {said[1]}") if said else None


def _gave_up(scene: _Scene) -> Cause | None:
    left = {failure.rank for failure in scene.failures if failure.code == CRASHED}
    for rank in scene.order:
        if scene.words[rank] is not None:
            continue
        said = scene.texts[rank].split("\n")
        lines = [line for line in said if line.startswith("dsft: ") and verdict.OVERTAKEN in line]
        if rank in left and (last := verdict.error_line(scene.texts[rank])).startswith("dsft: "):
            lines.append(last)
        if lines:
            return Cause("gave up", rank, lines[-1].removeprefix("dsft: "))
    return None


def _hangs(scene: _Scene) -> Cause | None:
    left = [failure.rank for failure in scene.failures]
    ranks = verdict.hung(scene.texts, left)
    if ranks is None:
        return None
    if said := scene.first(verdict.HANGS):
        phase, _, details = said[1].partition(": ")
        more = f": {details}" if details else ""
        kind: Kind = "stuck" if len(ranks) == len(scene.texts) else "hangs"
        return Cause(kind, ranks[0], f"{_named(ranks)} in {phase}{more}")
    waited = scene.first(verdict.WAITED)
    assert waited is not None
    phase = waited[1].partition(": ")[0]
    if ranks:
        return Cause("hangs", ranks[0], f"{_named(ranks)} in {phase}")
    if scene.unsaid() is None:
        return Cause("stuck", waited[0], f"all ranks waited for each other in {phase}")
    return None


def _named(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} hangs"
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"ranks {', '.join(map(str, ranks[:NAMED]))}{more} hang"


def _died(scene: _Scene) -> Cause | None:
    """Return the cause if it is a rank that ended without a word: by its traceback, its last line or its exit code."""
    found = scene.unsaid()
    if found is None:
        return None
    line = verdict.error_line(found.text)
    if found.code == USER_ERROR:
        return Cause("user error", found.rank, line)
    if verdict.TRACEBACK in found.text:
        return Cause("died", found.rank, f"rank {found.rank}: {line}")
    return Cause("died", found.rank, f"rank {found.rank} {verdict.how(found.code)}{f': {line}' if line else ''}")


def _lost(scene: _Scene) -> Cause | None:
    if said := scene.first(verdict.LOST_PEER):
        return Cause("lost", said[0], f"rank {said[0]} left first, for it lost a peer: {said[1]}")
    if not scene.failures:
        return None
    first = scene.failures[0]
    line = verdict.error_line(first.text)
    return Cause("lost", first.rank, f"rank {first.rank} left first, for it lost a peer: {line}")
