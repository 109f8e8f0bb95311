"""A sweep as a table: one line a point, sorted by a metric, best first."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from dsft_launchers.shown import in_a_line

from dsft.sweeps.ledger import Ledger
from dsft.sweeps.standing import WRONG, Standing
from dsft.telemetry.record import METRICS, read_lines
from dsft.wording import suggest

LAST_LOSS, HELD_OUT = "loss", "eval/loss"
"""The metric that hydra.launcher.metric names where nobody has set it; and the one that tells more."""


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


def metric_of(book: Ledger, points: Sequence[Standing]) -> tuple[str, str]:
    """Return what the points are ranked by where nobody has said it, and a line that says so.

    eval/loss if every point that has trained has measured it; else the loss of the last step, which is that of a few
    examples only.
    """
    if book.metric != LAST_LOSS:
        return book.metric, f"best first by {book.metric}, which hydra.launcher.metric names"
    trained = [values for point in points if LAST_LOSS in (values := last_values(point.run_dir))]
    without = sum(HELD_OUT not in values for values in trained)
    if trained and not without:
        return HELD_OUT, f"best first by {HELD_OUT}"
    why = f"{without} of {len(trained)} points have no {HELD_OUT}" if trained else "no point has trained"
    return LAST_LOSS, f"best first by the loss of the last step, as {why}"


def as_text(book: Ledger, points: Sequence[Standing], by: str) -> str:
    """The table for a reader: state, step, the metric, what differs between the points, evaluations, errors."""
    rows = ranked(points, by)
    changed = _changed(book, points)
    keys = sorted({key for words in changed.values() for key in words})
    others = sorted({key for _, values in rows for key in values if key.startswith("eval/") and key != by})
    lines = [[in_a_line(head) for head in ("point", "state", "step", by, *keys, *others, "why")]]
    for point, values in rows:
        value = f"{values[by]:.4f}" if by in values else "-"
        set_to = [changed[point.index].get(key, "-") for key in keys]
        measured = [f"{values[key]:.4g}" if key in values else "-" for key in others]
        why = point.why if point.state in WRONG else ""
        cells = [str(point.index), point.shown, str(point.step), value, *set_to, *measured, why]
        lines.append([in_a_line(cell) for cell in cells])
    if not any(line[-1] for line in lines[1:]):
        lines[0][-1] = ""
    widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[:-1]]
    return "\n".join(_row(line, widths) for line in lines)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Numbers under the ends of their heads, words under their beginnings; the last cell as long as it is."""
    padded = [
        cell.rjust(width) if index in (2, 3) else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=False))
    ]
    return "  ".join([*padded, cells[-1]]).rstrip()


def _changed(book: Ledger, points: Sequence[Standing]) -> dict[int, dict[str, str]]:
    """Point -> key -> value, of what not all points share; a word without = has its own name for a value."""
    return {
        point.index: {word.partition("=")[0]: word.partition("=")[2] or word for word in book.changed(point.index)}
        for point in points
    }


def write_csv(book: Ledger, points: Sequence[Standing], by: str, out: TextIO) -> None:
    """The same with a column for each key that differs and for each metric; numbers in full.

    Text that a spreadsheet would take for a formula has a ' before it, as it has there.
    """
    rows = ranked(points, by)
    changed = _changed(book, points)
    keys = sorted({key for words in changed.values() for key in words})
    metrics = sorted({key for _, values in rows for key in values} - {"step"})
    writer = csv.writer(out)
    writer.writerow(map(_no_formula, ["point", "state", "step", *keys, *metrics, "reason", "run_dir"]))
    for point, values in rows:
        words = [changed[point.index].get(key, "") for key in keys]
        measured = [values.get(key, "") for key in metrics]
        cells = [point.index, point.state, point.step, *words, *measured, point.why, str(point.run_dir)]
        writer.writerow(map(_no_formula, cells))


def _no_formula(cell: object) -> object:
    """The cell, with a ' before text that begins as a formula does and is no number."""
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
