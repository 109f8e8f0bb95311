"""Which tensor of a rebuilt model is which tensor of the base: by identity, whatever methods do to the names."""

from torch import Tensor, nn

from dsft.protocols import PackedLinear


class Lineage:
    """The base model's tensors and packed linears with their names.

    Make it after Quantizer.convert (which keeps names) and before Method.attach (which changes them); ask it after
    attach and before Strategy.shard (which replaces the tensors and keeps the names).
    """

    def __init__(self, model: nn.Module) -> None:
        # the objects are kept beside their names, so that no id is reused
        self._tensors: dict[int, tuple[Tensor, str]] = {}
        self._linears: dict[int, tuple[nn.Module, str]] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._tensors[id(tensor)] = (tensor, name)
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                self._linears[id(module)] = (module, name)

    def origins(self, model: nn.Module) -> dict[str, str]:
        """Current name -> base name, for every base tensor in model; a packed linear's weight is listed as .weight."""
        origins = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if id(tensor) in self._tensors:
                origins[name] = self._tensors[id(tensor)][1]
        for name, module in model.named_modules():
            if id(module) in self._linears:
                origins[f"{name}.weight"] = f"{self._linears[id(module)][1]}.weight"
        return origins
