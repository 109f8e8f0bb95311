"""What a step may take: a rank that waits longer for the others says where, and leaves, so that all can begin again.

One rank that hangs makes all wait in a collective, for half an hour by torch's default. It cannot tell; they can.
"""

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

from dsft_launchers.codes import CRASHED
from dsft_launchers.verdict import WENT_ON

from dsft.comm.meeting import last_word, say

FEWEST, RECENT = 3, 50
"""Steps before their median says anything; how many of the last ones it is taken of."""
LATITUDE = 3.0
"""Medians that a step may take; of the seconds per token, where it has more tokens than others."""
POLL_S = 0.25
UNEVEN_S = 300.0
"""More patience where a rank may work while the others wait: it compiles, or writes the trace of a profile."""


class Patience:
    """Limits what it is told of to LATITUDE medians and margin_s; inf: no limit. A context: its thread lives in it."""

    def __init__(self, margin_s: float) -> None:
        self.margin_s = margin_s
        self.seconds: deque[float] = deque(maxlen=RECENT)
        self.paces: deque[float] = deque(maxlen=RECENT)
        self.step, self.tokens, self.begun, self.until = 0, 0, 0.0, math.inf
        self.broken = False
        self.closed = Event()
        self.thread = Thread(target=self._attend, name="patience", daemon=True)

    def __enter__(self) -> "Patience":
        if math.isfinite(self.margin_s):
            self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closed.set()
        if self.thread.is_alive():
            self.thread.join()

    @contextmanager
    def limit(self, step: int, *, tokens: int = 0) -> Iterator[None]:
        """Within: what may not take longer. tokens: of a whole step over all ranks, which counts for the median."""
        self.step, self.tokens = step, tokens
        self._begin()
        begun = self.begun
        try:
            yield
        except BaseException:
            self.broken = True  # the run ends here: nobody goes on
            raise
        finally:
            self.until = math.inf
        if tokens:
            self.seconds.append(time.monotonic() - begun)
            self.paces.append(self.seconds[-1] / tokens)

    def apart(self, work: Callable[[], None]) -> Callable[[], None]:
        """Work that may take as long as it likes, inside of what is limited."""

        def unlimited() -> None:
            self.until = math.inf
            work()
            self._begin()

        return unlimited

    def _begin(self) -> None:
        self.begun = time.monotonic()
        if len(self.seconds) >= FEWEST:
            usual = max(statistics.median(self.seconds), statistics.median(self.paces) * self.tokens)
            self.until = self.begun + LATITUDE * usual + self.margin_s

    def _attend(self) -> None:
        looked, until, asleep = time.monotonic(), math.inf, 0.0
        while not self.closed.wait(POLL_S):
            if until != self.until:
                until, asleep = self.until, 0.0
            now = time.monotonic()
            asleep += max(0.0, now - looked - POLL_S)  # stopped itself: SIGSTOP or SLURM's suspend, then SIGCONT
            looked = now
            if now - asleep > until:
                waited, median = time.monotonic() - self.begun, statistics.median(self.seconds)
                last_word(f"step {self.step}: {waited:.1f} s, the median is {median:.2f} s (train.hang_after)")
                if self.until == until:
                    os._exit(CRASHED)  # the main thread waits in a collective: nothing else ends it
                if not self.broken:
                    say(WENT_ON)
