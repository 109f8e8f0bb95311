"""How DeepSpeed is brought up on a World that exists already, and what is put back afterwards."""

import importlib
import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any

from dsft.comm.world import World, group_of_one

LOCAL_RANK = "LOCAL_RANK"
"""What DeepSpeed takes for the index of its device whenever it needs one, until the run ends."""


@dataclass(frozen=True)
class Started:
    """What start changed. owns_group: it made a group of one; local_rank: what LOCAL_RANK said, None for nothing."""

    owns_group: bool
    local_rank: str | None

    def end(self) -> None:
        """Put it back."""
        if self.local_rank is None:
            os.environ.pop(LOCAL_RANK, None)
        else:
            os.environ[LOCAL_RANK] = self.local_rank
        if self.owns_group:
            deepspeed().comm.destroy_process_group()
            deepspeed().comm.comm.cdb = None


def deepspeed() -> Any:
    """DeepSpeed, imported at first use."""
    return importlib.import_module("deepspeed")


def start(world: World) -> Started:
    """Bring DeepSpeed up, quietly, on the process group and on this rank's device."""
    logger = logging.getLogger("DeepSpeed")
    if _is_error not in logger.filters:
        logger.addFilter(_is_error)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    before = os.environ.get(LOCAL_RANK)
    # Under srun --gpus-per-task=1 the only device of every rank is number 0, whatever its local rank is.
    index = world.device.index
    os.environ[LOCAL_RANK] = str(index if index is not None else before or world.local_rank)
    # Its all-reduce in shared memory, for inference on CPU, would be compiled now with ninja and g++; we never use it.
    deepspeed().ops.__compatible_ops__["deepspeed_shm_comm"] = False
    alone = group_of_one()
    deepspeed().comm.init_distributed(dist_init_required=False)
    return Started(alone, before)


def _is_error(record: logging.LogRecord) -> bool:
    """False for what DeepSpeed tells of its progress, at level WARNING too."""
    return record.levelno >= logging.ERROR
