"""Sweeps: each point is a run of its own in SWEEP/<index>, one after another, and one table at the end."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dsft import folder
from dsft.compose import compose


def run_points(points: Sequence[Sequence[str]], sweep: Path, *, first: int) -> list[int]:
    """Check every point, then run them; returns their exit codes. Raises ValueError before any has started."""
    typed = [[word for word in point if not word.startswith("run_dir=")] for point in points]
    full = [[*words, f"run_dir={sweep / str(first + index)}"] for index, words in enumerate(typed)]
    for words in full:
        composed = compose(words)
        folder.check(Path(composed.run.run_dir), composed.resolved)
    codes = []
    for index, words in enumerate(full):
        print(f"point {first + index} of {sweep}: {' '.join(typed[index])}", flush=True)
        codes.append(subprocess.run([sys.executable, "-m", "dsft.run", *words], check=False).returncode)
    print(table(typed, sweep, codes, first=first))
    return codes


def table(points: Sequence[Sequence[str]], sweep: Path, codes: Sequence[int], *, first: int) -> str:
    """One line a point: what differs between the points, exit code, last training loss, last evaluation."""
    shared = set(points[0]).intersection(*points)
    lines = [f"{'point':<6} {'exit':>4} {'loss':>10}  changed"]
    for index, (words, code) in enumerate(zip(points, codes, strict=True), start=first):
        last = _last(sweep / str(index) / "metrics.jsonl")
        measured = " ".join(f"{key}={value:.4g}" for key, value in last.items() if key.startswith("eval/"))
        changed = " ".join(word for word in words if word not in shared)
        lines.append(f"{index:<6} {code:>4} {last.get('loss', float('nan')):>10.4f}  {changed}  {measured}".rstrip())
    return "\n".join(lines)


def _last(metrics: Path) -> dict[str, float]:
    """The last value of every key of a metrics file; {} if there is none."""
    values: dict[str, float] = {}
    for line in metrics.read_text().splitlines() if metrics.is_file() else ():
        values |= {key: value for key, value in json.loads(line).items() if isinstance(value, int | float)}
    return values
