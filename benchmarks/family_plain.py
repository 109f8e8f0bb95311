"""The process beside a cell that has plain transformers and PEFT, and nothing of dsft (family_elsewhere.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]


class Plain:
    """One such process, started at the first request; a context that ends it."""

    def __init__(self, program: str = "benchmarks.family_elsewhere", *words: str) -> None:
        self.command = [sys.executable, "-m", program, *words]
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process is not None:
            self.process.communicate()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request, {"error": line} where it failed. Raises RuntimeError if the process is gone."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, text=True, env=_own(),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process without dsft ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _own() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
