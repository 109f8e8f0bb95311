"""What rank 0 writes into a run's folder: metrics, samples, events, status; imports neither torch nor a tracker.

JSON has no NaN: numbers that are not finite are written as the strings "NaN", "Infinity", "-Infinity", and
read_lines gives them back as floats.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, Literal, get_args

from dsft_launchers.files import replace_text

METRICS, SAMPLES, EVENTS, STATUS = "metrics.jsonl", "samples.jsonl", "events.jsonl", "status.json"

State = Literal["queued", "running", "restarting", "stopping", "stopped", "failed", "diverged", "done"]
"""restarting, queued: a supervisor starts the ranks again; stopping: a stop is agreed on and is being saved."""

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How numbers that JSON lacks are spelt."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The newest save. time: when it was committed, ISO 8601 in UTC."""

    step: int
    time: str


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best evaluation so far by checkpoint.keep_best, whose step the result will be of."""

    step: int
    metric: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Status:
    """status.json. step: the last one done; attempts: starts so far; checkpoint: newest verified, or None."""

    state: State
    step: int
    attempts: int
    checkpoint: str | None
    reason: str | None
    wandb_id: str | None
    saved: Saved | None = None
    best: Best | None = None

    def __post_init__(self) -> None:
        """An unknown state is our mistake."""
        assert self.state in get_args(State), self.state


def write_status(run_dir: Path, status: Status) -> None:
    """Replace run_dir/status.json at once: a reader sees the old one or the new one, whole, also after a crash."""
    replace_text(run_dir / STATUS, _line(asdict(status)))


def read_status(run_dir: Path) -> Status | None:
    """The status of a run, None if it has none yet. Raises RuntimeError for a file that is damaged."""
    path = run_dir / STATUS
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="ascii"))
        known = {field.name: values[field.name] for field in fields(Status) if field.name not in ("saved", "best")}
        saved, best = values.get("saved"), values.get("best")  # a status of an earlier version has neither
        return Status(
            **known, saved=None if saved is None else Saved(**saved), best=None if best is None else Best(**best)
        )
    except (ValueError, RecursionError, KeyError, TypeError, AssertionError) as error:
        raise RuntimeError(f"{path} is damaged ({error}); remove it and start the run again, it resumes") from error


class RunRecord:
    """metrics.jsonl, samples.jsonl and events.jsonl of one attempt of a run.

    Lines that the disk does not take (it is full, it went away) wait in memory and follow when it takes them again, in
    order and whole. troubled(error): called when that begins, once until the disk has taken lines and status again.
    """

    def __init__(self, run_dir: Path, troubled: Callable[[OSError], None]) -> None:
        self.run_dir, self.troubled = run_dir, troubled
        self.files: dict[str, FileIO] = {}
        self.waiting: dict[str, bytes] = {}
        self.refused = set[str]()
        if (run_dir / EVENTS).is_file():
            _rewrite(run_dir / EVENTS, _whole_lines(run_dir / EVENTS))

    def resume(self, step: int) -> None:
        """Drop the metrics and samples of later steps than step: they are run again. Events are history and stay.

        step 0: a run that begins anew; its first evaluation is made again too.
        """
        for name in (METRICS, SAMPLES):
            rewind(self.run_dir / name, step or -1)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl: step first, then values as they come."""
        self._append(METRICS, {"step": step, **values})

    def samples(self, step: int, ids: Sequence[str]) -> None:
        """Append the ids of the examples of one step, in global order, to samples.jsonl."""
        self._append(SAMPLES, {"step": step, "ids": list(ids)})

    def event(self, event: str, step: int, details: Mapping[str, Any]) -> None:
        """Append one line to events.jsonl, with the time in UTC."""
        self._append(EVENTS, {"time": timestamp(), "event": event, "step": step, **details})

    def status(self, status: Status) -> None:
        """Replace status.json; one that the disk does not take is left as it is."""
        self._try(STATUS, lambda: write_status(self.run_dir, status))

    def close(self) -> None:
        """Write what waits, close the files. Raises OSError if lines would be lost."""
        self._flush()
        lost = sum(map(len, self.waiting.values()))
        for file in self.files.values():
            file.close()
        self.files.clear()
        if lost:
            raise OSError(f"{lost} bytes of {', '.join(self.waiting)} in {self.run_dir} could not be written")

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        self.waiting[name] = self.waiting.get(name, b"") + _line(values).encode("ascii")
        self._try(METRICS, self._flush)

    def _flush(self) -> None:
        for name in list(self.waiting):
            if name not in self.files:
                self.files[name] = FileIO(self.run_dir / name, "a")
            while self.waiting[name]:
                self.waiting[name] = self.waiting[name][self.files[name].write(self.waiting[name]) or 0 :]
            del self.waiting[name]

    def _try(self, what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self.refused:
                self.troubled(error)
            self.refused.add(what)
        else:
            self.refused.discard(what)


def rewind(path: Path, step: int) -> None:
    """Drop the lines of later steps than step, and a last line that a crash cut short. No file: nothing to do.

    Raises RuntimeError for a line that is damaged.
    """
    if path.is_file():
        _rewrite(path, [line for line in _whole_lines(path) if _parsed(path, line)["step"] <= step])


def timestamp(seconds: float | None = None) -> str:
    """Return a moment, now unless seconds since the epoch are given, in ISO 8601 and UTC, to the millisecond."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, numbers that are not finite as floats again; none if there is no file.

    A last line that is still being written is left out. Raises RuntimeError for a line that is damaged.
    """
    return [_revived(_parsed(path, line)) for line in _whole_lines(path)] if path.is_file() else []


def _parsed(path: Path, line: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"{path} holds a damaged line ({line[:40]!r}); remove that line") from error
    return values


def _whole_lines(path: Path) -> list[str]:
    """Lines that end in a newline, with it."""
    with path.open(encoding="ascii", errors="backslashreplace") as file:
        return [line for line in file if line.endswith("\n")]


def _rewrite(path: Path, lines: Sequence[str]) -> None:
    """Replace a file at once, if its content changes."""
    text = "".join(lines)
    if len(text) != path.stat().st_size:
        replace_text(path, text)


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(_spelt(values), allow_nan=False) + "\n"


def _spelt(value: Any) -> Any:
    """The value with NaN and infinities as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _spelt(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt(item) for item in value]
    return value


def _revived(values: dict[str, Any]) -> dict[str, Any]:
    return {key: NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
