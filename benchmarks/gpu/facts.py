"""What a check finds, written down fact by fact: one that hangs later does not take the earlier ones with it."""

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.gpu.runner import FACTS


class Facts:
    """Appends to a file; failed is True once a fact was not as it must be."""

    def __init__(self, path: Path) -> None:
        self.path, self.failed = path, False

    @classmethod
    def here(cls) -> "Facts":
        """The file that the runner named."""
        return cls(Path(os.environ[FACTS]))

    def note(self, what: str, value: object, unit: str = "", *, ok: bool | None = None, why: str = "") -> None:
        """One fact. ok: whether it is as it must be, None for a number that is only told; why: what it must be."""
        self.failed |= ok is False
        line = {"what": what, "value": value, "unit": unit, "ok": None if ok is None else bool(ok), "why": why}
        with self.path.open("a") as out:
            out.write(json.dumps(line) + "\n")

    def near(self, what: str, value: float, most: float, unit: str = "") -> None:
        """A difference that must be at most so much; NaN never is."""
        self.note(what, float(f"{value:.2g}"), unit, ok=value <= most, why=f"at most {most:g}")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a check: what it raises is a fact that is wrong, with its traceback in the log, and the others go
        on. Its seconds are told.
        """
        begun = time.perf_counter()
        try:
            yield
        except Exception as error:  # of any library: the part is lost, the check is not
            traceback.print_exc()
            said = " ".join(str(error).split())[:200]
            self.note(f"{name} raised", f"{type(error).__name__}: {said}", ok=False, why="must run")
            return
        self.note(f"{name} took", round(time.perf_counter() - begun, 2), "s")
