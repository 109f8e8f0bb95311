"""TensorBoard: event files under RUN/tensorboard, written by the package tensorboard itself."""

import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INSTALL = "pip install 'dsft[tensorboard]'"


@dataclass(kw_only=True)
class TensorBoardTracker:
    """One event file per attempt; what a resumed run does again replaces what was there."""

    flush_s: float
    _writer: Any = field(init=False, default=None, repr=False, compare=False)
    _resumed: bool = field(init=False, default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse a flush interval that is none."""
        if not self.flush_s > 0:
            raise ValueError(f"tracker.tensorboard.flush_s must be above 0, got {self.flush_s}")

    def check(self) -> None:
        """Raise ValueError if the package is missing."""
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError(f"tracker=tensorboard needs the package tensorboard, which is missing; {INSTALL}")

    def open(self, run_dir: Path, config: Mapping[str, Any], run_id: str | None) -> str | None:
        """Start an event file; return None, TensorBoard has no ids."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run_dir / "tensorboard"
        self._resumed = folder.is_dir() and any(folder.iterdir())
        self._writer = EventFileWriter(str(folder), flush_secs=self.flush_s)
        return None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of one step as scalars."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        assert self._writer is not None, "open comes first"
        if self._resumed:  # TensorBoard then forgets this step and later ones of earlier attempts
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=start))
            self._resumed = False
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        """Flush and end. Without an open file: nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
