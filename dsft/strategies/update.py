"""One optimizer step on this process's parameters or shards: global norm, clipping, rate, move; and their state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dsft.course import not_kept
from dsft.strategies.whole import local, part_of, whole
from dsft.strategy import OptimizerFactory, Shape, Strategy

PARAM = "param"
"""Prefix of parameters in a state; the optimizer's tensors have their own key for prefix."""


class Update:
    """The optimizer of a run, and the parameters that it moves."""

    def __init__(self, groups: Sequence[dict[str, Any]], make_optimizer: OptimizerFactory) -> None:
        self.optimizer = make_optimizer(groups)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.named: dict[str, nn.Parameter] = {}
        for group in self.optimizer.param_groups:
            self.named |= dict(zip(group["param_names"], group["params"], strict=True))
        self.params = list(self.named.values())
        self.group_of = {param: group for group in self.optimizer.param_groups for param in group["params"]}
        self.norms: dict[Tensor, Tensor] | None = None
        self.hooks: list[Any] = []

    def release(self, lr_scale: float) -> None:
        """Until step, backward moves each parameter as soon as its gradient is whole, and frees the gradient.

        Norms are kept for step. Nothing is clipped, and what a gradient that is not finite belongs to moves too.
        """
        self._set_rates(lr_scale)
        self.norms = {}
        self.hooks = [param.register_post_accumulate_grad_hook(self._move) for param in self.params]

    def _move(self, param: Tensor) -> None:
        assert param.grad is not None
        assert self.norms is not None
        self.norms[param] = torch.linalg.vector_norm(param.grad)
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [{**self.group_of[param], "params": [param]}]
        self.optimizer.step()
        self.optimizer.param_groups = groups
        param.grad = None

    def step(self, max_norm: float, lr_scale: float) -> float:
        """Clip the gradients to max_norm, move, forget them. Returns the norm before clipping.

        If it is not finite, nothing moves. Gradients must be whole: summed over ranks, or sharded as DTensors.
        After release, it moves what the last backward did not reach.
        """
        if self.norms is not None:
            return self._end_release()
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        total = gathered(norm).item()
        if math.isfinite(total):
            torch.nn.utils.clip_grads_with_norm_(self.params, max_norm, norm)
            self._set_rates(lr_scale)
            self.optimizer.step()
        self.drop()
        return total

    def _end_release(self) -> float:
        """Of gradients that are gone, the same norm as of gradients that are there."""
        assert self.norms is not None
        for param in [param for param in self.params if param.grad is not None]:
            self._move(param)
        norm = torch.linalg.vector_norm(torch.stack([self.norms[p] for p in self.params if p in self.norms]))
        self.drop()
        return float(gathered(norm).item())

    def _set_rates(self, lr_scale: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * lr_scale

    def drop(self) -> None:
        """Forget the gradients."""
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.norms = [], None
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs, live: PARAM/NAME, KEY/NAME of the optimizer's tensors, its numbers by KEY."""
        tensors: dict[str, Tensor] = {f"{PARAM}/{name}": param.detach() for name, param in self.named.items()}
        numbers: dict[str, dict[str, Any]] = {}
        for name, param in self.named.items():
            for key, value in self.optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    tensors[f"{key}/{name}"] = value
                elif value is not None:
                    numbers.setdefault(key, {})[name] = value
        return tensors | {key: pack_numbers(values, list(self.named)) for key, values in numbers.items()}

    def template(self, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """Tensors to fill with a saved state: the optimizer's to be, and values for the parameters, laid out alike.

        What is to be copied waits on the host where it is whole, as before a save; a shard takes no more than the
        gradient that will be in its place.
        """
        same_parameters(shapes, {name: param.shape for name, param in self.named.items()})
        made, paged = dict[str, Tensor](), self._paged()
        for key, (size, dtype) in shapes.items():
            kind, _, name = key.partition("/")
            param = self.named[name].detach() if name else None
            if key in paged and (paged[key].shape, paged[key].dtype) == (size, dtype):
                made[key] = paged[key]
            elif kind == PARAM and param is not None:
                made[key] = torch.empty_like(param, device=None if hasattr(param, "full_tensor") else "cpu")
            elif param is not None and param.shape == size:
                made[key] = torch.empty_like(param, dtype=dtype)
            else:
                made[key] = torch.empty(size, dtype=dtype, device=param.device if param is not None else None)
        return made

    def _paged(self) -> dict[str, Tensor]:
        """New tensors of bitsandbytes' paged optimizers, KEY/NAME: memory that the driver moves to the host and back.

        No other tensor will do in their place, so the optimizer is asked for those of a first step.
        """
        made: dict[str, Tensor] = {}
        if not getattr(self.optimizer, "is_paged", False):
            return made
        names = {param: name for name, param in self.named.items()}
        for position, group in enumerate(self.optimizer.param_groups):
            for index, param in enumerate(group["params"]):
                self.optimizer.init_state(group, param, position, index)  # type: ignore[attr-defined]
                for kind, value in self.optimizer.state.pop(param).items():
                    if getattr(value, "is_paged", False):
                        made[f"{kind}/{names[param]}"] = value
        return made

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over a template that has been filled."""
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if not name:
                for owner, number in unpack_numbers(value, list(self.named)).items():
                    self.optimizer.state[self.named[owner]][kind] = number
            elif kind != PARAM:
                self.optimizer.state[self.named[name]][kind] = value
            else:
                self.named[name].detach().copy_(value)


def gathered(value: Tensor) -> Tensor:
    """The whole of a DTensor (collective), any other tensor as it is. DTensor's import costs a second: not here."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def same_parameters(shapes: Mapping[str, Shape], named: Mapping[str, torch.Size]) -> None:
    """Raise RuntimeError if a saved state does not hold the parameters that this run trains."""
    saved = {key.partition("/")[2]: size for key, (size, _) in shapes.items() if key.startswith(f"{PARAM}/")}
    for name in sorted(saved.keys() | named.keys()):
        if saved.get(name) != named.get(name):
            raise RuntimeError(
                f"the checkpoint is of other parameters: {name} is {_said(saved.get(name))} in it and "
                f"{_said(named.get(name))} in this run; choose another run_dir"
            )


def _said(size: torch.Size | None) -> str:
    return "absent" if size is None else " x ".join(map(str, size)) or "a number"


def pack_numbers(values: Mapping[str, Any], names: Sequence[str]) -> Tensor:
    """(P,) one number per parameter, NaN where it has none: float32 tensors stay so, Python's integers become int64.

    An integer that is missing is -1.
    """
    if any(isinstance(value, Tensor) for value in values.values()):
        return torch.tensor([float(values.get(name, math.nan)) for name in names], dtype=torch.float32)
    return torch.tensor([int(values.get(name, -1)) for name in names], dtype=torch.int64)


def unpack_numbers(packed: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """The numbers that pack_numbers packed."""
    if packed.dtype == torch.int64:
        return {name: int(value) for name, value in zip(names, packed, strict=True) if value >= 0}
    return {name: value.clone() for name, value in zip(names, packed, strict=True) if not value.isnan()}


@dataclass(kw_only=True)
class OnTensors(Strategy):
    """A strategy whose optimizer is ours, on whole tensors or on DTensors; how they are laid out is its own."""

    update: Update = field(init=False, repr=False)

    def prepare(
        self, model: nn.Module, groups: Sequence[dict[str, Any]], make_optimizer: OptimizerFactory
    ) -> nn.Module:
        """Build the optimizer."""
        self.update = Update(groups, make_optimizer)
        return model

    def release(self, lr_scale: float) -> None:
        """Let backward move; see Update."""
        self.update.release(lr_scale)

    def step(self, max_norm: float, lr_scale: float) -> float:
        """Move; see Update."""
        return self.update.step(max_norm, lr_scale)

    def drop(self) -> None:
        """Forget the gradients."""
        self.update.drop()

    def full(self, param: nn.Parameter) -> Tensor:
        """The whole parameter on CPU; gathers a DTensor (collective)."""
        return gathered(param.detach()).cpu()

    def values(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """All in one collective."""
        return whole([param.detach() for param in params])

    def gradients(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """All in one collective."""
        grads = [_gradient(param) for param in params]
        return [found.clone() if found is grad else found for found, grad in zip(whole(grads), grads, strict=True)]

    def add_gradients(self, params: Sequence[nn.Parameter], more: Sequence[Tensor]) -> None:
        """Each rank's part of them."""
        for param, value in zip(params, more, strict=True):
            mine, part = part_of(value, _gradient(param))
            mine.add_(part)

    def write(self, params: Sequence[nn.Parameter], new: Sequence[Tensor]) -> None:
        """Each rank's part of them."""
        self.rest()
        for param, value in zip(params, new, strict=True):
            mine, part = part_of(value, param)
            mine.copy_(part)

    def parts(self) -> list[Tensor]:
        """Whole parameters, or this rank's shards."""
        return [local(param) for param in self.update.params]

    def export_state(self) -> dict[str, Tensor]:
        """The live state."""
        return {**self.update.state(), **self.kept}

    def state_template(self, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """Fresh tensors, of which the optimizer's become its own."""
        return self.update.template(not_kept(shapes)) | self.keepsakes(shapes)

    def import_state(self, state: dict[str, Tensor]) -> None:
        """Go on from it."""
        self.rest()  # what is still gathered after a forward pass would be used again as it was
        self.update.restore(not_kept(state))
        self.take_keepsakes(state)


def _gradient(param: nn.Parameter) -> Tensor:
    """Of a parameter that no backward reached, zeros."""
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    return param.grad
