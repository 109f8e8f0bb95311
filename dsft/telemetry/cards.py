"""Reads the GPUs that this process may use from nvidia-smi, which starts nothing on them, as asking torch could."""

import os
import re
import subprocess
from dataclasses import dataclass

LIMIT_S = 30.0
NOT_ALL = 0.95
"""Share of the memory in a MIG device's name (3g.20gb) that the device has at least."""
MIG = re.compile(r"^\s+MIG \S*?(\d+)gb\S*\s+Device\s+\d+: \(UUID: (MIG-\S+)\)", re.MULTILINE)
GPU = re.compile(r"^GPU \d+: .*\(UUID: (GPU-\S+)\)", re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """One GPU, or one of the MIG devices that it is divided into. memory: bytes."""

    uuid: str
    memory: int


def device_memory_bytes() -> int | None:
    """Memory of the smallest GPU or MIG device that CUDA_VISIBLE_DEVICES leaves; None where nvidia-smi does not tell.

    Positions in that variable are nvidia-smi's only under CUDA_DEVICE_ORDER=PCI_BUS_ID; without it cards of several
    sizes cannot be told apart, and the smallest of all counts.
    """
    cards = _cards()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return min((divided[0].memory for divided in cards if divided), default=None)
    found: list[int] = []
    for entry in visible.split(","):
        mine = _called(entry.strip(), cards)
        if mine is None:  # CUDA sees nothing from the first entry on that names no device
            break
        found.append(mine)
    return min(found, default=None)


def _called(entry: str, cards: list[list[Card]]) -> int | None:
    """Memory of what one entry of CUDA_VISIBLE_DEVICES names: a position, or the beginning of a UUID."""
    if entry.isdecimal():
        sizes = [divided[0].memory for divided in cards if divided]
        if int(entry) >= len(sizes):
            return None
        return sizes[int(entry)] if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" else min(sizes)
    whole = [card for divided in cards for card in divided if entry and card.uuid.startswith(entry)]
    return whole[0].memory if whole else None


def _cards() -> list[list[Card]]:
    """What each GPU gives: itself, or its MIG devices, of which CUDA takes the first unless another one is named."""
    memory = {}
    for line in _said("--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits").splitlines():
        uuid, _, size = line.partition(",")
        if size.strip().isdecimal():
            memory[uuid.strip()] = int(size) * 2**20
    if not memory:
        return []
    listed = _said("-L")
    starts = [(found.start(), found[1]) for found in GPU.finditer(listed)]
    cards = []
    for index, (start, uuid) in enumerate(starts):
        end = starts[index + 1][0] if index + 1 < len(starts) else len(listed)
        parts = [Card(part[2], round(NOT_ALL * int(part[1]) * 2**30)) for part in MIG.finditer(listed[start:end])]
        cards.append(parts or [Card(uuid, memory[uuid])] if uuid in memory else parts)
    return cards or [[Card(uuid, size)] for uuid, size in memory.items()]


def _said(*words: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
