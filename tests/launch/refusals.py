"""Starts that are refused: what was typed, with whose rights, and what a refusal looks like."""

import json
import os
import subprocess
from pathlib import Path

from tests import warm

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(8)]

POWERLESS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
"""Root without capabilities: rights count for it as for anybody."""


def jsonl(folder: Path, *lines: str) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return f"data.path={path}"


def good(folder: Path) -> list[str]:
    return ["data=local", jsonl(folder, *map(json.dumps, ROWS))]


def start(*words: str) -> "subprocess.CompletedProcess[str]":
    return warm.run("dsft.run", *words, prefix=POWERLESS)


def is_refused(done: "subprocess.CompletedProcess[str]", expected: str) -> None:
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert len(done.stderr) < 1200
    assert done.stdout == ""
