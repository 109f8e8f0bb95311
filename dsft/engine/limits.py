"""Seconds that phases of a run may take before one like them was timed: by bytes and operations, at slow rates.

The rates are a tenth of what a slow disk and a slow processor do, so that only a rank that hangs overruns them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

BYTES_PER_S = 20e6
FLOP_PER_S = {"cpu": 5e9, "cuda": 1e12}
TOKEN_S = 0.25
"""Seconds of one generated token of a group of prompts, besides its operations."""
STATE_BYTES = 16
"""Bytes of one trained parameter with its moments, in fp32."""


@dataclass(frozen=True)
class Limits:
    """What a run's limits are computed from. total, trainable: parameters; device: cpu or cuda."""

    total: int
    trainable: int
    device: str

    @property
    def loading_s(self) -> float:
        """Return the seconds of reading, packing and sharding the base."""
        return 4 * self.total / BYTES_PER_S

    @property
    def state_s(self) -> float:
        """Return the seconds of reading, hashing or writing the whole state once."""
        return STATE_BYTES * self.trainable / BYTES_PER_S

    @property
    def result_s(self) -> float:
        """Return the seconds of gathering and writing the result, a whole model at most."""
        return 4 * self.total / BYTES_PER_S

    def forward_s(self, tokens: int) -> float:
        """Return the seconds of forward passes over so many tokens on one rank."""
        return 2 * self.total * tokens / FLOP_PER_S[self.device]

    def step_s(self, tokens: int) -> float:
        """Return the seconds of a step with so many tokens on one rank, recomputation included."""
        return 4 * self.forward_s(tokens)

    def generation_s(self, prompts: int, tokens: int, groups: int) -> float:
        """Return the seconds of generating tokens for each of prompts on one rank, in so many groups after another.

        A sharded strategy gathers the whole model for each token.
        """
        per_token = TOKEN_S + 2 * self.total / 1e9
        return groups * tokens * per_token + self.forward_s(prompts * tokens)


NOTHING = Limits(0, 0, "cpu")
"""Those of a model without parameters."""


def limits_of(run_dir: Path, device: str) -> Limits:
    """Return the limits of the run whose plan.json lies in run_dir."""
    counts = json.loads((run_dir / "plan.json").read_text())["parameters"]
    return Limits(counts["total"], counts["trainable"], device)
