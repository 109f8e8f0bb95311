"""Where the time of profiled steps went: torch.profiler's events, each second given to one part.

Marks (record_function) say whose operations are inside. A backward operation belongs to the mark of the forward
operation that made its node, found by thread and sequence number; outside of marks the operation's name decides.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import record_function


class Part(StrEnum):
    """A row of the table; the seconds of all rows are the profiled time."""

    GEMM = "GEMM of the base"
    ATTENTION = "attention"
    HEAD = "head + loss"
    ADAPTER = "adapter"
    UNPACKING = "unpacking"
    COPIES = "casts and copies"
    ELEMENTWISE = "elementwise and norms"
    COMMUNICATION = "communication"
    DATA = "data"
    OPTIMIZER = "optimizer"
    OTHER = "other"
    IDLE = "no operation"


OURS = "dsft: "
STEP = f"{OURS}step"

MATMULS = set("mm addmm bmm baddbmm matmul linear mkldnn_linear _grouped_mm _scaled_mm einsum".split())
COPIES = set("copy clone contiguous to _to_copy cat stack fill zero zeros zeros_like new_zeros ones_like empty".split())
COPIES |= set("empty_like empty_strided new_empty new_empty_strided resize split_with_sizes_copy _foreach_copy".split())
LOSSES = set("cross_entropy_loss nll_loss_nd nll_loss nll_loss_forward log_softmax _log_softmax logsumexp".split())
ELEMENTWISE = set("mul add sub rsub div neg pow rsqrt sqrt mean sum silu gelu sigmoid tanh exp relu cos sin".split())
ELEMENTWISE |= set("dropout native_dropout bernoulli layer_norm native_layer_norm rms_norm _fused_rms_norm".split())
ELEMENTWISE |= set("_softmax softmax where masked_fill clamp abs reciprocal addcmul square threshold".split())
WIRES = ("c10d::", "_c10d_functional::", "gloo:", "nccl:", "ncclDevKernel", "FSDP::", "fsdp::", "record_param_comms")
"""Beginnings of the names under which collectives, and FSDP2's work around them, show up."""

Links = Mapping[tuple[Any, int, float], int]
"""(type of device, number, beginning in microseconds) of an event -> number of the operation that started it."""


def mark(part: Part) -> record_function:
    """A context in which all operations are part's, except collectives and what has a mark of its own."""
    return record_function(f"{OURS}{part}")


def links_of(results: Any) -> Links:
    """The operation that each kernel and runtime call belongs to, from the raw events of a profile.

    results: profiler.profiler.kineto_results. torch 2.11's FunctionEvents do not carry the link.
    """
    origin = results.trace_start_ns()
    return {
        (event.device_type(), event.correlation_id(), (event.start_ns() - origin) / 1000): link
        for event in results.events()
        if (link := event.linked_correlation_id())
    }


def seconds_by_part(events: Sequence[Any], links: Links) -> dict[Part, float]:
    """Seconds per part inside the steps (marked STEP), from the FunctionEvents of one process and their links_of.

    With an accelerator: of its operations; where several run at once, one that computes counts before one that
    communicates. Else: of the thread that drives the steps, each operation without those inside it; other threads run
    beside it and count only where it waits for them.
    """
    found = attributed(events)
    on_device = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    seconds = dict.fromkeys(Part, 0.0)
    if on_device:
        # the runtime's own calls have a link, and numbers that mean something else
        parts = {event.id: part for event, part, _ in found if _key(event) not in links}
        spans = [(e.time_range.start, e.time_range.end, _device_part(e, parts, links)) for e in on_device]
        for event, _, _ in found:
            if event.name == STEP:
                shares = shared_out(event.time_range.start, event.time_range.end, spans)
                seconds = {part: seconds[part] + shares[part] for part in Part}
    else:
        for event, part, in_step in found:
            seconds[part] += event.self_cpu_time_total if in_step else 0
    return {part: seconds[part] / 1e6 for part in Part}


def attributed(events: Sequence[Any]) -> list[tuple[Any, Part, bool]]:
    """Every operation of a processor's threads with its part, and whether it lies in a step of its thread."""
    found: list[tuple[Any, Part, bool]] = []
    made: dict[tuple[int, int], Part | None] = {}
    roots = [e for e in events if e.device_type == DeviceType.CPU and not e.is_async and e.cpu_parent is None]
    roots.sort(key=lambda event: -event.time_range.start)
    waiting: list[tuple[Any, Part | None, bool]] = [(event, None, False) for event in roots]
    while waiting:  # in the order of time: a forward operation comes before its node
        event, owner, in_step = waiting.pop()
        owner, in_step = _owner(event, owner, made), in_step or event.name == STEP
        found.append((event, part_of(event.name, owner), in_step))
        waiting += [(child, owner, in_step) for child in reversed(event.cpu_children)]
    return found


def _owner(event: Any, owner: Part | None, made: dict[tuple[int, int], Part | None]) -> Part | None:
    """Whose mark holds inside of event, None for nobody's. made: (thread, number) of a node -> the mark it is from."""
    if event.name.startswith(WIRES):
        return Part.COMMUNICATION
    if event.name.startswith(OURS):
        return None if event.name == STEP else Part(event.name.removeprefix(OURS))
    if event.fwd_thread:  # only nodes of autograd have one
        return made.get((event.fwd_thread, event.sequence_nr), owner)
    if event.sequence_nr >= 0:  # several may carry a node's number: the last of them made it
        made[event.thread, event.sequence_nr] = owner
    return owner


def shared_out(start: float, end: float, spans: Iterable[tuple[float, float, Part]]) -> dict[Part, float]:
    """The time from start to end by the part that is at work: who computes before who communicates, else IDLE."""
    edges: list[tuple[float, Part, int]] = [(end, Part.IDLE, 0)]
    for first, last, part in spans:
        if first < end and last > start:
            edges += [(max(first, start), part, 1), (min(last, end), part, -1)]
    order = [*(part for part in Part if part != Part.COMMUNICATION), Part.COMMUNICATION]
    running: Counter[Part] = Counter()
    shares = dict.fromkeys(Part, 0.0)
    before = start
    for at, part, change in sorted(edges, key=lambda edge: edge[0]):
        working = next((part for part in order if running[part] > 0), Part.IDLE)
        shares[working] += at - before
        before = at
        running[part] += change
    return shares


def part_of(name: str, owner: Part | None) -> Part:
    """The part of one operation inside the mark of owner, or of the Python around operations."""
    if name.startswith(OURS) and owner not in (Part.COMMUNICATION, Part.DATA, Part.OPTIMIZER):
        return Part.IDLE
    stem = re.sub(r"(_backward(_data)?)?_?$", "", name.removeprefix("aten::"))
    if stem in COPIES and owner in (None, Part.GEMM, Part.ADAPTER):
        return Part.COPIES
    if stem in ELEMENTWISE and owner in (None, Part.GEMM):  # autograd adds gradients up inside of nodes
        return Part.ELEMENTWISE
    if owner is not None:
        return owner
    if "::" not in name or "autograd::" in name:  # nodes, and functions of them in Python
        return Part.IDLE
    return Part.GEMM if stem in MATMULS else Part.HEAD if stem in LOSSES else Part.OTHER


def _device_part(event: Any, parts: Mapping[int, Part], links: Links) -> Part:
    """Of the operation that started it."""
    if event.name.startswith(WIRES):
        return Part.COMMUNICATION
    return parts.get(links.get(_key(event), 0), Part.OTHER)


def _key(event: Any) -> tuple[Any, int, float]:
    return event.device_type, event.id, event.time_range.start
