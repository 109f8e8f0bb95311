"""P-tuning: rows before the embedded tokens, made by a bidirectional LSTM and an MLP that the result does not need."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsft.methods.soft_prompt import Rows, SoftPrompt


@dataclass(frozen=True, kw_only=True)
class PTuning(SoftPrompt):
    """Rows W2 relu(W1 biLSTM(E) + b1) + b2 before the embedded tokens, E (l, d) learned, l = num_virtual_tokens.

    encoder_hidden_size: h of the LSTM in each direction, None: d / 2, as in the paper's code. Parameters: l d, and
    8 h (in + h + 2) for each of encoder_num_layers, in = d, then 2 h, and (2 h + d) (2 h + 1). All rows come before the
    example; the paper's templates also put some behind it.
    The start is not the base, since every token attends to the rows.
    Source: Liu et al. 2021, arXiv:2103.10385, and THUDM/P-tuning; PEFT's PromptEncoder with LSTM; file format: the rows
    alone, as PEFT's tuners/prompt_tuning.
    """

    encoder_hidden_size: int | None
    encoder_num_layers: int

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        super().__post_init__()
        if self.encoder_hidden_size is not None and self.encoder_hidden_size < 1:
            raise ValueError(
                f"method.encoder_hidden_size must be 1 or more, got {self.encoder_hidden_size}; null takes half of the "
                "model's width"
            )
        if self.encoder_num_layers < 1:
            raise ValueError(f"method.encoder_num_layers must be 1 or more, got {self.encoder_num_layers}")

    def rows(self, width: int) -> Rows:
        """The encoder."""
        if self.encoder_hidden_size is None and width % 2:
            raise ValueError(
                f"method.encoder_hidden_size must be given where the model's width is odd, {width}, got null; set it"
            )
        hidden = self.encoder_hidden_size or width // 2
        return _Encoder(_shapes(self.num_virtual_tokens, width, hidden, self.encoder_num_layers))

    def folded(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What the encoder gives: it depends on its parameters alone."""
        with torch.no_grad():
            return encode(weights)

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """As torch's defaults: E ~ N(0, 1), the LSTM U(+-1/sqrt(h)), the MLP U(+-1/sqrt(2 h))."""
        owner, _, key = name.rpartition(".")
        if key == "embedding":
            return torch.randn(param.shape)
        hidden = model.get_submodule(owner).get_parameter("weight_hh_l0").shape[1]
        bound = 1 / math.sqrt(2 * hidden if key in MLP else hidden)
        return torch.empty(param.shape).uniform_(-bound, bound)


MLP = ("hidden_weight", "hidden_bias", "out_weight", "out_bias")
CELL = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""One direction of one layer, in the order that torch.lstm takes them."""


class _Encoder(Rows):
    """Its parameters are its own, not those of an nn.LSTM, whose flat list of them would not follow what sharding does
    to them: each strategy makes them whole for this module's forward.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))

    def rows(self) -> Tensor:
        weights = dict(self.named_parameters(remove_duplicate=False))  # where memory is counted, those alike are one
        with torch.autocast(weights["embedding"].device.type, enabled=False):  # a handful of rows
            return encode({name: value.float() for name, value in weights.items()})


def encode(weights: Mapping[str, Tensor]) -> Tensor:
    """The rows (l, d), from all parameters of an encoder by name; names and shapes of the LSTM's are nn.LSTM's."""
    cells = [
        [weights[f"{part}_l{layer}{way}"] for part in CELL]
        for layer in range(sum(name.startswith("weight_hh") for name in weights) // 2)
        for way in ("", "_reverse")
    ]
    embedding = weights["embedding"]
    start = embedding.new_zeros(len(cells), 1, cells[0][1].shape[1])
    flat = [weight for cell in cells for weight in cell]
    with torch.backends.cudnn.flags(enabled=False):  # it wants one flat buffer, and would multiply in TF32
        states, _, _ = torch.lstm(
            embedding[None], (start, start), flat, True, len(cells) // 2, 0.0, torch.is_grad_enabled(), True, True
        )
    hidden = F.linear(states[0], weights["hidden_weight"], weights["hidden_bias"]).relu()
    return F.linear(hidden, weights["out_weight"], weights["out_bias"])


def _shapes(length: int, width: int, hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    both = 2 * hidden
    shapes: dict[str, tuple[int, ...]] = {"embedding": (length, width)}
    for layer in range(layers):
        inputs = both if layer else width
        for way in ("", "_reverse"):
            sides = ((4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
            shapes |= {f"{part}_l{layer}{way}": shape for part, shape in zip(CELL, sides, strict=True)}
    return shapes | dict(zip(MLP, ((both, both), (both,), (width, both), (width,)), strict=True))
