"""A sweep as a table: one line a point, sorted by a metric, best first."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from dsft.sweeps.ledger import Ledger
from dsft.sweeps.standing import WRONG, Standing
from dsft.telemetry.record import METRICS, read_lines
from dsft.wording import suggest


def last_values(run_dir: Path) -> dict[str, float]:
    """The last value of every metric of a run; {} if it has none."""
    values: dict[str, float] = {}
    for line in read_lines(run_dir / METRICS):
        values |= {key: value for key, value in line.items() if isinstance(value, int | float)}
    return values


def check_metric(points: Sequence[Standing], by: str) -> None:
    """Raise ValueError where no point has the metric and some have others."""
    known = {key for point in points for key in last_values(point.run_dir)}
    if known and by not in known:
        raise ValueError(f"--by must be a metric of the sweep, got {by}{suggest(by, known)}")


def ranked(points: Sequence[Standing], by: str) -> list[tuple[Standing, dict[str, float]]]:
    """Points with their metrics, best first (an accuracy's highest, else the lowest), those without it last."""
    sign = -1.0 if "accuracy" in by else 1.0
    measured = [(point, last_values(point.run_dir)) for point in points]
    return sorted(measured, key=lambda each: (_worth(sign * each[1].get(by, math.nan)), each[0].index))


def _worth(value: float) -> float:
    return math.inf if math.isnan(value) else value


def as_text(book: Ledger, points: Sequence[Standing], by: str) -> str:
    """The table for a reader: state, step, the metric, what differs between the points, evaluations, errors."""
    width = max(10, len(by))
    lines = [f"{'point':<6} {'state':<10} {'step':>7} {by:>{width}}  changed"]
    for point, values in ranked(points, by):
        value = f"{values[by]:.4f}" if by in values else "-"
        others = [f"{key}={value:.4g}" for key, value in values.items() if key.startswith("eval/") and key != by]
        why = point.why if point.state in WRONG else ""
        said = "  ".join(filter(None, [" ".join(book.changed(point.index)), " ".join(others), why]))
        lines.append(f"{point.index:<6} {point.shown:<10} {point.step:>7} {value:>{width}}  {said}".rstrip())
    return "\n".join(lines)


def write_csv(book: Ledger, points: Sequence[Standing], by: str, out: TextIO) -> None:
    """The same with a column for each key that differs and for each metric; numbers in full."""
    rows = ranked(points, by)
    changed = {
        point.index: dict(word.split("=", 1) for word in book.changed(point.index) if "=" in word) for point, _ in rows
    }
    keys = sorted({key for words in changed.values() for key in words})
    metrics = sorted({key for _, values in rows for key in values} - {"step"})
    writer = csv.writer(out)
    writer.writerow(["point", "state", "step", *keys, *metrics, "reason", "run_dir"])
    for point, values in rows:
        words = [changed[point.index].get(key, "") for key in keys]
        measured = [values.get(key, "") for key in metrics]
        writer.writerow([point.index, point.state, point.step, *words, *measured, point.why, point.run_dir])
