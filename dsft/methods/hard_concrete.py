"""Modules whose tensors are theta0 + z w with hard-concrete gates z (Louizos et al. 2018, arXiv:1712.01312)."""

import hashlib
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dsft.methods.branches import grow

EDGE = 1e-4
"""The noise u lies in [EDGE, 1 - EDGE], so that its logit is finite (the paper's code)."""

FIXED = 1e4
"""Gate parameter of an entry that is chosen; -FIXED of one that is not. Whatever the noise, its gate is 1 or 0 and its
slope 0, to the bit; what an optimizer's momentum still moves it is a few units. bf16 holds it as well."""

DIFF, GATE, GROUP = "_diff", "_gate", "_group"
"""Endings of the names of w, of alpha of each element and of alpha of the whole tensor (1,), after the tensor's own."""


@dataclass
class Noise:
    """What all gates of a model draw from. step: of the forward passes that go on; quiet: no gate draws any more."""

    seed: int
    step: int
    quiet: bool


@dataclass(frozen=True)
class Gates:
    """The gates of one tensor in one step: a pure function of their parameters.

    lower, upper: the interval that the sigmoid is stretched to before it is cut to [0, 1]. noise: seed, step and the
    tensor's name; None: no noise.
    """

    lower: float
    upper: float
    noise: tuple[int, int, str] | None

    def __call__(self, alpha: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Z, and its slope dz / dalpha, of alpha's shape, in fp32; what: which of the tensor's gates alpha is of."""
        logit = alpha.float()
        if self.noise is not None:
            u = draw((*self.noise, what), alpha)
            logit = logit + u.log() - torch.log1p(-u)
        s = logit.sigmoid()
        width = self.upper - self.lower
        stretched = s * width + self.lower
        inside = (stretched > 0) & (stretched < 1)
        return stretched.clamp(0, 1), s * (1 - s) * width * inside

    def whole(self, alpha: Tensor, group: Tensor | None) -> Tensor:
        """The product of an element's gate and its tensor's, if it has one."""
        z = self(alpha, GATE)[0]
        return z if group is None else z * self(group, GROUP)[0]


def draw(words: tuple[object, ...], like: Tensor) -> Tensor:
    """U ~ U(EDGE, 1 - EDGE) of like's shape, fp32, from words alone: no default stream is touched."""
    seed = int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "big") >> 1
    u = torch.empty(like.shape, device=like.device)
    if like.is_meta:
        return u
    return u.uniform_(EDGE, 1 - EDGE, generator=torch.Generator(like.device).manual_seed(seed))


class Gated(nn.Module):
    """A module that sees theta0 + z w in place of some of its own tensors, made once per call.

    plain: its class before; gated: own name of a tensor -> its full name, which its noise is drawn from (that of the
    first, where tensors are tied). Noise is drawn in training alone.
    """

    plain: type[nn.Module]
    gated: dict[str, str]
    noise: Noise
    interval: tuple[float, float]
    made: dict[str, Tensor] | None
    never_compiled = True  # a generator of its own is nothing that torch's compiler follows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own, of tensors that are other ones."""
        self.made = {name: self.theta(name) for name in self.gated}
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.made = None

    def seen(self, name: str) -> Tensor:
        """What self.NAME gives: theta, also to other modules that look for it; of a shard, which none can use, itself.

        FSDP2 asks a module for its parameters by name, while they are sharded.
        """
        if self.made is not None and name in self.made:
            return self.made[name]
        own: Any = self._parameters[name]
        return own if hasattr(own, "full_tensor") else self.theta(name)

    def theta(self, name: str) -> Tensor:
        """Theta0 + z w of the tensor called name, in theta0's type."""
        noise = self.noise
        drawn = (noise.seed, noise.step, self.gated[name]) if self.training and not noise.quiet else None
        return self.at(name, Gates(*self.interval, drawn))

    def at(self, name: str, gates: Gates) -> Tensor:
        """The same, with these gates."""
        own = self._parameters
        group = own.get(f"{name}{GROUP}")
        made: Tensor = _Sum.apply(own[name], own[f"{name}{DIFF}"], own[f"{name}{GATE}"], group, gates)
        return made


def gate(
    module: Any, tensors: dict[str, tuple[str, dict[str, nn.Parameter]]], noise: Noise, interval: tuple[float, float]
) -> None:
    """Make module Gated. tensors: own name -> full name, and by ending (DIFF, GATE, GROUP) what learns."""
    for name, (_, learns) in tensors.items():
        for ending, param in learns.items():
            module.register_parameter(f"{name}{ending}", param)
    module.gated = {name: full for name, (full, _) in tensors.items()}
    module.noise, module.interval, module.made = noise, interval, None
    grow(module, _looking(tuple(tensors)))


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Put theta0 + z w in theta0's place, without noise, and take off what learned; on meta too."""
    found = [module for module in model.modules() if isinstance(module, Gated)]
    still = [{name: module.at(name, Gates(*module.interval, None)) for name in module.gated} for module in found]
    for module, made in zip(found, still, strict=True):  # all were made first: tied tensors change but once
        for name, value in made.items():
            for ending in (DIFF, GATE, GROUP):
                module._parameters.pop(f"{name}{ending}", None)
            param = module._parameters[name]
            assert param is not None
            param.data = value
        module.__class__ = module.plain  # type: ignore[assignment]


@cache
def _looking(names: tuple[str, ...]) -> type[Gated]:
    """Gated, whose tensors of these names are what it makes of them."""
    return type("Gated", (Gated,), {name: property(partial(_look, name)) for name in names})


def _look(name: str, module: Gated) -> Tensor:
    return module.seen(name)


class _Sum(torch.autograd.Function):
    """theta0 + z z_group w in theta0's type. Nothing that is computed is kept: backward draws the same gates again."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, diff: Tensor, alpha: Tensor, group: Tensor | None, gates: Gates) -> Tensor:
        ctx.gates = gates
        ctx.save_for_backward(diff, alpha, group)
        return (base.float() + gates.whole(alpha, group) * diff).to(base.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        diff, alpha, group = ctx.saved_tensors
        z, slope = ctx.gates(alpha, GATE)
        grad = grad.float()
        product = grad * diff
        of_group = None
        if group is not None:
            z_group, slope_group = ctx.gates(group, GROUP)
            of_group = ((product * z).sum() * slope_group).to(group.dtype)
            grad, product = grad * z_group, product * z_group
        return None, (grad * z).to(diff.dtype), (product * slope).to(alpha.dtype), of_group, None
