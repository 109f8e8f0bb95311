"""What every rank says before the run begins, compared; and how fast the ranks, and the nodes, sum."""

import hashlib
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dsft_launchers
import torch
import torch.distributed as dist
from dsft_launchers.verdict import CannotBeginError

import dsft
from dsft.comm.meeting import within
from dsft.comm.world import World

MIB = {"cpu": 16, "cuda": 64}
"""What is summed: as much as the gradients of some million parameters."""
REPEATS = 2
"""The best of these counts, after one that opens the connections."""
CLOCK_S = 3.0
"""A clock that is further off is told of."""
SLOW = 3.0
"""Medians of the nodes that a node may take."""

Nodes = Mapping[str, Mapping[str, float]]


def greet(world: World, versions: Mapping[str, str], host: str) -> dict[str, Any]:
    """What stands in the event `start` of this run: the ranks, and if there are several what they found. Collective.

    versions: of the packages that must be the same everywhere. Raises CannotBeginError on every rank if one has other
    code or versions than rank 0.
    """
    mine: dict[str, Any] = {"rank": world.rank, "pid": os.getpid(), "host": host}
    if world.size == 1:
        return {"ranks": [mine]}
    same = {"code": code_digest(), "python": platform.python_version(), "dsft": dsft.__version__, **versions}
    cuda = world.device.type == "cuda"
    mine["device"] = torch.cuda.get_device_name(world.device) if cuda else "cpu"
    with within("greeting"):
        world.barrier()
        said = world.gather((mine, same, time.time()))
        ranks = [{**who, "clock_s": round(clock - said[0][2], 3)} for who, _, clock in said]
        require_same([each for _, each, _ in said], ranks)
        hosts = [rank["host"] for rank in ranks]
        return {"ranks": ranks, "versions": same, "all_reduce": _measure(world, hosts)}


def require_same(values: Sequence[Mapping[str, str]], ranks: Sequence[Mapping[str, Any]]) -> None:
    """Raise CannotBeginError, one line, for each name that a rank has another value of than rank 0, which has all."""
    names = [f"rank {rank['rank']} on {rank['host']}" for rank in ranks]
    found = []
    for name, first in values[0].items():
        others = [rank for rank, mine in enumerate(values) if mine.get(name, first) != first]
        if others:
            more = f" (and {len(others) - 1} more)" if others[1:] else ""
            theirs = _short(values[others[0]][name])
            found.append(f"{names[others[0]]}{more} has {name} {theirs}, {names[0]} has {_short(first)}")
    if found:
        raise CannotBeginError(f"{'; '.join(found)}; all must be alike: bring the nodes in line, then start again")


def _short(value: str) -> str:
    return value if len(value) < hashlib.sha256().digest_size else value[:12]


def code_digest() -> str:
    """SHA-256 of the sources of dsft and its launchers, as this process imported them."""
    digest = hashlib.sha256()
    for package in (dsft, dsft_launchers):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def odd(hello: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, object]]]:
    """Events for what a person should see: clocks that are off, once per host, and nodes that are slow."""
    clocks = {rank["host"]: rank for rank in hello["ranks"] if abs(rank.get("clock_s", 0.0)) > CLOCK_S}
    for host, rank in clocks.items():
        yield "clock", {"host": host, "seconds": rank["clock_s"]}
    nodes: Nodes = hello.get("all_reduce", {}).get("nodes", {})
    for what in ("inside_s", "across_s"):
        seconds = {host: each[what] for host, each in nodes.items() if what in each}
        usual = statistics.median_low(seconds.values()) if seconds else 0.0
        for host, its in seconds.items():
            if its > SLOW * usual:
                yield "slow_node", {"host": host, "what": what.removesuffix("_s"), "seconds": its, "median": usual}


def _measure(world: World, hosts: Sequence[str]) -> dict[str, Any]:
    """Seconds of an all-reduce over all ranks; of several nodes also within each, and with either neighbour.

    A slow node makes its neighbours' sum with it slow, not theirs with their other one: the lesser counts.
    """
    mine = {name: _seconds(world, groups) for name, groups in _rounds(hosts).items()}
    said = world.gather({name: seconds for name, seconds in mine.items() if seconds is not None})
    mib = MIB[world.device.type]
    whole = max(each["all"] for each in said)
    found = {"mib": mib, "seconds": round(whole, 6), "gb_per_s": round(mib * 2**20 / whole / 1e9, 3)}
    if len(set(hosts)) == 1:
        return found
    nodes = {host: _of_node([each for each, its in zip(said, hosts, strict=True) if its == host]) for host in hosts}
    return {**found, "nodes": nodes}


def _of_node(said: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """inside_s: within the node, absent if it has one rank; across_s: with the better of its neighbours."""
    slowest = {name: round(max(each[name] for each in said), 6) for name in said[0]}
    inside = {"inside_s": slowest["inside"]} if "inside" in slowest else {}
    return {**inside, "across_s": min(seconds for name, seconds in slowest.items() if name.startswith("pair"))}


def _rounds(hosts: Sequence[str]) -> dict[str, list[list[int]]]:
    """Groups of ranks that sum at the same time, by round: all; each node; pairs of nodes, on a ring."""
    rounds = {"all": [list(range(len(hosts)))]}
    nodes = [[rank for rank, its in enumerate(hosts) if its == host] for host in dict.fromkeys(hosts)]
    if len(nodes) > 1:
        rounds["inside"] = nodes
    count = len(nodes) if len(nodes) > 2 else len(nodes) - 1
    for index in range(count):
        last = count % 2 and index == count - 1
        pair = sorted(nodes[index] + nodes[(index + 1) % len(nodes)])
        rounds.setdefault(f"pair {2 if last else index % 2}", []).append(pair)
    return rounds


def _seconds(world: World, groups: Sequence[Sequence[int]]) -> float | None:
    """Of one all-reduce in this rank's group; None if it has none, or is alone in it. Collective over all ranks."""
    ranks = next((list(group) for group in groups if world.rank in group), [])
    world.barrier()
    if len(ranks) < 2:
        return None
    group, backend = None, "nccl" if world.device.type == "cuda" else "gloo"
    if len(ranks) < world.size:
        group = dist.new_group(ranks, backend=backend, use_local_synchronization=True)
    value = torch.zeros(MIB[world.device.type] * 2**18, device=world.device)
    seconds = []
    for _ in range(1 + REPEATS):
        begun = time.perf_counter()
        dist.all_reduce(value, group=group)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds.append(time.perf_counter() - begun)
    if group is not None:
        dist.destroy_process_group(group)
    return min(seconds[1:])
