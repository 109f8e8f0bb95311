"""What a person sees of a running training: one moving line in a terminal, a line now and then in a log file.

Everything goes to standard output of rank 0; errors are the caller's and go to standard error.
"""

import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import TextIO

from dsft_launchers.shown import shown
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

WINDOW = 20
"""Steps whose mean duration gives the ETA."""


class ProgressLine:
    """Shows steps out of total. interval_s: shortest time between lines of a log."""

    def __init__(self, total: int, *, stream: TextIO, interval_s: float = 10.0) -> None:
        self.total, self.interval_s = total, interval_s
        self.first, self.shown_at = 1, 0.0
        self.seconds: deque[float] = deque(maxlen=WINDOW)
        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        if self.console.is_terminal:
            columns = (BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.description}", markup=False))
            self.bar = Progress(*columns, console=self.console, auto_refresh=False, redirect_stderr=False)
            self.task = self.bar.add_task(f"step 0/{total}", total=total)
            self.bar.start()

    def begin(self, done: int) -> None:
        """The training begins after done steps of earlier attempts."""
        self.first = done + 1
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=f"step {done}/{self.total}", refresh=True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A step is done; values holds loss, tokens_per_s and step_s."""
        self.seconds.append(values["step_s"])
        left = (self.total - step) * sum(self.seconds) / len(self.seconds)
        text = (
            f"step {step}/{self.total}  loss {values['loss']:.4f}  {values['tokens_per_s']:,.0f} tokens/s  "
            f"ETA {timedelta(seconds=round(left))}"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text, refresh=True)
        elif step in (self.first, self.total) or time.monotonic() - self.shown_at >= self.interval_s:
            self.shown_at = time.monotonic()
            self.say(text)

    def say(self, text: str) -> None:
        """What stays above the moving line: an evaluation, a save, a resume; a table has several lines."""
        self.console.print(Text(shown(text)))
        self.console.file.flush()

    def close(self) -> None:
        """Leave the last line in place."""
        if self.bar is not None:
            self.bar.stop()
