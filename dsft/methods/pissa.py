"""PiSSA: LoRA that starts from the principal singular vectors of W, with the base left as it is."""

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn

from dsft.methods.fused_lora import FusedLinear, fuse
from dsft.methods.peft_bridge import ADAPTER, peft_name, write_adapter
from dsft.methods.peft_folder import Folder
from dsft.methods.peft_landing import portable
from dsft.methods.peft_lora import LoraLayers
from dsft.methods.peft_names import as_in_file
from dsft.methods.stored import Stored

STARTS = ("start_a", "start_b")
"""Names of A0 and B0 in a layer."""

SIDE_A, SIDE_B = (
    (f".{side}.{ADAPTER}.", f".{start}.") for side, start in zip(("lora_A", "lora_B"), STARTS, strict=True)
)
"""In the name of what learns, and in that of what stays."""


@dataclass(frozen=True, kw_only=True)
class Pissa(LoraLayers):
    """y = W x + s (B A - B0 A0) x, A = A0 = sqrt(S/s) V^T and B = B0 = U sqrt(S/s) at the start, A and B learn.

    U S V^T: the singular values and vectors of W, the rank largest; of what packing left of W where it is packed.
    Equal to the paper's W_res x + s B A x, W_res = W - s B0 A0, without a change of the base, which is shared, sharded
    and perhaps packed. (The paper packs W_res instead, which lowers the error of packing; here that stays W's own.)
    The result is plain LoRA of twice the rank, [A; A0] and [B, -B0], which loads on the base as it is.
    iterations: of the randomized SVD, None for an exact one.

    Source: Meng, Wang, Zhang 2024, arXiv:2404.02948; code: PEFT's pissa_init and subtract_mutated_init.
    """

    iterations: int | None

    def __post_init__(self) -> None:
        """Refuse no iteration, and a direction learnt apart, whose size would have another start."""
        super().__post_init__()
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"method.iterations must be 1 or more, or null for an exact SVD, got {self.iterations}")
        if self.options.items() >= {"use_dora": True}.items():
            raise ValueError("method.options.use_dora must be left out with PiSSA, got true; take method=dora")

    def fused(self, model: nn.Module) -> None:
        """Beside PEFT's A and B the frozen A0 and B0, in the type of the model."""
        dtype = model.dtype
        for layer in fuse(model, ADAPTER, FusedDifference):
            rank = layer.r[ADAPTER]
            for name, sides in zip(STARTS, ((layer.in_features, rank), (rank, layer.out_features)), strict=True):
                frozen = nn.Linear(*sides, bias=False, device="meta", dtype=dtype)
                layer.add_module(name, frozen.requires_grad_(False))

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """A0 or B0, for what learns and for what stays: both rounded to the type of what stays, so that they cancel."""
        path, kind, _ = re.split(r"\.(lora_A|lora_B|start_a|start_b)\.", name, maxsplit=1)
        layer: Any = model.get_submodule(path)
        if layer.principal is None:
            weight = read(f"{path}.base_layer").float()
            factors = principal(weight, layer.r[ADAPTER], layer.scaling[ADAPTER], self.iterations)
            layer.principal = {side: factor.to(layer.start_a.weight.dtype) for side, factor in factors.items()}
        value: Tensor = layer.principal[kind[-1].lower()]
        layer.asked += 1
        if layer.asked == 4:  # each factor twice: nobody asks again
            layer.principal = None
        return value.to(param.dtype)

    def stored(self, model: nn.Module) -> Mapping[str, Tensor]:
        """A and A0, B and B0 are the halves of what an earlier run has left."""
        stored = super().stored(model)
        if not isinstance(stored, Stored):
            return stored
        parts = {}
        for name, (there, _) in stored.parts.items():
            (old, new), dim, sign = (SIDE_A, 0, 1) if ".lora_A." in name else (SIDE_B, 1, -1)
            parts[name] = (there, partial(_half, dim=dim, second=False, sign=1))
            parts[name.replace(old, new)] = (there, partial(_half, dim=dim, second=True, sign=sign))
        return Stored(stored.file, parts)

    def check_stored(self, folder: Folder, model: nn.Module, expected: Mapping[str, Size]) -> None:
        """A run's result is plain LoRA of twice the rank."""
        if (found := folder.config().get("r")) != 2 * self.rank:
            raise ValueError(
                f"method.init_from must hold what PiSSA leaves, LoRA of twice method.rank={self.rank}, got r={found}; "
                "set method.rank to half of it, or take method=lora"
            )
        twice = {
            name: Size((2 * shape[0], shape[1]) if ".lora_A." in name else (shape[0], 2 * shape[1]))
            for name, shape in expected.items()
        }
        folder.check(_of_twice_the_rank(model.peft_config[ADAPTER]), self.agree(), twice)  # type: ignore[index]

    def kept(self, name: str) -> bool:
        """The result needs A0 and B0."""
        return any(f".{start}." in name for start in STARTS)

    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path, base: str) -> Mapping[str, Tensor]:
        """Plain LoRA of twice the rank and the same s, as PEFT reads it."""
        tensors: dict[str, Tensor] = {}
        for name, value in weights.items():
            if f".lora_A.{ADAPTER}." in name:
                start = weights[name.replace(f"lora_A.{ADAPTER}", "start_a")]
                tensors[peft_name(name)] = torch.cat([value, start.to(value.dtype)])
            elif f".lora_B.{ADAPTER}." in name:
                start = weights[name.replace(f"lora_B.{ADAPTER}", "start_b")]
                tensors[peft_name(name)] = torch.cat([value, -start.to(value.dtype)], dim=1)
        config = _of_twice_the_rank(model.peft_config[ADAPTER])  # type: ignore[index]
        return write_adapter(portable(config, model), as_in_file(config, model, tensors), folder, base)


class FusedDifference(FusedLinear):
    """A fused LoRA linear whose product is counted from its start. principal, asked: what initial left, how often."""

    start_a: nn.Linear
    start_b: nn.Linear
    principal: dict[str, Tensor] | None = None
    asked = 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """X (..., in) -> (..., out). With dropout, and outside the blocks under ZeRO-3, one product after the other."""
        name = self.active_adapters[0]
        apart = hasattr(self, "ds_id") or (self.training and isinstance(self.lora_dropout[name], nn.Dropout))
        if not apart or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        y: Tensor = super(FusedLinear, self).forward(x, *args, **kwargs)
        start: Tensor = self.start_b(self.start_a(x))
        y = y - (self.scaling[name] * start).to(y.dtype)
        return y

    def factors(self, name: str) -> tuple[Any, Any]:
        """[A; A0] (2r, in) and [B, -B0] (out, 2r)."""
        down, up = super().factors(name)
        start_down, start_up = self.start_a.weight.to(down.dtype), self.start_b.weight.to(up.dtype)
        return torch.cat([down, start_down]), torch.cat([up, -start_up], dim=1)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """S (B A - B0 A0), (out, in)."""
        start = self.start_b.weight.float() @ self.start_a.weight.float()
        delta: Tensor = super().get_delta_weight(adapter)
        delta = delta - (self.scaling[adapter] * start).to(delta.dtype)
        return delta


def principal(weight: Tensor, rank: int, scale: float, iterations: int | None) -> dict[str, Tensor]:
    """A (rank, in) and B (out, rank) with scale B A = the part of weight (out, in) of its rank largest singular values.

    Signs are fixed (the largest entry of each row of A is positive), so that every machine finds the same factors.
    Draws from torch's default generator if iterations is given (torch.svd_lowrank).
    """
    if iterations is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, columns = torch.svd_lowrank(weight, rank, niter=iterations)
        right = columns.T
    left, right = left[:, :rank], right[:rank]
    root = (values[:rank] / scale).sqrt()
    signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
    return {"a": root[:, None] * signs * right, "b": left * signs.T * root}


def _half(factor: Tensor, *, dim: int, second: bool, sign: int) -> Tensor:
    """What an earlier result has of one factor along dim: of what learned, or of what stayed."""
    return sign * factor.chunk(2, dim)[second]


def _of_twice_the_rank(config: Any) -> Any:
    """The same scale: alpha grows as the rank, or as its root with use_rslora."""
    config = deepcopy(config)
    factor = 2**0.5 if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    return config
