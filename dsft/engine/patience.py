"""Limits how long a rank may take in each phase of a run, so that one that hangs ends the attempt in a stated time.

One rank that hangs makes all others wait in a collective, for half an hour by torch's default. A stopped process cannot
say so; the others can. Whoever overruns a limit writes whether it waited or hung itself, with its stacks, and leaves.
"""

import faulthandler
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from threading import Event, Thread
from typing import Any

from dsft_launchers.codes import CRASHED
from dsft_launchers.outside import Outside
from dsft_launchers.verdict import HANGS, WAITED, WENT_ON

from dsft.comm.meeting import last_word, say
from dsft.engine.limits import NOTHING, Limits
from dsft.engine.waiting import waits

FEWEST, RECENT = 3, 50
"""Steps before their median says anything; how many of the last ones it is taken of."""
LATITUDE = 3.0
"""Medians that a step may take; of the seconds per token, where it has more tokens than others."""
ONCE_S = 40.0
"""Seconds that a phase may take besides its work and margin_s if none like it was timed: imports, a busy machine."""
POLL_S = 0.25
BEAT_S = 1.0
"""How often the process beside this one hears that the interpreter runs."""
SILENT_S = 60.0
"""How long it may hear nothing, besides what is left of a limit."""
LONGEST_S = 86400.0
"""At most so much of what is left counts: outside of phases no limit is known."""
UNEVEN_S = 300.0
"""More patience where a rank may work while the others wait: it compiles, or writes the trace of a profile."""


@dataclass(frozen=True)
class Limit:
    """One phase: its name, when it began, until when it may last (monotonic seconds), and how that was found."""

    name: str
    begun: float
    until: float
    bound: str


IDLE = Limit("no phase", 0.0, math.inf, "")


class Patience:
    """The limits of one rank for its whole life: a context, whose thread looks at the phase that it is in.

    margin_s: seconds beyond what is usual, train.hang_after; inf: nothing is limited. limits: what is usual before it
    was timed. leaves: called with the reason before the process ends.
    """

    def __init__(
        self, margin_s: float, limits: Limits = NOTHING, *, leaves: Callable[[str], None] = lambda _: None
    ) -> None:
        self.margin_s, self.limits, self.leaves = margin_s, limits, leaves
        self.seconds: deque[float] = deque(maxlen=RECENT)
        self.paces: deque[float] = deque(maxlen=RECENT)
        self.ranks, self.uneven_s = 1, 0.0
        self.now, self.inside = IDLE, 0
        self.broken = False
        self.closed = Event()
        self.main = threading.current_thread()
        self.thread = Thread(target=self._attend, name="patience", daemon=True)
        self.outside: Outside | None = None

    def __enter__(self) -> "Patience":
        if math.isfinite(self.margin_s):
            if not faulthandler.is_enabled() and sys.__stderr__ is not None:  # a SIGABRT from outside shows the stacks
                faulthandler.enable(sys.__stderr__)
            self.now = self._once("start")
            self.outside = Outside()
            self.outside.beat(SILENT_S, "start")
            self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closed.set()
        if self.thread.is_alive():
            self.thread.join()
        if self.outside is not None:
            self.outside.close()

    def expect(self, ranks: int, *, uneven: bool) -> None:
        """Set over how many ranks a step's tokens are shared; uneven: ranks may compile, or write a profile."""
        self.ranks, self.uneven_s = ranks, UNEVEN_S if uneven else 0.0

    @contextmanager
    def phase(self, name: str, work_s: float) -> Iterator[None]:
        """Limit what happens inside to work_s plus ONCE_S plus margin_s; a phase around it waits meanwhile."""
        outer = self.now
        self.now = inner = self._once(name, work_s)
        self.inside += 1
        try:
            yield
        except BaseException:
            self.broken = True  # the run ends here: nobody goes on
            raise
        finally:
            self.inside -= 1
            spent = time.monotonic() - inner.begun
            self.now = replace(outer, until=outer.until + spent) if self.inside else self._once(name)

    def timed(self, name: str, seconds: float) -> AbstractContextManager[None]:
        """Limit what has a timeout of its own, seconds, to that and margin_s."""
        return self.phase(name, seconds - ONCE_S)

    @contextmanager
    def limit(self, step: int, *, tokens: int = 0) -> Iterator[None]:
        """Limit a part of a step. tokens: of a whole step over all ranks, whose seconds count for the median."""
        begun = time.monotonic()
        if len(self.seconds) >= FEWEST:
            median = statistics.median(self.seconds)
            usual = max(median, statistics.median(self.paces) * tokens)
            until, bound = begun + LATITUDE * usual + self.margin_s + self.uneven_s, f"the median is {median:.2f} s"
        else:
            seconds = ONCE_S + self.limits.step_s(-(-tokens // self.ranks)) + self.margin_s + self.uneven_s
            until, bound = begun + seconds, f"at most {seconds:.0f} s for one of the first"
        self.now = Limit(f"step {step}", begun, until, bound)
        try:
            yield
        except BaseException:
            self.broken = True
            raise
        finally:
            begun = self.now.begun
            self.now = self._once(f"step {step}")
        if tokens:
            self.seconds.append(time.monotonic() - begun)
            self.paces.append(self.seconds[-1] / tokens)

    def apart(self, work: Callable[[], None], name: str, work_s: Callable[[], float]) -> Callable[[], None]:
        """Return work as a phase of its own inside of a step, whose limit and median it does not count for."""

        def limited() -> None:
            step, begun = self.now, time.monotonic()
            with self.phase(name, work_s()):
                work()
            spent = time.monotonic() - begun
            self.now = replace(step, begun=step.begun + spent, until=step.until + spent)

        return limited

    def _once(self, name: str, work_s: float = 0.0) -> Limit:
        """Return the limit, from now on, of what was not timed before: a phase, or what follows it until the next."""
        seconds, begun = ONCE_S + work_s + self.margin_s + self.uneven_s, time.monotonic()
        return Limit(name, begun, begun + seconds, f"at most {seconds:.0f} s")

    def _attend(self) -> None:
        looked, known, asleep, beaten = time.monotonic(), IDLE, 0.0, 0.0
        while not self.closed.wait(POLL_S):
            limit, now = self.now, time.monotonic()
            if limit is not known:
                known, asleep = limit, 0.0
            asleep += max(0.0, now - looked - POLL_S)  # stopped itself: SIGSTOP or SLURM's suspend, then SIGCONT
            looked = now
            if now - beaten > BEAT_S and self.outside is not None:
                beaten = now
                self.outside.beat(SILENT_S + min(max(0.0, limit.until - now), LONGEST_S), limit.name)
            if now - asleep > limit.until:
                self._end(limit)

    def _end(self, limit: Limit) -> None:
        """Say why, and leave unless what this rank waited for came meanwhile."""
        word = WAITED if waits(self.main, accelerated=self.limits.device != "cpu") else HANGS
        why = f"{limit.name}: {time.monotonic() - limit.begun:.1f} s, {limit.bound} (train.hang_after)"
        last_word(why, word)
        if self.now is limit:
            self.leaves(f"{word.removeprefix('dsft: ')}{why}")
            os._exit(CRASHED)  # the main thread waits in a collective: nothing else ends it
        if not self.broken:
            say(WENT_ON)
