"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products of shared and rank-1 factors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsft.methods.bottleneck import Adapter, After, Bottleneck, device_of, put, train_norms
from dsft.methods.branches import branch_end, grow, norms, width
from dsft.protocols import Anatomy

PLACES = ("attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class Compacter(Bottleneck):
    """Houlsby's adapters with W = sum_i A_i kron (s_i t_i^T), i = 1..n; the A_i (n, n) are shared by all adapters.

    Parameters: n^3, and 3 (D + m) per adapter: s, t and bias of what goes down and of what goes up; the norms' where
    train_norms is set. after: [attention, mlp], or [mlp] for Compacter++. Cannot be merged.
    Start: A ~ N(0, 0.01^2), s and t Glorot uniform, except t of what goes up, which is 0: the start is the base, where
    the paper's is near it. Source: Karimi Mahabadi et al. 2021, arXiv:2106.04647, equations 4 and 5.
    """

    phm_dim: int
    after: tuple[str, ...]
    train_norms: bool

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        super().__post_init__()
        if self.phm_dim < 1:
            raise ValueError(f"method.phm_dim must be 1 or more, got {self.phm_dim}")
        if not self.after or not set(self.after) <= set(PLACES) or len(set(self.after)) < len(self.after):
            raise ValueError(
                f"method.after must be [attention, mlp], or one of them, got {list(self.after)}; [mlp] is Compacter++"
            )

    def add(self, model: nn.Module, anatomy: Anatomy) -> None:
        """An adapter after each branch in after of each block, and the shared factors beside the blocks."""
        outer, inner = width(model), self.size(model)
        for what, size in (("the model's width", outer), ("the bottleneck, width / method.reduction_factor", inner)):
            if size % self.phm_dim:
                raise ValueError(
                    f"method.phm_dim must divide {what}, {size}, got {self.phm_dim}; change it or reduction_factor"
                )
        shared = Shared(self.phm_dim, device_of(model.get_submodule(anatomy.blocks[0])))
        model.phm = shared
        embedding: Any = model.get_submodule(anatomy.embedding)
        embedding.shared = (shared,)
        grow(embedding, Source)
        for block in anatomy.blocks:
            for role in self.after:
                module = model.get_submodule(branch_end(model, anatomy, block, role))
                down, up = PHM(outer, inner, shared), PHM(inner, outer, shared)
                put(Adapter(down, up, self.activation, self.dropout, 1.0), module, After)
        if self.train_norms:
            train_norms(model, norms(model, anatomy))

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """First values, see the class."""
        value = torch.zeros(param.shape, dtype=torch.float32)
        if name.endswith("phm.matrices"):
            nn.init.normal_(value, std=0.01)
        elif name.endswith((".s", "down.t")):
            nn.init.xavier_uniform_(value)
        return value


class Shared(nn.Module):
    """The A_i of all adapters: matrices (n, n, n), i first; it belongs to the model, and no block holds it.

    Blocks use a copy that is made once per forward pass of the model (value, or learner where gradients are wanted);
    what reaches the learner in backward is handed to the parameter once. Else reentrant recomputation would give the
    parameter a gradient per block, which ZeRO-3 refuses, and each block would gather it.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.zeros(count, count, count, device=device))
        self.value: Tensor | None = None
        self.learner: Tensor | None = None

    def forward(self) -> Tensor:
        """A copy of the parameter, in fp32."""
        return self.matrices.float().clone()

    def factors(self) -> Tensor:
        """What blocks use: of the model's newest forward pass, or the parameter's own copy before there was one."""
        held = self.learner if torch.is_grad_enabled() else self.value
        return self() if held is None else held


class Source(nn.Module):
    """An embedding that hands the shared factors out: the first of a forward pass, and the last of its backward."""

    shared: tuple[Shared]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the embedding's own."""
        output: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        shared = self.shared[0]
        copy = shared()
        shared.value = copy.detach()
        if not torch.is_grad_enabled():
            return output
        shared.learner = copy.detach().requires_grad_()
        return _Collect.apply(output, copy, shared)  # type: ignore[no-any-return]


class _Collect(torch.autograd.Function):
    """The output as it is; in backward, what the blocks have left in the learner becomes the copy's gradient.

    A block that is computed again uses the newest learner, whatever pass it belongs to: both are looked at.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, copy: Tensor, shared: Shared) -> Tensor:
        ctx.shared, ctx.learner = shared, shared.learner
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        total = torch.zeros_like(ctx.learner)
        for learner in (ctx.learner, ctx.shared.learner):
            if learner.grad is not None:
                total += learner.grad
                learner.grad = None
        return grad, total, None


class PHM(nn.Module):
    """x (..., in) -> x W + b (..., out); s (n, in / n), t (n, out / n), W (in, out) made at each use."""

    def __init__(self, inputs: int, outputs: int, shared: Shared) -> None:
        super().__init__()
        count, device = len(shared.matrices), shared.matrices.device
        self.s = nn.Parameter(torch.zeros(count, inputs // count, device=device))
        self.t = nn.Parameter(torch.zeros(count, outputs // count, device=device))
        self.bias = nn.Parameter(torch.zeros(outputs, device=device))
        self.shared = (shared,)  # in a tuple, so that it is no part of this module

    def weight(self) -> Tensor:
        """W (in, out), in fp32."""
        factors = self.shared[0].factors()
        with torch.autocast(factors.device.type, enabled=False):
            ranks = self.s.float()[:, :, None] * self.t.float()[:, None, :]  # (n, in / n, out / n)
            product = torch.einsum("iab,icd->acbd", factors, ranks)
        return product.reshape(self.s.numel(), self.t.numel())

    def forward(self, x: Tensor) -> Tensor:
        """X (..., in) -> (..., out)."""
        return F.linear(x, self.weight().T.to(x.dtype), self.bias.to(x.dtype))
