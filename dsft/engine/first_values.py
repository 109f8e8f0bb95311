"""The values that a run's tensors begin with: of the base, of an earlier adapter, of the method, of a reference."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dsft.comm.world import World
from dsft.config import Run
from dsft.engine.masks import stream
from dsft.engine.precision import DTYPES
from dsft.models.files import ModelFiles
from dsft.models.heads import head_tensors
from dsft.models.materialize import materialize
from dsft.models.values import Values, matrices, open_values
from dsft.packed import packed_weights

if TYPE_CHECKING:
    from dsft.engine.assemble import Skeleton


class First:
    """The values that a run's tensors begin with. home: where they are made."""

    def __init__(self, run: Run, bones: "Skeleton", files: ModelFiles, home: World) -> None:
        self.run, self.bones, self.home = run, bones, home
        self.values = open_values(files, DTYPES[run.train.precision], run.train.seed)
        self.head = head_tensors(bones.model) if files.labels else frozenset()

    def initial(self, model: nn.Module, name: str, param: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the initial value of a tensor that the base does not have: the stored one, else the method's own.

        The value is whole and on CPU.
        """
        if name in stored:
            return stored[name]
        if name in self.head:  # no output is better than another before the first step
            return torch.zeros(param.shape)
        with seeded(self.run.train.seed, name):
            read = partial(_trained_weight, self.bones, self.values, self.home.device)
            return self.run.method.initial(model, name, param, read)

    def write(self, model: nn.Module, stored: Mapping[str, Tensor]) -> None:
        """Give all that learns in model the values that it begins with where these are stored. Collective.

        The bones are of a model on meta that no strategy has divided, so that shapes can be read there.
        """
        there = self.bones.model
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            origin = self.bones.of_base.get(name, "")
            if name not in stored and origin in self.values:
                value = self.values.full(origin)
            else:
                value = self.initial(there, name, there.get_parameter(name), stored)
            self.run.strategy.write([param], [value.float().to(self.home.device)])


def fill(run: Run, begin: First, model: nn.Module, world: World, *, first: Sequence[str]) -> None:
    """Give every tensor of model its value. first: the packed weights that are compared. Collective."""
    bones, home = begin.bones, begin.home

    def initial(name: str, param: Tensor) -> Tensor:
        return begin.initial(model, name, param, bones.stored)

    materialize(model, begin.values, home, origins=bones.origins, initial=initial, place=run.strategy.place)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(world.device)
    for name in first:
        _check_bytes(run, bones, name, begin.values, home.device)


class seeded:  # noqa: N801  # a context, used like a function
    """Draw from torch's default CPU stream as if newly seeded by words; the stream goes on afterwards as before."""

    def __init__(self, *words: object) -> None:
        self.seed = stream(*words)

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.state)


def _trained_weight(bones: "Skeleton", values: Values, device: torch.device, name: str) -> Tensor:
    """Weight (out, in), on CPU, of the linear called name as training sees it: packed and unpacked where it is packed.

    device: where the model's own are packed. Another one sums in another order, and so packs other bytes.
    """
    origin = bones.origins[f"{name}.weight"]
    packed = packed_weights(bones.model.get_submodule(name)).get("weight")
    if packed is None:
        return values.full(origin)
    parts = packed.pack(matrices(values, origin, packed, device))
    return packed.unpack([parts[part] for part in packed.parts], packed.dtype).cpu()


def first_packed(model: nn.Module) -> list[str]:
    """Names of the first packed linear of model and of the first packed stack of experts, as far as it has them."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for key, weight in packed_weights(module).items():
            found.setdefault(len(weight.shape), f"{path}.{key}")
    return [*found.values()]


def _check_bytes(run: Run, bones: "Skeleton", name: str, values: Values, device: torch.device) -> None:
    """The start-up self-test: a packed weight as its forward pass gets it is the weight packed here, byte for byte.

    A mixed-precision cast of packed bytes is silent otherwise (bitsandbytes#1945). device: where the model's own were
    packed; on another one the mean of the scales may differ in its last bit. Collective.
    """
    path, _, key = name.rpartition(".")
    packed = packed_weights(bones.model.get_submodule(path))[key]
    expected = packed.pack(matrices(values, bones.origins[name], packed, device))
    got = run.strategy.used(bones.model, path, packed.parts)
    for part in packed.parts:
        mine, theirs = got[part], expected[part].cpu()
        if mine.dtype != theirs.dtype or not torch.equal(mine, theirs):
            raise RuntimeError(
                f"{path}.{part}: the packed weight that training would see is not the one that was packed: "
                f"{type(run.strategy).__name__} does not carry its bytes with torch {torch.__version__} here "
                f"({theirs.dtype} became {mine.dtype}); do not train on it, take quantization=none or another strategy"
            )
