"""tracker=auto: Weights & Biases where this machine is set up for it, else none."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsft.telemetry.track_wandb import INSTALL, WandbTracker, has_key, installed


@dataclass(kw_only=True)
class AutoTracker:
    """Takes wandb if WANDB_API_KEY, WANDB_MODE or a netrc key is set; why() says what it took."""

    project: str
    entity: str | None
    name: str | None
    group: str | None
    _wandb: WandbTracker | None = field(init=False, default=None, repr=False, compare=False)

    def why(self) -> str:
        """One line for the user: what is taken and for which reason."""
        if not self._wanted():
            return "tracker=auto: none, no W&B key and no WANDB_MODE is set"
        if not installed():
            return f"tracker=auto: none, a W&B key or WANDB_MODE is set but wandb is missing ({INSTALL})"
        return f"tracker=auto: wandb, {self._made().resolved_mode()}"

    @property
    def notice(self) -> str | None:
        """What a person should know of open."""
        return self._wandb.notice if self._wandb is not None else None

    def check(self) -> None:
        """Raise ValueError if wandb is taken and cannot work."""
        if self._taken():
            self._made().check()

    def open(self, run_dir: Path, config: Mapping[str, Any], run_id: str | None) -> str | None:
        """Start wandb if it is taken; its run id, else None."""
        if not self._taken():
            return None
        self._wandb = self._made()
        return self._wandb.open(run_dir, config, run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of one step."""
        if self._wandb is not None:
            self._wandb.log(step, values)

    def close(self) -> None:
        """Flush and end."""
        if self._wandb is not None:
            self._wandb.close()

    def _wanted(self) -> bool:
        mode = os.environ.get("WANDB_MODE", "")
        return mode != "disabled" and bool(mode or has_key())

    def _taken(self) -> bool:
        return self._wanted() and installed()

    def _made(self) -> WandbTracker:
        return WandbTracker(mode="auto", project=self.project, entity=self.entity, name=self.name, group=self.group)
