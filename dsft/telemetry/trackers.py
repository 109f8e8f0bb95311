"""All chosen trackers as one; a tracker that fails is named and left out, because the run matters more."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsft.protocols import Tracker  # brings torch, which no tracker needs


class Trackers:
    """Passes every call on. tell(name, message) hears once of a tracker that raised, which gets no further call."""

    def __init__(self, trackers: Mapping[str, "Tracker"], tell: Callable[[str, str], None]) -> None:
        self.live = dict(trackers)
        self.tell = tell

    def open(self, run_dir: Path, config: Mapping[str, Any], run_id: str | None) -> str | None:
        """Start all; the run id of the one that has ids (wandb), run_id itself if that one failed."""
        ids = self._each(lambda tracker: tracker.open(run_dir, config, run_id))
        for name, tracker in self.live.items():
            if notice := getattr(tracker, "notice", None):
                self.tell(name, f"tracker {name}: {notice}")
        return next((found for found in ids if found is not None), run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of one step."""
        self._each(lambda tracker: tracker.log(step, values))

    def close(self) -> None:
        """Flush and end all."""
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[["Tracker"], Any]) -> list[Any]:
        results = []
        for name, tracker in list(self.live.items()):
            try:
                results.append(call(tracker))
            except Exception as error:  # a tracker's outage: metrics.jsonl has all
                del self.live[name]
                self.tell(name, f"tracker {name} failed and is left out from here on: {error!r}")
        return results
