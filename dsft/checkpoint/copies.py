"""Host copies of a state, made once and filled again for every save that is written beside the training."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


class Copies:
    """pinned: in memory that an accelerator copies into directly. At most one save may use them at a time."""

    def __init__(self, *, pinned: bool) -> None:
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=pinned,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )
        self.kept: dict[str, Tensor] = {}

    def take(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of state's tensors, DTensors laid out as they are; state may change once this has returned."""
        if self.kept.keys() != state.keys():
            staged: Any = self.stager.stage(dict(state))
            self.kept = staged
            return self.kept
        into, source = ([_local(tensors[name]) for name in state] for tensors in (self.kept, state))
        torch._foreach_copy_(into, source, non_blocking=True)
        for device in {tensor.device for tensor in source if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return self.kept


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, else the tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
