"""What a start made of a damaged run folder, against what it must."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.damages import Damage

Tree = dict[str, tuple[Any, ...]]
"""Path in a folder -> what is there."""

OURS = re.compile(r"checkpoints/(lease-\d+|crashes)$|quarantine/[^/]+reason\.json$|quarantine/.+/reason\.json$")
"""What a start itself leaves: its lease, a folder of marks, why a checkpoint was set aside."""


@dataclass(frozen=True)
class Seen:
    """Of one start. said: of each rank, what resuming raised there, "" if nothing; digests: of each rank's state
    afterwards; events: what rank 0 was told; before, after: the folder; fired: how often plants happened.
    """

    step: int
    said: Sequence[str]
    digests: Sequence[str]
    events: Sequence[tuple[str, int, Mapping[str, Any]]]
    before: Tree
    after: Tree
    fired: int


def tree(run: Path) -> Tree:
    """All that is in a folder, links as links; without what a start itself leaves."""
    found: Tree = {}
    for place, folders, names in os.walk(run):
        for name in [*folders, *names]:
            path = Path(place) / name
            key = path.relative_to(run).as_posix()
            if OURS.search(key):
                continue
            if path.is_symlink():
                found[key] = ("link", os.readlink(path))
            elif path.is_dir():
                found[key] = ("folder",)
            else:
                found[key] = ("file", hashlib.sha256(path.read_bytes()).hexdigest())
    return found


def wrong(damage: Damage, seen: Seen, wanted: Sequence[str]) -> list[str]:
    """What is not as it must be; nothing if all is. wanted: each rank's digest after an undamaged load of that step, or
    before the start if nothing may be loaded.
    """
    outcome = list(_outcome(damage, seen))
    return [*outcome, *([] if outcome else _state(seen, wanted)), *_named(damage, seen), *_moved(damage, seen)][:3]


def _outcome(damage: Damage, seen: Seen) -> Iterator[str]:
    if damage.plants and not seen.fired:
        yield "the plant did not happen"
    for rank, said in enumerate(seen.said):
        kind, _, message = said.partition(": ")
        if damage.step is None and said == "":
            yield f"rank {rank} loads step {seen.step}, should raise {damage.raised}"
            return
        if kind != damage.raised:
            yield f"rank {rank} raises {said[:300]}"
            return
        if not re.search(damage.says, message):
            yield f"rank {rank} says {said[:300]}"
            return
    if damage.step is not None and seen.step != damage.step:
        yield f"loads step {seen.step}, should load {damage.step}"


def _state(seen: Seen, wanted: Sequence[str]) -> Iterator[str]:
    off = [rank for rank, (digest, other) in enumerate(zip(seen.digests, wanted, strict=True)) if digest != other]
    if off:
        yield f"the state on rank {', '.join(map(str, off))} is another"


def _named(damage: Damage, seen: Seen) -> Iterator[str]:
    told = {step: str(details.get("file", "")) for event, step, details in seen.events if event == "quarantine"}
    must = {int(folder.removeprefix("step-")): file for folder, file in damage.aside.items()}
    if told.keys() != must.keys():
        yield f"sets aside steps {sorted(told)}, should set aside {sorted(must)}"
        return
    for step, file in must.items():
        if not re.fullmatch(file, told[step]):
            yield f"names {told[step]} of step {step}, should name {file}"


def _moved(damage: Damage, seen: Seen) -> Iterator[str]:
    """Whether what is set aside lies whole in quarantine/ and everything else where it was."""
    new = {key for key in seen.after if key.startswith("quarantine/") and key not in seen.before}
    lost = {key for key in seen.before if key not in seen.after}
    homes = {f"checkpoints/{folder}" for folder in damage.aside}
    if strays := sorted(key for key in lost if "/".join(key.split("/")[:2]) not in homes):
        yield f"{strays[0]} is gone"
    if stays := sorted(homes & seen.after.keys()):
        yield f"{stays[0]} is still there"
    aside = sorted(seen.after[key] for key in new if seen.after[key][0] == "file")
    if aside != sorted(seen.before[key] for key in lost if seen.before[key][0] == "file"):
        yield "what lies in quarantine is not what was set aside"
    for folder in damage.aside:
        if not any(key.split("/")[1].startswith(folder) for key in new):
            yield f"quarantine/{folder} is not there"
    if changed := sorted(key for key in lost ^ seen.before.keys() if seen.after[key] != seen.before[key]):
        yield f"{changed[0]} was changed"
    if more := sorted(key for key in seen.after.keys() - seen.before.keys() - new if key != "quarantine"):
        yield f"{more[0]} was not there before"
