"""A small copy of a model's configuration: each kind of block that the model has, a few in all, in small widths.

Nothing here knows a family. What a number means is told by its name, as the configurations of transformers use names:
head counts are divided by one power of two, widths of a head by another, other widths by both, so that products that
must agree (hidden size = heads x width of a head) still do. Windows, chunks and original rope lengths become SPAN
tokens, so that a row of a few dozen tokens lies beyond them.
"""

import copy
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dsft.models.anatomy import dissect

VOCABULARY, SPAN, ROPE, POSITIONS, EXPERTS = 128, 8, 16, 2048, 8
LARGEST = 300_000_000
"""Parameters of a copy whose widths could not be made smaller: about 1 GiB, and seconds."""

HEADS = re.compile(r"(^|_)heads?$|^num_query_groups$|heads_per_layer$")
HEAD_WIDTH = re.compile(
    r"head_?(dim|size)$|^dim_head$|d_head$|^kv_channels$|headdim$|^d_kv$|^rotary_dim$|^(qk|v)_.*dim$"
)
WIDTH = re.compile(
    r"(_size|_dim|_rank|_width|_channels|_lowrank)$|hidden_size|intermediate_size|ffn_dim$"
    r"|^(n_embd|n_inner|d_model|d_ff|dff|dim_ff|d_inner|emb_dim|embed_dim|embedding_dim|mamba_d_ssm)$"
)
OTHER = re.compile(
    r"kernel|conv|patch|image|spatial|temporal|token|ngram|multiple|pattern|position|group_size|byte|type_"
)
SPANS = re.compile(r"(?<!max_)window(?!_layers)|chunk|^local_attention$|floor|block_size$|^index_topk$")
STATES = re.compile(r"d_state$|state_size$")
EXPERT_COUNTS = re.compile(r"^(moe_)?(num|n)_(routed_|local_)?experts$|^zero_expert_num$")
CHOSEN = re.compile(r"experts?_per_tok(en)?$|^moe_topk$|^moe_k$|^top_k$")
GROUPS = ("n_group", "num_expert_group")
REACH = re.compile(r"^(max_(position_embeddings|seq_len|target_positions)|n_positions|n_ctx|model_max_length)$")
TOKENS = re.compile(r"token_(id|index)$|^(mask|unk)_index$")
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "num_blocks")
STACKS = ("num_layers_per_stack",)
"""Depths of a part of the model: made smaller as the whole is."""
OF_LAYERS = re.compile(r"layers|idx|_ids$|indices|indexes")
AFTER_FIRST = re.compile(r"(?<=\.)[1-9]\d*(?=\.|$)")
"""Numbers of the modules of a list, but for the first."""
RANDOM = re.compile(r"drop(out|$|_?prob|_?rate)|pdrop|layerdrop|jitter|noise", re.IGNORECASE)
"""Settings that draw random numbers in training."""


class NoCopyError(Exception):
    """No small copy of a configuration can be built; the cause is what the first attempt raised."""


def small_copies(config: Any, build: Any, *, vocabulary: int = VOCABULARY) -> Iterator[Any]:
    """Configurations that are small copies of config, the smallest first; each has every kind of block of the model.

    vocabulary: tokens of a copy, at most. build(config) gives the model of a configuration on meta; what it raises says
    that the next one is to be tried. Raises NoCopyError if there is none.
    """
    failed, found = None, False
    for by in _scales(config):
        try:
            depth = config.get_text_config().num_hidden_layers
            kinds = _kinds(build(_resized(config, *by, depth, vocabulary)))
        except Exception as error:  # whatever a class raises over sizes that do not fit together: others are tried
            failed = failed or error
            continue
        for layers in [n for n in (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32) if n < depth] + [depth]:
            copy_ = _copy_of(config, build, (*by, layers, vocabulary), kinds)
            if copy_ is not None:
                found = True
                yield copy_
                break
    if not found:
        raise NoCopyError(f"each copy has more than {LARGEST:,} parameters") from failed


def _scales(config: Any) -> Iterator[tuple[int, int]]:
    """What widths of heads and numbers of heads are divided by, the smallest copy first."""
    narrow, few = _factors(config.to_dict())
    half, quarter = max(1, narrow // 2), max(1, narrow // 4)
    yield from dict.fromkeys([(narrow, few), (half, few), (quarter, few), (narrow, 1), (1, 1)])


def _copy_of(config: Any, build: Any, sizes: tuple[int, int, int, int], kinds: set[Any]) -> Any | None:
    """The copy of these sizes, see _resized, if it has all kinds of blocks and is small."""
    try:
        found = _resized(config, *sizes)
        model = build(found)
        fits = _kinds(model) == kinds and sum(param.numel() for param in model.parameters()) <= LARGEST
    except Exception:  # as above
        return None
    return found if fits else None


def _kinds(model: nn.Module) -> set[Any]:
    """What tells the blocks of a model apart: classes of their modules, and settings that are words or flags.

    Of the modules of a list the first and another are told apart, no more: a list may have one for each layer.
    """
    found = set()
    for name in dissect(model).blocks:
        parts = model.get_submodule(name).named_modules()
        told = ((AFTER_FIRST.sub("1", inner), type(module).__name__, _settings(module)) for inner, module in parts)
        found.add(tuple(dict.fromkeys(told)))
    return found


def _settings(module: nn.Module) -> tuple[Any, ...]:
    plain = {key: value for key, value in vars(module).items() if not key.startswith("_") and "idx" not in key}
    told = {key: value if isinstance(value, bool | str) else type(value).__name__ for key, value in plain.items()}
    return tuple(sorted((key, str(value)) for key, value in told.items()))


def still(config: Any) -> None:
    """Set what draws random numbers in training to 0, in place."""
    for holder in _holders(config):
        for key, value in list(vars(holder).items()):
            if RANDOM.search(key) and isinstance(value, float | int) and not isinstance(value, bool):
                setattr(holder, key, type(value)(0))


def _holders(config: Any) -> Iterator[Any]:
    """Config and the configurations inside of it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "get_text_config"):
            yield from _holders(value)


def _factors(values: dict[str, Any]) -> tuple[int, int]:
    """What the width of a head and what the number of heads can be divided by."""
    found = [(key, value) for _, key, value in _entries(values) if _whole(value) and value > 1]
    heads = [value for key, value in found if HEADS.search(key)]
    widths = [value for key, value in found if HEAD_WIDTH.search(key)]
    hidden = next((values[key] for key in ("hidden_size", "n_embd", "d_model") if _whole(values.get(key))), 0)
    main = next((v for k in ("num_attention_heads", "n_head", "n_heads", "num_heads") if _whole(v := values.get(k))), 0)
    if not heads:
        return 1, max(1, hidden // 64)
    if main and hidden % main == 0:
        widths.append(hidden // main)
    few = narrow = 1
    while few < 8 and all(value % (2 * few) == 0 for value in heads):
        few *= 2
    while narrow < 16 and widths and all(value % (4 * narrow) == 0 and value // (2 * narrow) >= 8 for value in widths):
        narrow *= 2
    return narrow, few


def _resized(config: Any, narrow: int, few: int, layers: int, vocabulary: int) -> Any:
    values = copy.deepcopy(config.to_dict())
    depth = config.get_text_config().num_hidden_layers
    groups = max([v for _, k, v in _entries(values) if k in GROUPS and _whole(v)], default=1)
    experts = max(EXPERTS, 2 * groups)
    each = _layers_of_a_block(values, depth)
    for holder, key, value in _entries(values):
        if _whole(value):
            holder[key] = _number(key, value, narrow, few, (experts, vocabulary))
            if key in DEPTH and value == depth // each:
                holder[key] = max(1, layers // each)
            elif key in (*STACKS, "num_kv_shared_layers") and value:
                holder[key] = max(1, value * layers // depth)
        elif isinstance(value, list) and value:
            holder[key] = _numbers(key, value, (narrow, few, vocabulary), depth, layers)
        elif isinstance(value, dict) and value and all(_index(inner) is not None for inner in value):
            holder[key] = {inner: each for inner, each in value.items() if (_index(inner) or 0) < layers}
    for key in ("torch_dtype", "dtype"):
        values.pop(key, None)
    return type(config).from_dict(values)


def _layers_of_a_block(values: dict[str, Any], depth: int) -> int:
    """How many of the model's layers one entry of its depth stands for: 2 where a block has two attentions, say."""
    depths = [value for key, value in values.items() if key in DEPTH and _whole(value) and value > 0]
    return 1 if depth in depths else min((depth // value for value in depths if depth % value == 0), default=1)


def _entries(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """(holder, key, value) of all that is inside, and of what is kept by the number of a layer also each layer's."""
    for key, value in list(values.items()):
        if not isinstance(key, str):
            continue
        by_layer = isinstance(value, dict) and bool(value) and all(_index(inner) is not None for inner in value)
        if by_layer or not isinstance(value, dict):
            yield values, key, value
        for inside in [value] if not by_layer else value.values():
            if isinstance(inside, dict):
                yield from _entries(inside)


def _number(key: str, value: int, narrow: int, few: int, most_of: tuple[int, int]) -> int:
    for pattern, most in _caps(*most_of):
        if pattern.search(key):
            return min(value, most)
    if HEADS.search(key):
        return value // few if value % few == 0 else value
    if HEAD_WIDTH.search(key):
        return value // narrow if value % narrow == 0 else value
    return _narrowed(value, narrow * few) if WIDTH.search(key) else value


def _caps(experts: int, vocabulary: int) -> Iterator[tuple[re.Pattern[str], int]]:
    """Name -> the most that a number of that name may be, the first that fits; experts: of a layer."""
    yield TOKENS, vocabulary - 1
    yield re.compile("vocab_size"), vocabulary
    yield re.compile("^vocab_offset$"), 0
    yield EXPERT_COUNTS, experts
    yield CHOSEN, 2 if experts == EXPERTS else 4
    yield re.compile("^original_max_position_embeddings$"), ROPE
    yield REACH, POSITIONS
    yield SPANS, SPAN
    yield OTHER, sys.maxsize
    yield STATES, 16


def _narrowed(value: int, by: int) -> int:
    """Value / by, in whole multiples of 16 where it does not divide: kernels ask for rows of 16 bytes."""
    return value // by if value % (4 * by) == 0 else min(value, max(16, 16 * -(-value // (16 * by))))


def _numbers(key: str, values: list[Any], by: tuple[int, int, int], depth: int, layers: int) -> list[Any]:
    """A list that is one entry per layer, the numbers of some layers, or sizes. by: narrow, few, vocabulary."""
    narrow, few, vocabulary = by
    if key in ("short_factor", "long_factor"):
        return values[::narrow]
    whole = all(map(_whole, values))
    if len(values) == depth:
        values = values[:layers]
    elif whole and OF_LAYERS.search(key):
        return [value for value in values if value < layers]
    if whole and (WIDTH.search(key) or HEADS.search(key) or key.endswith("token_id")):
        return [_number(key, value, narrow, few, (EXPERTS, vocabulary)) for value in values]
    return values


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _index(key: Any) -> int | None:
    """The number of a layer, where a key is one."""
    return key if _whole(key) else int(key) if isinstance(key, str) and key.isdigit() else None


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> None:
    """Random values under which a block matters and a state lasts: what sets the decay of a state stays as it was made.

    Linears of variance 1 / inputs, embeddings of variance 1, norms near 1, biases near 0, persistent buffers spread. A
    buffer's zeros among other values stay: they may be a mask.
    """
    draw = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if re.search(r"(A_log|dt_bias|\.D|dt_proj\.bias|time_decay|decay.*)$", name):
            continue
        value = torch.randn(param.shape, generator=draw)
        if param.ndim < 2:
            param.copy_(float(param.float().mean() > 0.5) + 0.1 * value)
        elif "embed" in name or "wte" in name:
            param.copy_(value)
        else:
            param.copy_(value * param.shape[-1] ** -0.5)
    persistent = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in persistent and buffer.is_floating_point():
            spread = 0.3 * torch.randn(buffer.shape, generator=draw).to(buffer)
            buffer.add_(spread.where(buffer != 0, 0) if buffer.any() else spread)
