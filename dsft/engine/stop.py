"""A request to stop: signals set one flag, and all ranks agree on the step at which they leave."""

import signal
from types import FrameType

from dsft.comm.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopFlag:
    """Set by SIGTERM, Ctrl-C or SIGUSR2 (preemption, as submitit binds it); the handlers do nothing else."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def bind(self) -> None:
        """Take over the signals of this process."""
        for number in SIGNALS:
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def agreed(self, world: World) -> bool:
        """True on every rank if any rank was asked to stop. Collective, once per step."""
        return world.max(float(self.reason is not None)) > 0
