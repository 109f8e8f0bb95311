"""Who computes what: a step's examples over the ranks, a rank's examples over micro-batches, by token count."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one forward pass, as indices into the step's lengths; silent = none of their tokens carries loss."""

    examples: tuple[int, ...]
    silent: bool


def split(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices into lengths for each rank, balanced by token count, each rank's in rising order and none empty.

    Longest first to the rank with the fewest tokens, the lowest rank among equals. Raises ValueError if there are
    fewer examples than ranks.
    """
    if len(lengths) < ranks:
        raise ValueError(
            f"train.global_batch_size must be at least the number of data ranks ({ranks}), got {len(lengths)}; "
            "raise it or use fewer ranks"
        )
    parts: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for index in _longest_first(lengths):
        load, rank = heapq.heappop(loads)
        parts[rank].append(index)
        heapq.heappush(loads, (load + lengths[index], rank))
    return [sorted(part) for part in parts]


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices into lengths, in micro-batches of at most budget tokens; an example longer than that is alone.

    First fit, longest first; indices rise within a micro-batch, and micro-batches are in the order of their first.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []
    for index in _longest_first(lengths):
        place = next((i for i, room in enumerate(rooms) if lengths[index] <= room), None)
        if place is None:
            bins.append([index])
            rooms.append(budget - lengths[index])
        else:
            bins[place].append(index)
            rooms[place] -= lengths[index]
    return sorted(sorted(part) for part in bins)


def plan_step(lengths: Sequence[int], ranks: int, budget: int) -> list[list[MicroBatch]]:
    """For each rank its micro-batches, equally many on every rank; each example is in exactly one that is not silent.

    A rank that needs fewer repeats its first example, silent, because strategies that gather weights need every rank
    in every forward pass. Raises ValueError if there are fewer examples than ranks.
    """
    plans: list[list[MicroBatch]] = []
    for part in split(lengths, ranks):
        packed = pack([lengths[index] for index in part], budget)
        plans.append([MicroBatch(tuple(part[i] for i in micro), silent=False) for micro in packed])
    longest = max(map(len, plans))
    for plan in plans:
        plan += [MicroBatch(plan[0].examples[:1], silent=True)] * (longest - len(plan))
    return plans


def _longest_first(lengths: Sequence[int]) -> list[int]:
    assert all(length > 0 for length in lengths)
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
