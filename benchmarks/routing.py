"""How near a router's choice was to another: between equal scores the last bit chooses, and the loss jumps."""

import math
from types import TracebackType
from typing import Any

from torch import nn


class Routing:
    """Within it the forward passes of model are watched. gap: of any token and block, the smallest difference between
    the logits of the last expert that was chosen and of the first that was not; inf without experts.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [module for module in model.modules() if hasattr(module, "top_k")]
        self.routers = [module for module in modules if "weight" in module._parameters]
        self.gap = math.inf

    def __enter__(self) -> "Routing":
        self.hooks = [router.register_forward_hook(self._look) for router in self.routers]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self.hooks:
            hook.remove()

    def _look(self, router: Any, given: object, found: Any) -> None:
        logits = found[0].detach().float().sort(-1, descending=True).values  # (T, E)
        self.gap = min(self.gap, float((logits[:, router.top_k - 1] - logits[:, router.top_k]).min()))
