"""The state of a ZeRO run in the form that all strategies share, through DeepSpeed's accessors.

Whole tensors travel one at a time: gathered for a save, and each kept by one rank only; read by one rank for a resume,
and broadcast. Memory per rank: its share of the state on the host, and one whole tensor.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsft.comm.world import World
from dsft.strategies.update import PARAM, pack_numbers, same_parameters, unpack_numbers
from dsft.strategy import OptimizerFactory, Shape


@dataclass(frozen=True)
class ZeroState:
    """optimizer: DeepSpeed's; named: what trains, in order."""

    world: World
    optimizer: Any
    named: dict[str, nn.Parameter]
    make_optimizer: OptimizerFactory

    def export(self) -> dict[str, Tensor]:
        """What this rank is to write. Collective."""
        utils = importlib.import_module("deepspeed").utils
        keys, numbers = self._kinds()
        self._link()
        owner = self._owners()
        mine: dict[str, Tensor] = {}
        for name, param in self.named.items():
            for key in (PARAM, *keys):
                if key == PARAM:
                    value = utils.safe_get_full_fp32_param(param)
                else:
                    value = utils.safe_get_full_optimizer_state(param, key)
                if owner[name] == self.world.rank:
                    mine[f"{key}/{name}"] = value.detach().to("cpu", copy=True)
        return mine | {key: pack_numbers(dict.fromkeys(self.named, value), [*self.named]) for key, value in numbers}

    def template(self, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """What this rank is to read: numbers, and the tensors of its own names."""
        same_parameters(shapes, {name: _shape(param) for name, param in self.named.items()})
        owner = self._owners()
        mine = {}
        for key, (size, dtype) in shapes.items():
            name = key.partition("/")[2]
            if not name or owner[name] == self.world.rank:
                mine[key] = torch.empty(size, dtype=dtype)
        return mine

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over a filled template. Collective."""
        numbers = {key: value for key, value in state.items() if "/" not in key}
        known = {key for part in self.world.gather(list(state)) for key in part}
        kinds = sorted({key.partition("/")[0] for key in known if "/" in key})
        if any(kind != PARAM for kind in kinds) or numbers:
            self._begin()
        owner = self._owners()
        for name, param in self.named.items():
            for kind in (kind for kind in kinds if f"{kind}/{name}" in known):
                self._set(param, kind, self._broadcast(param, owner[name], state.get(f"{kind}/{name}")))
        for key, packed in numbers.items():
            value = next(iter(unpack_numbers(packed, list(self.named)).values()))
            for part in self._parts():
                own = value.clone() if isinstance(value, Tensor) else value  # else one count rises once per group
                self.optimizer.optimizer.state[part][key] = own

    def _broadcast(self, param: nn.Parameter, source: int, value: Tensor | None) -> Tensor:
        """The whole tensor on every rank, on the device; value on source alone."""
        whole = torch.empty(_shape(param), dtype=torch.float32, device=self.world.device)
        if value is not None:
            whole.copy_(value)
        if self.world.size > 1:
            dist.broadcast(whole, source)
        return whole

    def _set(self, param: nn.Parameter, kind: str, value: Tensor) -> None:
        """This rank's part of the master value or of an optimizer tensor; and the value that forward uses."""
        deepspeed = importlib.import_module("deepspeed")
        utils = deepspeed.utils
        if not hasattr(param, "ds_shape"):
            if kind == PARAM:
                utils.safe_set_full_fp32_param(param, value)
                param.data.copy_(value)
            else:
                utils.safe_set_full_optimizer_state(param, value, kind)
            return
        # safe_set_full_* of stage 3 fails where the ranks do not divide a tensor evenly: set the padded part here
        length = int(param.ds_tensor.numel())  # type: ignore[attr-defined]
        padded = value.new_zeros(length * self.world.size)
        padded[: value.numel()] = value.flatten()
        part = padded[length * self.world.rank :][:length]
        if kind == PARAM:
            utils.safe_set_local_fp32_param(param, part)
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                param.data.copy_(value)
        else:
            utils.safe_set_local_optimizer_state(param, part, kind)

    def _begin(self) -> None:
        """Give the optimizer the tensors that it makes at its first step, by a step of rate 0 without gradients."""
        inner, parts = self.optimizer.optimizer, self._parts()
        before = [part.grad for part in parts]
        for part in parts:
            part.grad = torch.zeros_like(part)
        scratch = self.make_optimizer([{"params": [(str(i), part) for i, part in enumerate(parts)], "lr": 0.0}])
        scratch.step()
        for part, grad in zip(parts, before, strict=True):
            inner.state[part] = scratch.state[part]
            part.grad = grad
        self._link()

    def _link(self) -> None:
        """Stages 1 and 2 link the optimizer's tensors to parameters: again, since DeepSpeed does so for all groups
        after the first one's first step, when the others have none (their accessors then say "not found").
        """
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _kinds(self) -> tuple[list[str], list[tuple[str, Any]]]:
        """Names of the optimizer's tensors, and its numbers; they are the same for all parameters."""
        inner = self.optimizer.optimizer
        state: dict[str, Any] = next((inner.state[part] for part in self._parts() if inner.state.get(part)), {})
        tensors = [key for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0]
        return tensors, [(key, value) for key, value in state.items() if key not in tensors and value is not None]

    def _parts(self) -> list[Tensor]:
        """This rank's flat fp32 partitions, which the optimizer moves."""
        stage3 = hasattr(self.optimizer, "fp32_partitioned_groups_flat")
        name = "fp32_partitioned_groups_flat" if stage3 else "single_partition_of_fp32_groups"
        return list(getattr(self.optimizer, name))

    def _owners(self) -> dict[str, int]:
        """Name -> the rank that writes and reads its tensors: the largest first, to whoever has least."""
        load = [0] * self.world.size
        owners = {}
        sizes = [(name, _shape(param).numel()) for name, param in self.named.items()]
        for name, size in sorted(sizes, key=lambda pair: (-pair[1], pair[0])):
            owners[name] = load.index(min(load))
            load[owners[name]] += size
        return owners


def _shape(param: nn.Parameter) -> torch.Size:
    """Of the whole parameter, which stage 3 has divided."""
    shape: torch.Size = getattr(param, "ds_shape", param.shape)
    return shape
