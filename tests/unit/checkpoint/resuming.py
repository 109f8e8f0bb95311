"""Resumes a run in this process, and keeps what its watch is told."""

from pathlib import Path

from dsft import folder
from dsft.checkpoint.lease import acquire
from dsft.compose import load_yaml
from dsft.engine.assemble import Session
from dsft.engine.resume import resume

STEPS = [1, 3, 6]
"""Of the checkpoints of the run that is copied and changed."""


class Told:
    """A watch that keeps the events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, dict[str, object]]] = []

    def event(self, event: str, step: int, details: dict[str, object]) -> None:
        self.events.append((event, step, details))


def resumed(session: Session, run_dir: Path) -> tuple[int, Told]:
    told = Told()
    who = folder.identity(run_dir, load_yaml(run_dir / "config.yaml"))
    lease, _ = acquire(run_dir / "checkpoints")
    return resume(session, run_dir, who, lease, 9, told).step, told  # type: ignore[arg-type]
