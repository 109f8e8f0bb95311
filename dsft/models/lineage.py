"""Which tensor of a rebuilt model is which tensor of the base: by identity, whatever methods do to the names."""

from torch import Tensor, nn

from dsft.packed import packed_weights


class Lineage:
    """The base model's tensors and packed weights with their names.

    Make it after Quantizer.convert (which keeps names) and before Method.attach (which changes them); ask it after
    attach and before Strategy.shard (which replaces the tensors and keeps the names).
    """

    def __init__(self, model: nn.Module) -> None:
        # the objects are kept beside their names, so that no id is reused
        self._tensors: dict[int, tuple[Tensor, str]] = {}
        self._packing: dict[int, tuple[nn.Module, str]] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._tensors[id(tensor)] = (tensor, name)
        for name, module in model.named_modules():
            if packed_weights(module):
                self._packing[id(module)] = (module, name)

    def origins(self, model: nn.Module) -> dict[str, str]:
        """Current name -> base name, for every base tensor in model; a packed weight is listed by its own name."""
        origins = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if id(tensor) in self._tensors:
                origins[name] = self._tensors[id(tensor)][1]
        for name, module in model.named_modules():
            if id(module) in self._packing:
                before = self._packing[id(module)][1]
                origins |= {f"{name}.{key}": f"{before}.{key}" for key in packed_weights(module)}
        return origins
