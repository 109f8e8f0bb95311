"""The result of a run on disk: described by the digests of its files, given its name at once, and looked at again.

Only a whole folder is ever called `adapter` or `adapter.old-*`; what is being written or deleted is called
`adapter.tmp-*`. So a process may be killed between any two system calls, and the next start knows what each folder is.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsft_launchers.files import replace_text, sync

from dsft.checkpoint.store import Store
from dsft.models.headers import INDEX, read_header

RESULT, FOUND, PROBE = "adapter", "verified.json", "probe.safetensors"
"""The result's folder in RUN; in it, what is known of its files; and what the live model left for a comparison."""

WRITTEN = (".safetensors", ".json", ".md", ".jinja", ".txt", ".model")
"""Ends of the names of files of a result, where there is no list of them."""

WEIGHTS = (".safetensors",)

NOT_ASKED = "checkpoint.verify_result=false"


def result_place(run_dir: Path, token: int) -> Path:
    """Return the folder in which the writer that holds token writes the result, before it takes its place."""
    return run_dir / f"{RESULT}.tmp-{token}"


def note(place: Path, found: Mapping[str, Any]) -> None:
    """Write what was found out about the result in place: `same`, and `why` if that is null."""
    replace_text(place / FOUND, json.dumps(found, indent=1) + "\n")


def describe(place: Path) -> None:
    """Add the size and SHA-256 of every file in place to what is noted about it. The probe is removed."""
    (place / PROBE).unlink(missing_ok=True)
    noted = place / FOUND
    found = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {"same": None, "why": NOT_ASKED}
    files = {
        path.relative_to(place).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(place.rglob("*"))
        if path.is_file() and path != noted
    }
    note(place, {"why": None, **found, "files": files})


def publish(place: Path, target: Path) -> None:
    """Give a result that is whole its name. An earlier one is moved aside and then deleted, as far as it goes.

    Raises OSError if place is gone; the earlier result has its name again then.
    """
    for path in (*place.rglob("*"), place):
        sync(path)
    aside = target.with_name(f"{target.name}.old-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        target.rename(aside)
    try:
        place.rename(target)
    except OSError:
        with contextlib.suppress(OSError):
            aside.rename(target)
        raise
    sync(target.parent)
    _delete(aside)


def clear_leftovers(run_dir: Path) -> None:
    """Delete what killed processes left of results, as far as it goes; an earlier result first gets its name back.

    It is called at the start of a run, under the lease.
    """
    aside = sorted(run_dir.glob(f"{RESULT}.old-*"), key=lambda path: path.lstat().st_mtime_ns)
    if aside and not os.path.lexists(run_dir / RESULT):
        with contextlib.suppress(OSError):
            aside.pop().rename(run_dir / RESULT)
    for leftover in (*aside, *run_dir.glob(f"{RESULT}.tmp-*")):
        _delete(leftover)


def _delete(leftover: Path) -> None:
    """Rename and delete leftover. What stays (an NFS server keeps files that are open) is found at the next start."""
    doomed = leftover.with_name(f"{RESULT}.tmp-{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        leftover.rename(doomed)
        if doomed.is_dir() and not doomed.is_symlink():
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            doomed.unlink()


def check(run_dir: Path, *, contents: bool = True) -> None:
    """Refuse a run that is done and whose result is gone, torn or changed. Raises ValueError with the way out.

    contents: also read the files that have their sizes and compare their digests.
    """
    wrong: tuple[str, str] | None = (FOUND, "missing")
    if (run_dir / RESULT / FOUND).exists() or not _is_listed(run_dir) or not (run_dir / RESULT).is_dir():
        wrong = next(damages(run_dir / RESULT, contents=contents), None)
    if wrong is None:
        return
    if any(Store(run_dir).newest_first()):
        way = f"remove {run_dir / 'status.json'} and start again: it is written anew from the newest checkpoint"
    else:
        way = f"train it again with resume.anew=true, which moves what is there to {run_dir}/before-N"
    raise ValueError(
        f"run_dir {run_dir} is done and must hold its whole result, got {RESULT}/{wrong[0]} {wrong[1]}; put it back, "
        f"or {way}"
    )


def require(folder: Path, what: str, *, weights_alone: bool = False) -> None:
    """Refuse a result whose weights, descriptions (JSON) or code are not those that were published. Reads them all.

    Other files may have been edited since, such as its README. what: how the user calls it; weights_alone: so may the
    descriptions, as of a copy whose base lies elsewhere. Raises ValueError.
    """
    if folder.name == RESULT and _is_listed(folder.parent) and not (folder / FOUND).exists():
        raise ValueError(f"{what} must hold its whole result, got {folder / FOUND} missing; put it back")
    ends = WEIGHTS if weights_alone else (*WEIGHTS, ".json", ".py")
    for name, wrong in damages(folder, contents=True):
        if name.endswith(ends):
            raise ValueError(f"{what} must hold its whole result, got {folder / name} {wrong}; put it back")


def _is_listed(run_dir: Path) -> bool:
    """Return True if the run was made by a dsft that lists the files of each result, by its status.json."""
    try:
        return "saved" in json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, TypeError):
        return False


def damages(folder: Path, *, contents: bool) -> Iterator[tuple[str, str]]:
    """Yield name and finding of each file of a result that is not as verified.json lists it, cheapest first.

    Of a result without such a list (an older dsft wrote none) only the weights are looked at: that they exist and are
    as long as their headers say.
    """
    try:
        listed = _listed(folder)
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        yield FOUND, "damaged"
        return
    if listed is None:
        yield from _of_an_older_run(folder)
        return
    for name, (size, _) in listed.items():
        try:
            there = (folder / name).stat().st_size
        except OSError as error:
            yield name, f"unreadable ({error.strerror})" if (folder / name).exists() else "missing"
            continue
        if there != size:
            yield name, f"with {there:,} bytes, {size:,} were written"
    for name, (_, digest) in listed.items() if contents else ():
        try:
            if _sha256(folder / name) != digest:
                yield name, "changed"
        except OSError as error:
            yield name, f"unreadable ({error.strerror})"


def _listed(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Name -> size and SHA-256 of a result's files, None if it has no such list."""
    try:
        files = json.loads((folder / FOUND).read_text(encoding="utf-8")).get("files")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if files is None else {name: (int(file["size"]), str(file["sha256"])) for name, file in files.items()}


def names(folder: Path) -> list[str]:
    """Return the files of a result: those that verified.json lists, and itself; by their suffix where it lists none."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        if (listed := _listed(folder)) is not None:
            there = [name for name in listed if not (Path(name).is_absolute() or ".." in Path(name).parts)]
            return [*there, FOUND]
    return sorted(path.name for path in folder.iterdir() if path.suffix in WRITTEN and path.is_file())


def _of_an_older_run(folder: Path) -> Iterator[tuple[str, str]]:
    weights = {path.name for path in folder.glob("*.safetensors")}
    if (folder / INDEX).is_file():
        try:
            weights |= set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            yield INDEX, "damaged"
    if not weights:
        yield "*.safetensors", "missing"
    for name in sorted(weights):
        if not (folder / name).is_file():
            yield name, "missing"
            continue
        try:
            read_header(folder / name)
        except ValueError:
            yield name, "damaged"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
