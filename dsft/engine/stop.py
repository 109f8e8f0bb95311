"""A request to stop: signals and the clock set one flag, and all ranks agree on the step at which they leave."""

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopFlag:
    """Set by SIGTERM, Ctrl-C or SIGUSR2 (preemption, as submitit binds it); the handlers do nothing else.

    max_minutes: as if asked that long after this object was made; None: never. Ranks whose clocks differ agree by the
    loop's all-reduce, as for signals.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.signal: str | None = None
        self.max_minutes = max_minutes
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def bind(self) -> None:
        """Take over the signals of this process."""
        for number in SIGNALS:
            signal.signal(number, self._set)

    def ignore(self) -> None:
        """Once all is saved, signals change nothing. Python takes handlers away as it ends; what is ignored stays."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """Why this rank wants to stop, None if it does not."""
        if self.signal is None and self.deadline is not None and time.monotonic() > self.deadline:
            return f"train.max_minutes={self.max_minutes:g} are over"
        return self.signal


def in_vain(reason: str) -> str:
    """Return the reason of a stop that came before this start had made a step: by the clock, none ever will."""
    if not reason.startswith("train.max_minutes"):
        return reason
    return f"{reason} before this start made its first step: loading alone takes longer, raise train.max_minutes"
