"""The checks in the order of their worth: what is cut when the budget is short is cut from the end."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.gpu.runner import Check

PLANTED_S = 1.0
"""Limit of a check that a fault is planted in: it does nothing but hang or die."""
CPU_LIMIT_S = 300.0
"""Limit of a check of the rehearsal: a machine that is busy with other tests does not reach it."""


@dataclass(frozen=True)
class Listed:
    """gpu: seconds that it takes about, and its limit; cpu: what it takes there; needs_gib: free memory of the card."""

    title: str
    place: str
    gpu: tuple[float, float]
    cpu: float
    needs_gib: float = 4.0


HERE = "benchmarks.gpu."
CHECKS: dict[str, Listed] = {
    "0": Listed("versions and the two ceilings", f"{HERE}ceilings:ceilings", (12, 40), 3),
    "A2": Listed("packed bases: bytes, decoding, self-test", f"{HERE}packing:packing", (12, 40), 6),
    "A4": Listed("strategies on one rank, and a profiled run", f"{HERE}strategies:strategies", (60, 110), 25),
    "B": Listed("two ranks on one device", f"{HERE}two_ranks:two_ranks", (40, 90), 25),
    "A1": Listed("every method against the CPU's numbers", f"{HERE}methods:methods", (30, 80), 20),
    "A3": Listed("attention against fp64, kernels, host syncs", f"{HERE}attending:attending", (15, 45), 5),
    "A5": Listed("the same step twice, resume, background save", f"{HERE}again:again", (15, 45), 10),
    "E": Listed("exits of ranks that spin, die or stop", f"{HERE}exits:exits", (35, 75), 15),
    "C1": Listed("speed of LoRA on an 8B shape", f"{HERE}speed:lora", (45, 80), 5, 60.0),
    "C2": Listed("speed of QLoRA, and one step of a 70B shape", f"{HERE}speed:qlora", (50, 100), 5, 50.0),
    "C4": Listed("parts by themselves: optimizer, head, norms, copies", f"{HERE}parts:parts", (20, 45), 5, 20.0),
    "C3": Listed("speed of LoRA, blocks compiled", f"{HERE}speed:compiled", (60, 100), 25, 60.0),
    "D": Listed("transformers + PEFT, padded, beside it", f"{HERE}peers:peers", (35, 70), 6, 60.0),
}


def place(name: str) -> str:
    """MODULE:FUNCTION of a check."""
    return CHECKS[name].place


def wanted(
    names: Sequence[str], *, cpu: bool, free_gib: float = 0.0, plants: Mapping[str, str] | None = None
) -> list[Check]:
    """These checks in the list's order, each followed by itself with the faults that plants has for it (hang,die)."""
    found = []
    for name, listed in CHECKS.items():
        if name in names:
            found.append(_check(name, listed, cpu, free_gib))
        faults = (plants or {}).get(name, "").split(",") if plants else []
        found += [_planted(name, fault) for fault in faults if fault]
    return found


def _check(name: str, listed: Listed, cpu: bool, free_gib: float) -> Check:
    takes, limit = (listed.cpu, CPU_LIMIT_S) if cpu else listed.gpu
    short = "" if cpu or free_gib >= listed.needs_gib else (
        f"memory: {free_gib:.0f} GiB of the card are free, it needs {listed.needs_gib:g}"
    )  # fmt: skip
    return Check(name, listed.title, _command(name, cpu), takes, limit, short)


def _planted(name: str, fault: str) -> Check:
    command = (*_command(name, True), "--plant", fault)
    return Check(f"{name} {fault}", f"planted: {fault}", command, PLANTED_S, PLANTED_S)


def _command(name: str, cpu: bool) -> tuple[str, ...]:
    return (sys.executable, "-m", "benchmarks.gpu.check", name, *(["--cpu"] if cpu else []))
