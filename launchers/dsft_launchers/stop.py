"""A request to stop: the signals that the launcher passes on, and until when the ranks may leave by themselves."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGTERM,
    signal.SIGUSR2: signal.SIGTERM,
}
"""Signal to the launcher -> what each rank gets. USR1 and USR2 announce a preemption in a SLURM allocation."""


@dataclass
class Stop:
    """A request to stop: the first signal that came, and until when the ranks may leave by themselves."""

    number: int | None = None
    deadline: float | None = None

    def bind(self) -> dict[int, object]:
        """Record signals from now on; returns the handlers that were there."""
        before: dict[int, object] = {}
        for number in FORWARDED:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            before[number] = signal.signal(number, self._note)
        return before

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """While inside, signals are recorded and end nothing."""
    stop = Stop()
    before = stop.bind()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]
