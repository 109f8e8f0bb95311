"""Damages of a run folder with checkpoints of steps 1, 3 and 6, and what a start must make of each."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.plants import Plant

STEPS = (1, 3, 6)
FIRST, SECOND, NEWEST = (f"step-{step:08d}" for step in STEPS)
MANIFEST = "manifest.json"

UNREADABLE = "args and getattr(args[0], 'name', '') == '{name}' and '" + NEWEST + "' in str(args[0])"


@dataclass(frozen=True)
class Damage:
    """One. do: changes the folder RUN before the start; plants: happen during it, in rank, one for each function.

    step: what must be loaded, None where the start must raise `raised` whose message matches says. aside: folder of a
    checkpoint that must be set aside -> the file that the event names, a pattern. Whatever is not set aside must stay
    as it is.
    """

    name: str
    do: Callable[[Path], None]
    step: int | None
    aside: Mapping[str, str] = field(default_factory=dict)
    raised: str = ""
    says: str = ""
    plants: tuple[Plant, ...] = ()

    @property
    def promise(self) -> str:
        """What is promised of it."""
        if self.raised == "CannotBeginError":
            return "A node's own trouble condemns no checkpoint"
        if self.raised:
            return "Where nothing may be loaded, the start refuses in words and moves nothing"
        return "The older one is taken, the bad file named" if self.aside else "What is whole is not called damaged"


def damages(ranks: int, files: int) -> list[Damage]:
    """All of them, for so many ranks that load what so many wrote."""
    data = ["__0_0.distcp", f"__{files - 1}_0.distcp"]
    found = [
        Damage(f"{name}: {kind}", partial(_change, name, kind), 3, {NEWEST: re.escape(name)})
        for name in (MANIFEST, *data) for kind in CHANGES
    ]  # fmt: skip
    found += [
        Damage(f"{name}: a link to a whole file elsewhere", partial(_move_file, name), 6) for name in (MANIFEST, *data)
    ]
    more = [("a file of junk", "junk"), ("a data file of a rank that was not there", f"__{files}_0.distcp")]
    found += [Damage(f"one more file: {what}", partial(_add, name), 6) for what, name in more]
    return [*found, *_manifests(), *_several(data), *_folders(), *_quarantines(data), *_of_one_rank(ranks, data)]


def _manifests() -> Iterator[Damage]:
    named = {NEWEST: re.escape(MANIFEST)}
    yield Damage("manifest: changed, its digest left", partial(_edit, _skipped, right=False), 3, named)
    yield Damage("manifest: of another step, its digest right", partial(_edit, _step), 3, named)
    yield Damage("manifest: a file without sha256, its digest right", partial(_edit, _unhashed), 3, named)
    later = partial(Damage, step=None, raised="RefusedError", says=rf"(?=.*{NEWEST})(?=.*later dsft)")
    yield later("manifest: one more key, its digest right", one_more_key)
    yield later("manifest: of a later format, its digest right", partial(_edit, _format))


def _several(data: list[str]) -> Iterator[Damage]:
    all_three = dict.fromkeys((FIRST, SECOND, NEWEST), data[0])
    yield Damage(
        "all three checkpoints: a bit of a data file", partial(_flip, all_three),
        None, raised="RefusedError", says=rf"{re.escape(data[0])}.*resume\.anew=true",
    )  # fmt: skip
    two = {NEWEST: data[-1], SECOND: MANIFEST}
    yield Damage(
        "the two newest: a bit of different files", partial(_flip, two), 1,
        {step: re.escape(name) for step, name in two.items()},
    )  # fmt: skip


def _folders() -> Iterator[Damage]:
    yield Damage("checkpoint: a link to a whole folder elsewhere", _move_folder, 6)
    named = {NEWEST: ".*"}
    yield Damage("checkpoint: a dangling link", partial(_in_place_of_folder, "link"), 3, named)
    yield Damage("checkpoint: a file in its place", partial(_in_place_of_folder, "file"), 3, named)
    yield Damage("checkpoint: an empty folder", partial(_in_place_of_folder, "empty"), 3, named)


def _quarantines(data: list[str]) -> Iterator[Damage]:
    yield Damage(
        "a damaged file, and quarantine is a file", partial(_flip, {NEWEST: data[0]}, quarantine="file"),
        None, raised="RuntimeError", says=rf"{NEWEST}.*could not be moved to .*quarantine",
    )  # fmt: skip
    yield Damage(
        "a damaged file, and quarantine has the name", partial(_flip, {NEWEST: data[0]}, quarantine="name"),
        3, {NEWEST: re.escape(data[0])},
    )  # fmt: skip


def _of_one_rank(ranks: int, data: list[str]) -> Iterator[Damage]:
    """A node's own trouble: what one rank reads right is not damaged. On one rank nobody else reads it."""
    name, last = data[-1], ranks - 1
    when = UNREADABLE.format(name=name)
    cannot = "OSError(5, 'Input/output error', str(args[0]))"
    opened = Plant("pathlib:Path.open", "raise", cannot, nth=0, rank=last, when=when)
    if ranks == 1:
        yield Damage("EIO on the last rank only", _nothing, 3, {NEWEST: re.escape(name)}, plants=(opened,))
        yield Damage("a file that rank 0 alone sees", _nothing, 6)
        return
    node = partial(Damage, do=_nothing, step=None, raised="CannotBeginError")
    yield node("EIO on the last rank only", says=rf"rank {last}\b", plants=(opened,))
    gone = "FileNotFoundError(2, 'No such file or directory', str(args[0]))"
    absent = tuple(
        Plant(place, "raise", gone, nth=0, rank=rank, when=when)
        for rank in range(1, ranks) for place in ("pathlib:Path.open", "pathlib:Path.stat")
    )  # fmt: skip
    yield node("a file that rank 0 alone sees", says=r"rank(s)? 1\b", plants=absent)


def _newest(run: Path) -> Path:
    return run / "checkpoints" / NEWEST


def _nothing(run: Path) -> None:
    pass


def flip_a_bit(path: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _zero(path: Path) -> None:
    """64 bytes of zeros where there were others."""
    content = bytearray(path.read_bytes())
    start = next(at for at in range(len(content) // 2, len(content)) if content[at])
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    path.write_bytes(content)


def _older(path: Path) -> None:
    shutil.copy(path.parent.with_name(SECOND) / path.name, path)


def _longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: Mapping[str, Callable[[Path], None]] = {
    "one bit": flip_a_bit, "truncated": _truncate, "empty": _empty, "a block of zeros": _zero, "deleted": Path.unlink,
    "an older file": _older, "one byte more": _longer, "a dangling link": _dangle, "a link to itself": _loop,
    "a folder in its place": _folder,
}  # fmt: skip
"""Whatever of these happens to a file of a checkpoint, it is damaged."""


def _change(name: str, kind: str, run: Path) -> None:
    path = _newest(run) / name
    before = path.read_bytes()
    CHANGES[kind](path)
    if path.is_file() and path.read_bytes() == before:
        raise AssertionError(f"{kind} changes nothing of {name}")


def _elsewhere(run: Path) -> Path:
    place = run.parent / "elsewhere"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return place


def _move_file(name: str, run: Path) -> None:
    path = _newest(run) / name
    path.symlink_to(path.rename(_elsewhere(run) / name))


def _move_folder(run: Path) -> None:
    path = _newest(run)
    path.symlink_to(path.rename(_elsewhere(run) / NEWEST))


def _add(name: str, run: Path) -> None:
    (_newest(run) / name).write_bytes(b"not of this checkpoint")


def _in_place_of_folder(what: str, run: Path) -> None:
    path = _newest(run)
    shutil.rmtree(path)
    if what == "link":
        path.symlink_to("nowhere")
    elif what == "file":
        path.write_text("not a folder")
    else:
        path.mkdir()


def _flip(files: Mapping[str, str], run: Path, *, quarantine: str = "") -> None:
    for step, name in files.items():
        flip_a_bit(run / "checkpoints" / step / name)
    if quarantine == "file":
        (run / "quarantine").write_text("not a folder")
    elif quarantine == "name":
        (run / "quarantine" / NEWEST).mkdir(parents=True)
        (run / "quarantine" / NEWEST / "earlier").write_text("set aside before")


def one_more_key(run: Path) -> None:
    """Make the newest manifest that of a later dsft."""
    _edit(_key, run)


def _edit(change: Callable[[dict[str, Any]], None], run: Path, *, right: bool = True) -> None:
    """Change the newest manifest. right: with the digest of what it says then."""
    path = _newest(run) / MANIFEST
    content = json.loads(path.read_text())
    digest = content.pop("digest")
    if digest != _digest(content):
        raise AssertionError("the digest of a manifest is made otherwise now")
    change(content)
    text = json.dumps({**content, "digest": _digest(content) if right else digest}, indent=1, sort_keys=True)
    path.write_text(text + "\n")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _skipped(content: dict[str, Any]) -> None:
    content["progress"]["skipped"] += 1


def _step(content: dict[str, Any]) -> None:
    content["step"] = 5


def _unhashed(content: dict[str, Any]) -> None:
    del content["files"]["__0_0.distcp"]["sha256"]


def _key(content: dict[str, Any]) -> None:
    content["seal"] = "of a later time"


def _format(content: dict[str, Any]) -> None:
    content["format"] += 1
