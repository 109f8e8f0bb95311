"""What each attention of a model is called with, recorded before it has weights by a pass of its own code on meta.

Inside of the model's parts the pass knows shapes alone. Between them it holds zeros on CPU, so that masks are made of
real positions. It runs on a copy of the model, and a block may fail on meta behind its attention, as experts do.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dsft.models.anatomy import dissect
from dsft.models.mixed import Mixed, tensors
from dsft.models.reach import reach
from dsft.models.spans import SPAN, UNRECORDED, Span, UnheldError, check_extras, configured, read_off

NAME = "dsft_recorded"
TOKENS = 8
"""Length of the row that is recorded; of more than one token, so that no mask is left out as needless."""
REACH = 2**17
"""Positions of a model that does not say how many it knows."""
VIEWS = (
    "__getitem__", "to", "type", "type_as", "float", "half", "bfloat16", "bool", "expand", "expand_as", "view",
    "reshape", "unsqueeze", "squeeze", "contiguous", "clone", "detach", "cpu", "cuda",
)  # fmt: skip
"""What may be done to a mask without a change of what it says."""


def record_spans(model: Any) -> None:
    """Give each attention module of model (on meta) its Span, and model the reason why some are not recorded, if any.

    Raises UnheldError for a model whose attention cannot be computed per example of a packed row, ValueError for one
    that has no blocks or is no causal language model.
    """
    blocks = dissect(model).blocks
    config = model.config.get_text_config()
    recorder = _Recorder(config)
    try:
        twin = copy.deepcopy(model)
        twin.set_attn_implementation(NAME)
        recorder.wrap(twin, blocks)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), recorder.mixed:
            row = torch.arange(TOKENS)[None]
            twin.eval()(input_ids=row * 0, position_ids=row, segment_lengths=_Lengths(recorder), use_cache=False)
    except UnheldError:
        raise
    except Exception as error:  # whatever a model's own code can raise over tensors without values
        recorder.failed = _one_line(error)
    farthest = reach(config) or REACH
    known: dict[int, Span] = {}
    for name, masks in recorder.masks.items():
        spans = {_span(mask, farthest, type(model).__name__, known) for mask in masks.values()}
        if len(spans) > 1:
            kind = type(model).__name__
            raise UnheldError(f"model must mask each layer in one way, got {kind}, whose {name} is called with several")
        setattr(model.get_submodule(name), SPAN, spans.pop())
    reasons = [_unrecorded(model.get_submodule(name), config, index, recorder) for index, name in enumerate(blocks)]
    setattr(model, UNRECORDED, next(filter(None, reasons), ""))


def _span(mask: "_Mask | None", reach: int, kind: str, known: dict[int, Span]) -> Span:
    """The span of a mask, from known where its function was seen before; an attention without one is causal."""
    if mask is None:
        return Span()
    if mask.changed:
        raise UnheldError(f"model must mask by positions alone, got {kind}, which changes its masks in a layer")
    key = id(mask.function)
    if key not in known:
        known[key] = read_off(mask.function, reach, kind)
    return known[key]


def _unrecorded(block: nn.Module, config: Any, index: int, recorder: "_Recorder") -> str:
    """Why a block's attention could not be recorded, once its modules have what the configuration says; else ""."""
    attentions = [m for m in block.modules() if hasattr(m, "is_causal") or hasattr(m, "num_key_value_groups")]
    known = recorder.blocks.get(index)
    reached = known is not None and (known.masks or not known.missed)
    if not attentions or reached:
        return ""
    for module in attentions:
        setattr(module, SPAN, configured(config, index))
    return (known.missed if known else recorder.failed) or "its block was not called"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class _Lengths(tuple[int, ...]):
    """Segment lengths as a model hands them on to its attentions, which find the recorder in them."""

    recorder: "_Recorder"

    def __new__(cls, recorder: "_Recorder") -> "_Lengths":
        lengths = super().__new__(cls, (TOKENS,))
        lengths.recorder = recorder
        return lengths


class _Mask(Tensor):
    """A mask without values that knows its function, also after a view; changed: something else was done to it."""

    function: Any
    changed: bool

    @classmethod
    def of(cls, tensor: Tensor, function: Any, changed: bool) -> "_Mask":
        """Tensor as a mask."""
        mask = tensor.as_subclass(cls)
        mask.function, mask.changed = function, changed
        return mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hand the function on to what is made of a mask."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):
            return result
        source = next((part for part in tensors((args, kwargs)) if isinstance(part, cls)), None)
        if source is None:
            return result
        return cls.of(result, source.function, source.changed or func.__name__ not in VIEWS)


def described(
    *, q_length: int, kv_length: int, mask_function: Any, dtype: torch.dtype = torch.float32, **known: Any
) -> _Mask:
    """What transformers asks for a mask while a model is recorded: (1, 1, q_length, kv_length) on meta."""
    return _Mask.of(torch.empty(1, 1, q_length, kv_length, dtype=dtype, device="meta"), mask_function, changed=False)


def recorded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: Any = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """Note what module is called with; gives a tensor of the right shape (B, T, H, D)."""
    kind = type(module).__name__
    if not isinstance(segment_lengths, _Lengths):
        raise UnheldError(
            f"model must hand the arguments of its call on to its attention, got {kind}, which gets no segment_lengths"
        )
    check_extras(module, extras)
    if attention_mask is not None and not isinstance(attention_mask, _Mask):
        raise UnheldError(f"model must have its masks made by transformers, got {kind} with a mask of its own making")
    segment_lengths.recorder.note(module, attention_mask)
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


@dataclass
class _Run:
    """What a block did, the first of its kind. masks: attention's name, within the block or without -> its masks.

    prefix: of names within the block; missed: why it did not run to its end, "" if it did, with result.
    """

    prefix: str
    masks: dict[tuple[bool, str], dict[Any, "_Mask | None"]] = field(default_factory=dict)
    missed: str = ""
    result: Any = None


class _Recorder:
    """masks: attention's name -> the masks it was called with; blocks: number -> what it did.

    failed: why the whole pass did not end, "" if it did.
    """

    def __init__(self, config: Any) -> None:
        self.config, self.failed = config, ""
        self.masks: dict[str, dict[Any, _Mask | None]] = {}
        self.blocks: dict[int, _Run] = {}
        self.kinds: dict[Any, _Run] = {}
        self.now = _Run("")
        self.names: dict[int, str] = {}
        self.hidden: Tensor | None = None
        self.mixed = Mixed()

    def note(self, module: nn.Module, mask: _Mask | None) -> None:
        """Module is called with mask, within a block."""
        name = self.names[id(module)]
        within = name.startswith(self.now.prefix)
        called = self.now.masks.setdefault((within, name.removeprefix(self.now.prefix)), {})
        called[None if mask is None else (id(mask.function), mask.changed)] = mask

    def wrap(self, model: nn.Module, blocks: tuple[str, ...]) -> None:
        """Let model's parts run on meta, and what is between them on CPU."""
        self.names = {id(module): name for name, module in model.named_modules()}
        stack = blocks[0].rpartition(".")[0]
        way = {stack[:end] for end, letter in enumerate(stack) if letter == "."} | {"", stack}
        for name, module in list(model.named_modules()):
            if name in blocks:
                kind = _kind(module, self.config, blocks.index(name), len(blocks))
                module.forward = self._block(module.forward, name, blocks.index(name), kind)  # type: ignore[method-assign]
            elif name not in way and name.rpartition(".")[0] in way - {stack}:
                module.forward = self._part(module.forward)  # type: ignore[method-assign]

    def _part(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.mixed.inside(forward, args, kwargs)

    def _block(self, forward: Callable[..., Any], name: str, index: int, kind: Any) -> Callable[..., Any]:
        def ran(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else kwargs["hidden_states"]
            self.hidden = first if self.hidden is None else self.hidden  # a block that failed gave no tuple to unpack
            if args:
                args = (self.hidden, *args[1:])
            else:
                kwargs["hidden_states"] = self.hidden
            masks = [(id(m.function), m.changed) for m in tensors((args, kwargs)) if isinstance(m, _Mask)]
            key = (*masks, kind)
            if key not in self.kinds:
                self.now = self.kinds[key] = _Run(f"{name}.")
                self._run(forward, args, kwargs)
            self.blocks[index] = known = self.kinds[key]
            for (within, attention), called in known.masks.items():
                self.masks.setdefault(f"{name}.{attention}" if within else attention, {}).update(called)
            return self.hidden if known.missed else known.result

        return ran

    def _run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        try:
            self.now.result = self.mixed.inside(forward, args, kwargs)
        except UnheldError:
            raise
        except Exception as error:  # behind its attention a block may fail; if it did before, the model says so
            self.now.missed = _one_line(error)


def _kind(block: nn.Module, config: Any, index: int, count: int) -> tuple[Any, ...]:
    """What blocks that do the same have in common: modules and their settings, and what the configuration lists.

    A block's own number is left out. Blocks of one kind that are handed the same masks run once.
    """
    parts: list[Any] = []
    for name, module in block.named_modules():
        settings = ((key, value) for key, value in vars(module).items() if isinstance(value, (bool, int, float, str)))
        parts.append((name, type(module), *(pair for pair in settings if pair[1] is True or pair[1] != index)))
    lists = [value for value in vars(config).values() if isinstance(value, (list, tuple)) and len(value) == count]
    return (*parts, *(str(value[index]) for value in lists))
