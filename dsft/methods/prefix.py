"""Prefix tuning: trainable keys and values inside each attention, before those of every example; the base is frozen.

Inside the attention, and not a cache handed to the model (PEFT's way), so that recomputation, sharding, packing and
generation see no difference to other parameters.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsft.methods.peft_bridge import write_adapter
from dsft.methods.peft_folder import Folder
from dsft.methods.stored import Stored, shapes
from dsft.protocols import PREFIX, Anatomy, Method

EMBEDDINGS = "prompt_embeddings"
"""The one tensor (l, L 2 d_kv) of PEFT's file: per layer, keys then values."""


@dataclass(frozen=True, kw_only=True)
class Prefix(Method):
    """l = num_virtual_tokens keys and values per layer. Parameters: L 2 l d_kv, d_kv = key-value heads x head size.

    projection: width h of the network that makes them in training, P = W2 tanh(W1 E + b1) + b2 with E (l, d); it is
    folded away in the result. Parameters then: l d + d h + h + L 2 d_kv (h + 1). None: they are the parameters.
    Source: prefix tuning, Li & Liang 2021, arXiv:2101.00190, section 4; P-tuning v2 (no projection), Liu et al. 2022,
    arXiv:2110.07602; file format: PEFT's tuners/prefix_tuning.
    """

    num_virtual_tokens: int
    projection: int | None
    init_from: str | None

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.num_virtual_tokens < 1:
            raise ValueError(f"method.num_virtual_tokens must be 1 or more, got {self.num_virtual_tokens}")
        if self.projection is not None and self.projection < 1:
            raise ValueError(
                f"method.projection must be 1 or more, got {self.projection}; null learns keys and values themselves"
            )
        if self.init_from is not None and self.projection is not None:
            raise ValueError(
                f"method.projection must be null with method.init_from, got {self.projection}: a result holds keys and "
                "values, and not the network that made them; set method.projection=null"
            )

    def attach(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Freeze the base; give each attention its keys and values, and the model what they share."""
        model.requires_grad_(False)
        attentions = [_attention(model.get_submodule(name)) for name in anatomy.blocks]
        heads, size = _shape(model, attentions)
        for attention in attentions:
            attention.add_module(PREFIX, _Pairs(self.num_virtual_tokens, heads, size, self.projection))
        embedding = model.get_submodule(anatomy.embedding)
        stack = model.get_submodule(anatomy.blocks[0].rsplit(".", 2)[0])  # the module that runs the blocks
        shared = None
        if self.projection is not None:
            width: int = embedding.embedding_dim  # type: ignore[assignment]
            shared = _Shared(self.num_virtual_tokens, width, self.projection)
            stack.add_module(PREFIX, shared)
        call = _Call(self.num_virtual_tokens, shared)
        stack.register_forward_pre_hook(call.begin, with_kwargs=True)
        embedding.register_forward_hook(call.embedded)
        return model

    def stored(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Keys and values of all layers, from a folder of a run or of PEFT's."""
        if self.init_from is None:
            return {}
        folder, layers = Folder(self.init_from), _layers(model)
        folder.check_type("PREFIX_TUNING", folder.config())
        length, width = layers[0][1].pairs.shape
        found = shapes(folder.tensors).get(EMBEDDINGS, ())
        if found != (length, width * len(layers)):
            if len(found) == 2 and found[1] == width * len(layers):
                raise ValueError(
                    f"method.init_from must agree in num_virtual_tokens, {length}, got {found[0]}; set "
                    "method.num_virtual_tokens to it"
                )
            raise ValueError(
                f"method.init_from must be an adapter of this model, {EMBEDDINGS} is {list(found)} there and "
                f"{[length, width * len(layers)]} here; take the model that it was trained on"
            )
        cuts = [partial(_columns, first=index * width, count=width) for index in range(len(layers))]
        names = [f"{name}.pairs" for name, _ in layers]
        return Stored(folder.tensors, {name: (EMBEDDINGS, cut) for name, cut in zip(names, cuts, strict=True)})

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """PEFT's and torch's defaults: N(0, 1) for E or the keys and values; U(+-1/sqrt(in)) for the network."""
        kind = name.rpartition(".")[2]
        if kind in ("embedding", "pairs"):
            return torch.randn(param.shape)
        owner = model.get_submodule(name.rpartition(".")[0])
        bound = 1 / math.sqrt(owner.get_parameter("weight").shape[1])
        return torch.empty(param.shape).uniform_(-bound, bound)

    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path, base: str) -> Mapping[str, Tensor]:
        """Write adapter_config.json and adapter_model.safetensors as PEFT reads them; the projection is folded in."""
        from peft import PrefixTuningConfig

        layers = _layers(model)
        heads, size = layers[0][1].heads, layers[0][1].size
        hidden = None
        if self.projection is not None:
            (name,) = (name for name, module in model.named_modules() if isinstance(module, _Shared))
            hidden = _hidden(*(weights[f"{name}.{key}"] for key in ("embedding", "weight", "bias")))
        parts = [
            weights[f"{name}.pairs"]
            if hidden is None
            else F.linear(hidden, weights[f"{name}.weight"], weights[f"{name}.bias"])
            for name, _ in layers
        ]
        config: Any = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.num_virtual_tokens,
            num_layers=len(layers),
            num_attention_heads=heads,
            token_dim=heads * size,
            num_transformer_submodules=1,
            prefix_projection=False,
        )
        return write_adapter(config, {EMBEDDINGS: torch.cat(parts, dim=1)}, folder, base)

    @property
    def starts_as_base(self) -> bool:
        """False: even keys of zero take a share of the softmax, so no first value leaves the logits as they are."""
        return False

    @property
    def positions(self) -> int:
        """Each token comes after the virtual ones."""
        return self.num_virtual_tokens


class _Pairs(nn.Module):
    """One attention's keys and values, (1, G, l, D) each, learned or made from what all layers share (l, h)."""

    def __init__(self, length: int, heads: int, size: int, projection: int | None) -> None:
        super().__init__()
        self.length, self.heads, self.size = length, heads, size
        width = 2 * heads * size
        if projection is None:
            self.pairs = nn.Parameter(torch.empty(length, width, device="meta"))
        else:
            self.weight = nn.Parameter(torch.empty(width, projection, device="meta"))
            self.bias = nn.Parameter(torch.empty(width, device="meta"))

    def forward(self, shared: Tensor | None) -> tuple[Tensor, Tensor]:
        if shared is None:
            pairs: Tensor = self.pairs
        else:
            with torch.autocast(shared.device.type, enabled=False):  # a handful of rows: not worth a rounding
                pairs = F.linear(shared.to(self.weight.dtype), self.weight, self.bias)
        keys, values = pairs.view(self.length, 2, self.heads, self.size).permute(1, 2, 0, 3)[:, None]
        return keys, values


class _Shared(nn.Module):
    """tanh(W1 E + b1), (l, h): what the last linear of every layer takes."""

    def __init__(self, length: int, width: int, projection: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(length, width, device="meta"))
        self.weight = nn.Parameter(torch.empty(projection, width, device="meta"))
        self.bias = nn.Parameter(torch.empty(projection, device="meta"))

    def forward(self) -> Tensor:
        with torch.autocast(self.embedding.device.type, enabled=False):
            return _hidden(self.embedding, self.weight, self.bias)


def _layers(model: nn.Module) -> list[tuple[str, _Pairs]]:
    """Every attention's keys and values, by name, in the order of the layers."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _Pairs)]


def _columns(table: Tensor, *, first: int, count: int) -> Tensor:
    return table[:, first : first + count]


def _hidden(embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(embedding, weight, bias).tanh()


class _Call:
    """Around each call of the stack of blocks: tokens move up by l positions; what is shared is made and handed on.

    The blocks get what is shared as a leaf, which sums their gradients up in any way of recomputation (reentrant
    checkpointing runs a backward pass of its own per block, and could not go through one graph twice).
    """

    def __init__(self, length: int, shared: _Shared | None) -> None:
        self.length, self.shared = length, shared
        self.made: tuple[Tensor, Tensor] | None = None

    def begin(self, stack: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the stack: its keywords, changed."""
        attention = stack.config._attn_implementation
        if not attention.startswith("dsft_"):
            raise RuntimeError(f"{attention} attention would leave the prefix out: use one of dsft.models.attention")
        positions = kwargs.get("position_ids")
        if positions is None:
            tokens = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
            cache = kwargs.get("past_key_values")
            first = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
        kwargs["position_ids"] = positions + self.length
        if self.shared is not None:
            hidden = self.shared()
            leaf = hidden
            if torch.is_grad_enabled() and hidden.requires_grad:
                leaf = hidden.detach().requires_grad_()
                self.made = hidden, leaf
            kwargs[PREFIX] = leaf
        return args, kwargs

    def embedded(self, embedding: nn.Module, args: Any, output: Tensor) -> Tensor:
        """After the embedding, where the blocks' backward pass ends: the leaf's gradient goes on from here."""
        if self.made is None:
            return output
        (hidden, leaf), self.made = self.made, None
        return _Tie.apply(output, hidden, [leaf])  # type: ignore[no-any-return]


class _Tie(torch.autograd.Function):
    """The embedded tokens as they are; in backward, hidden gets the gradient that the blocks left on leaf.

    All of it is there: each use of leaf was made after this node, and autograd takes later nodes first. leaf comes in a
    list, which autograd does not look into: else its gradient would wait for this node.
    """

    @staticmethod
    def forward(ctx: Any, embedded: Tensor, hidden: Tensor, leaf: list[Tensor]) -> Tensor:
        (ctx.leaf,) = leaf
        return embedded.view_as(embedded)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, ctx.leaf.grad, None


def _attention(block: nn.Module) -> nn.Module:
    """The one module of block that transformers' attention interface is called with."""
    found = [module for module in block.modules() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")]
    if len(found) != 1:
        raise ValueError(
            f"model must have one attention in each block to hold a prefix, got {type(block).__name__} with "
            f"{len(found)}; take method=lora"
        )
    return found[0]


def _shape(model: Any, attentions: Iterable[nn.Module]) -> tuple[int, int]:
    """Key-value heads and their size, alike in all attentions."""
    numbers = model.config.get_text_config()
    queries: int = numbers.num_attention_heads
    heads: int = getattr(numbers, "num_key_value_heads", None) or queries
    shapes = set()
    for attention in attentions:
        size: Any = getattr(attention, "head_dim", 0)
        widths = {name: getattr(m, "out_features", getattr(m, "nf", 0)) for name, m in attention.named_children()}
        apart = widths.get("k_proj") == widths.get("v_proj") == heads * size
        if not apart and (queries + 2 * heads) * size not in widths.values():
            raise ValueError(
                f"model must have keys and values of {heads} heads to hold a prefix, got {type(attention).__name__} "
                f"with {widths}; take method=lora"
            )
        shapes.add((heads, size))
    if len(shapes) != 1:
        raise ValueError(f"model must have heads of one size to hold a prefix, got {sorted(shapes)}; take method=lora")
    return shapes.pop()
