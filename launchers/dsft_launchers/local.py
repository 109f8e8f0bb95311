"""The local launcher: N processes on this machine that meet on a loopback port, and end together.

Linux only (PR_SET_PDEATHSIG, /proc). Must be called from the main thread.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from dsft_launchers import cause, orphans, verdict
from dsft_launchers.codes import CRASHED, DIVERGED, DONE, STOPPED, USER_ERROR
from dsft_launchers.place import private_folder
from dsft_launchers.processes import Rank, defaults, pass_through, rank_env, start
from dsft_launchers.shown import say, shown
from dsft_launchers.stop import FORWARDED, Stop, stop_signals

POLL_S = 0.05
SETTLE_S = 1.0
"""How long to watch, after the first failure, who else dies by itself: tells the cause from its consequences."""


class Ending(NamedTuple):
    """The exit code of a launch, and the cause of its end in one line or several; None if it is done or stopped."""

    code: int
    reason: str | None


LINES = {
    "refused": verdict.REFUSED,
    "diverged": verdict.DIVERGES,
    "user error": "",
    "cannot begin": verdict.CANNOT_BEGIN,
    "gave up": "dsft: ",
}
"""Causes that are a rank's own line, with how it begins."""
CODES = {"refused": USER_ERROR, "user error": USER_ERROR, "diverged": DIVERGED}
"""Exit codes of causes; of all others CRASHED."""


@dataclass(frozen=True)
class _Patience:
    """How long ranks may take to leave: asked to stop; ended because another failed."""

    grace_s: float
    kill_after_s: float


@dataclass
class _Outcome:
    """How the launch ended. failures: ranks that died by themselves; overdue: ranks killed after a request to stop."""

    failures: list[Rank] = field(default_factory=list)
    overdue: list[Rank] = field(default_factory=list)


def launch(
    command: Sequence[str],
    *,
    num_processes: int,
    log_dir: Path,
    env: Mapping[str, str],
    grace_s: float = 300.0,
    kill_after_s: float = 5.0,
) -> int:
    """Run num_processes of command as run_ranks does, and return the exit code alone."""
    return run_ranks(
        command, num_processes=num_processes, log_dir=log_dir, env=env, grace_s=grace_s, kill_after_s=kill_after_s
    ).code


def run_ranks(
    command: Sequence[str],
    *,
    num_processes: int,
    log_dir: Path,
    env: Mapping[str, str],
    grace_s: float = 300.0,
    kill_after_s: float = 5.0,
) -> Ending:
    """Run num_processes of command on this machine, and return the launch's exit code and the cause of its end.

    Each gets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and DSFT_MEETING, a folder of this user alone in which they
    meet; env is added to this process' environment. Output goes to log_dir/rank-<r>.log (appended), rank 0's to the
    terminal as well.

    0: every rank done. 2: the user's input is wrong (a rank left with 2, its line is on stderr). 75: stopped on
    request. 76: anything else; stderr names the rank and shows its error. grace_s: time to leave after SIGINT or
    SIGTERM, which are passed on once; kill_after_s: between SIGTERM and SIGKILL when another rank has failed. No
    process of the launch is left when this returns, nor when this process is killed.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    patience = _Patience(grace_s=grace_s, kill_after_s=kill_after_s)
    mark = orphans.new_mark(os.environ)
    ranks: list[Rank] = []
    tees: list[Thread] = []
    with stop_signals() as stop, private_folder() as place, orphans.watched(mark, place):
        try:
            for index in range(num_processes):
                shared = {**os.environ, **defaults(num_processes), **env, orphans.MARK: mark}
                ranks.append(start(command, index, log_dir, {**shared, **rank_env(index, num_processes, place)}))
            tees = pass_through(ranks[0])
            outcome = _attend(ranks, stop, patience)
        finally:
            for rank in ranks:
                rank.send_group(signal.SIGKILL)
            orphans.end(mark, patience_s=kill_after_s if all(rank.code == DONE for rank in ranks) else 0.0)
            for tee in tees:
                tee.join(timeout=2.0)
    try:
        return _conclude(outcome, ranks, stop, patience)
    finally:
        for rank in ranks:
            rank.written.close()


def _attend(ranks: list[Rank], stop: Stop, patience: _Patience) -> _Outcome:
    """Wait until every rank has ended, one has failed and the others were ended, or the grace of a stop is over."""
    while _running(ranks):
        if _failures(ranks, stop):
            failures = _settle(ranks, stop)
            _end(ranks, patience)
            return _Outcome(failures=failures)
        _forward(ranks, stop, patience)
        if stop.deadline is not None and time.monotonic() > stop.deadline:
            return _Outcome(overdue=[] if _young(ranks, stop) else _running(ranks))
        time.sleep(POLL_S)
    return _Outcome(failures=_failures(ranks, stop))


def _running(ranks: list[Rank]) -> list[Rank]:
    return [rank for rank in ranks if rank.poll()]


def _failures(ranks: list[Rank], stop: Stop) -> list[Rank]:
    """The ranks that ended wrongly; not those that followed one that was too young to save when it was asked to."""
    wrong = [rank for rank in ranks if rank.code not in (None, DONE, STOPPED) and not _obeyed(rank, stop)]
    return [rank for rank in wrong if not verdict.followed(_failure(rank))] if _young(ranks, stop) else wrong


def _failure(rank: Rank) -> verdict.Failure:
    return verdict.Failure(rank.index, CRASHED if rank.code is None else rank.code, rank.at, rank.text())


def _obeyed(rank: Rank, stop: Stop) -> bool:
    """Whether it died of the signal that was passed on: too young to have bound it, it had nothing to save."""
    return stop.deadline is not None and rank.code in (-signal.SIGINT, -signal.SIGTERM)


def _young(ranks: list[Rank], stop: Stop) -> list[Rank]:
    """The ranks that died of the request to stop. The others cannot save without them."""
    return [rank for rank in ranks if _obeyed(rank, stop)]


def _forward(ranks: list[Rank], stop: Stop, patience: _Patience) -> None:
    """Pass a request to stop on, once; shorten the grace if a rank has died of it, since then no rank can save."""
    if stop.number is None:
        return
    if stop.deadline is None:
        stop.deadline = time.monotonic() + patience.grace_s
        name = verdict.signal_name(stop.number)
        _tell(f"dsft: {name}: asked {len(_running(ranks))} ranks to save and leave, {patience.grace_s:g} s at most\n")
        for rank in ranks:
            rank.send(FORWARDED[signal.Signals(stop.number)])
    elif _young(ranks, stop):
        stop.deadline = min(stop.deadline, time.monotonic() + patience.kill_after_s)


def _settle(ranks: list[Rank], stop: Stop) -> list[Rank]:
    """Ranks that died by themselves, seen after a moment in which the others may follow."""
    until = time.monotonic() + SETTLE_S
    while _running(ranks) and time.monotonic() < until:
        time.sleep(POLL_S)
    return _failures(ranks, stop)


def _end(ranks: list[Rank], patience: _Patience) -> None:
    """SIGTERM to whoever still runs, and time to leave."""
    for rank in ranks:
        rank.send_group(signal.SIGTERM)
    until = time.monotonic() + patience.kill_after_s
    while _running(ranks) and time.monotonic() < until:
        time.sleep(POLL_S)


def _conclude(outcome: _Outcome, ranks: list[Rank], stop: Stop, patience: _Patience) -> Ending:
    """The exit code and the cause; on stderr the cause too, if there is something to say."""
    if outcome.failures:
        found = cause.find([rank.text() for rank in ranks], map(_failure, outcome.failures))
        assert found is not None, "some ranks ended by themselves"
        _show(found, ranks)
        return Ending(CODES.get(found.kind, CRASHED), found.reason)
    if outcome.overdue:
        names = ", ".join(str(rank.index) for rank in outcome.overdue)
        why = f"still running {patience.grace_s:g} s after the request to stop"
        _tell(f"dsft: killed rank {names}: {why}\n")
        return Ending(CRASHED, f"rank {names} was {why}, and was killed")
    if young := _young(ranks, stop):
        names = ", ".join(str(rank.index) for rank in young)
        _tell(f"dsft: stopped without a save: rank {names} had only just begun\n")
    return Ending(DONE if all(rank.code == DONE for rank in ranks) else STOPPED, None)


def _show(found: cause.Cause, ranks: list[Rank]) -> None:
    """Tell the cause on stderr, unless rank 0 said the same in a line of its own: that is there already."""
    blamed = ranks[found.rank]
    if found.kind in ("hangs", "stuck"):
        _tell(f"dsft: {found.reason}; the stacks are in {blamed.log.parent}\n")
    elif found.kind in LINES:
        same = found.kind == "user error" and ranks[0].code == USER_ERROR
        word = verdict.last_word(ranks[0].text())
        if blamed.index != 0 and not same and (word is None or word.word != LINES[found.kind]):
            _tell(f"{LINES[found.kind]}{found.reason.removeprefix('cannot begin: ')}\n")
    else:
        _tell(verdict.report(_failure(blamed), len(ranks), str(blamed.log)))


def _tell(text: str) -> None:
    first, _, others = text.removesuffix("\n").partition("\n")
    say(first)
    if others:
        sys.stderr.write(shown(f"{others}\n"))
        sys.stderr.flush()
