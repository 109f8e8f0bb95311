"""A soft prompt: rows that learn, before the embedded tokens of every example; the base is frozen.

They go in where the module that runs the blocks is called, and what the blocks give for them goes out where it returns.
So whoever calls the model sees its own tokens alone: targets, logits_to_keep, the ids of generation stay as they are.
"""

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsft.methods.peft_bridge import write_adapter
from dsft.protocols import Anatomy, Method

NAME = "dsft_prompt"
"""Name of the rows' module, a child of the one that runs the blocks."""

Starts = Sequence[Sequence[int]]
"""Of each row of a batch, where the prompt goes in: before the token of that index. As many in each."""

EMBEDDINGS = "prompt_embeddings"
"""The one tensor (l, d) of PEFT's file."""


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(Method):
    """Rows (l, d), l = num_virtual_tokens, d = the width of the embedding. The result is PEFT's prompt tuning."""

    num_virtual_tokens: int

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.num_virtual_tokens < 1:
            raise ValueError(f"method.num_virtual_tokens must be 1 or more, got {self.num_virtual_tokens}")

    @abstractmethod
    def rows(self, width: int) -> "Rows":
        """The module of the rows, on meta."""

    @abstractmethod
    def folded(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The rows (l, d) that a module of these parameters gives, by their names in it."""

    def attach(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Freeze the base and put the rows beside its blocks."""
        model.requires_grad_(False)
        embedding: Any = model.get_submodule(anatomy.embedding)
        stack = _stack(model, anatomy)
        arguments = list(inspect.signature(stack.forward).parameters)
        _check(model, stack)
        rows = self.rows(embedding.embedding_dim)
        rows.embedding_name = anatomy.embedding
        stack.add_module(NAME, rows)
        call = _Call(self.num_virtual_tokens, embedding, arguments)
        stack.register_forward_pre_hook(call.begin, with_kwargs=True)
        stack.register_forward_hook(call.end)
        return model

    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path, base: str) -> Mapping[str, Tensor]:
        """Write adapter_config.json and adapter_model.safetensors as PEFT reads them: prompt_embeddings (l, d)."""
        from peft import PromptTuningConfig

        rows = self.folded({name.rpartition(".")[2]: value for name, value in weights.items()})
        numbers = model.config.get_text_config()  # type: ignore[operator, union-attr]
        config: Any = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.num_virtual_tokens,
            token_dim=rows.shape[1],
            num_layers=numbers.num_hidden_layers,
            num_attention_heads=numbers.num_attention_heads,
            num_transformer_submodules=1,
        )
        return write_adapter(config, {EMBEDDINGS: rows}, folder, base)

    @property
    def starts_as_base(self) -> bool:
        """False: whatever the rows hold, every token attends to them too."""
        return False

    @property
    def positions(self) -> int:
        """Each token comes after the virtual ones."""
        return self.num_virtual_tokens


class Rows(nn.Module):
    """What makes the rows. embedding_name: of the base's embedding in the model."""

    embedding_name: str

    def rows(self) -> Tensor:
        """(l, d)."""
        raise NotImplementedError

    def forward(self, embedded: Tensor, starts: Starts) -> Tensor:
        """Embedded (B, T, d) with the rows at starts; they are used in here, where every strategy has them whole."""
        return _with(embedded, self.rows().to(embedded.dtype), starts)


class _Call:
    """Around each call of the module that runs the blocks. starts: of the call that is going on, None if it adds none.

    Two ways to be called: one row of examples end to end (segment_lengths), or rows that may be padded and a cache, in
    which the prompt is kept as any token; the model's caller does not count it.
    """

    def __init__(self, length: int, embedding: nn.Module, arguments: Sequence[str]) -> None:
        self.length, self.embedding, self.arguments = length, embedding, arguments
        self.starts: Starts | None = None

    def begin(self, stack: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before it: embedded tokens in place of tokens, the prompt among them; all that counts tokens, changed."""
        call = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        embedded = call.get("inputs_embeds")
        if embedded is None:
            embedded = self.embedding(call["input_ids"])
        lengths, cache, mask = (call.get(key) for key in ("segment_lengths", "past_key_values", "attention_mask"))
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise RuntimeError("a soft prompt needs a mask of tokens (B, T): generate with a dynamic cache")
        begun = cache is not None and cache.get_seq_length() > 0  # the prompt is in it
        starts = _starts(embedded, lengths, mask)
        if lengths is not None:
            call["segment_lengths"] = tuple(length + self.length for length in lengths)
        if mask is not None:
            call["attention_mask"] = _with(mask, mask.new_ones(self.length), starts)
        positions = call.get("position_ids")
        if positions is not None:
            call["position_ids"] = self._moved(positions, embedded, None if begun else starts)
        rows = stack.get_submodule(NAME)
        call["input_ids"], call["inputs_embeds"] = None, embedded if begun else rows(embedded, starts)
        self.starts = None if begun else starts
        return (), call

    def _moved(self, positions: Tensor, embedded: Tensor, starts: Starts | None) -> Tensor:
        """Positions (B or 1, T) of tokens that come after a prompt, and of the prompt's own where it goes in."""
        if positions.ndim != 2:
            raise RuntimeError(f"a soft prompt needs positions of one axis (B, T), got {tuple(positions.shape)}")
        moved = positions + self.length
        if starts is None:
            return moved
        first = torch.arange(self.length, device=positions.device, dtype=positions.dtype)
        return _with(moved.expand(len(starts), -1), first, starts)

    def end(self, stack: nn.Module, args: Any, output: Any) -> Any:
        """After it: the final states of the caller's own tokens."""
        starts, self.starts = self.starts, None
        if starts is not None:
            output.last_hidden_state = _without(output.last_hidden_state, self.length, starts)
        return output


def _starts(embedded: Tensor, lengths: Sequence[int] | None, mask: Tensor | None) -> Starts:
    """The first token of each example: of each segment, or of each row behind its padding."""
    if lengths is not None:
        return [list(accumulate(lengths[:-1], initial=0))]
    if mask is None:
        return [[0]] * embedded.shape[0]
    return [[int(start)] for start in (mask.cumsum(1) == 0).sum(1).tolist()]


def _with(rows: Tensor, more: Tensor, starts: Starts) -> Tensor:
    """Rows (B, T, ...) with more (l, ...) before the entries of starts."""
    parts = iter(rows.flatten(0, 1).split(_sizes(starts, rows.shape[1])))
    pieces = []
    for places in starts:
        pieces.append(next(parts))
        for _ in places:
            pieces += [more, next(parts)]
    return torch.cat(pieces).view(len(starts), -1, *rows.shape[2:])


def _without(rows: Tensor, length: int, starts: Starts) -> Tensor:
    """What _with was given, of what it gave for more of that length."""
    sizes = _sizes(starts, rows.shape[1] - length * len(starts[0]), length)
    parts = iter(rows.flatten(0, 1).split(sizes))
    pieces = []
    for places in starts:
        pieces.append(next(parts))
        pieces += [next(parts)[length:] for _ in places]
    return torch.cat(pieces).view(len(starts), -1, *rows.shape[2:])


def _sizes(starts: Starts, count: int, more: int = 0) -> list[int]:
    """Of the part before the first start of each row of count entries, and of those that begin at a start."""
    return [
        size
        for places in starts
        for size in (places[0], *(last - first + more for first, last in pairwise((*places, count))))
    ]


def _stack(model: nn.Module, anatomy: Anatomy) -> nn.Module:
    """The module that runs the blocks, or the next one around it that takes embedded tokens."""
    owner = anatomy.blocks[0].rsplit(".", 2)[0]
    while owner:
        stack = model.get_submodule(owner)
        if "inputs_embeds" in inspect.signature(stack.forward).parameters:
            return stack
        owner = owner.rpartition(".")[0]
    raise ValueError(
        f"model must take embedded tokens to hold a prompt, got {type(model).__name__}; take method=prefix"
    )


def _check(model: Any, stack: nn.Module) -> None:
    """Refuse a model that would not see the rows as tokens of its own."""
    kind, numbers = type(model).__name__, model.config.get_text_config()
    if getattr(numbers, "hidden_size_per_layer_input", None):
        raise ValueError(
            f"model must embed tokens once to hold a prompt, got {kind}, whose layers have an embedding each; take "
            "method=prefix"
        )
