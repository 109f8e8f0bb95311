"""Folders of the cache that are written once: the digest of each of their files, and whether they are as written."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FILE = "sealed.json"
"""Written last: name -> digest of all that is in the folder."""

Contents = Mapping[str, Callable[[Path], Mapping[str, Any]]]
"""Kind -> what of that kind is in a folder, by name. A kind is looked at only if those before it are as they were."""


def seal(folder: Path, contents: Contents) -> None:
    """Write down what is in folder."""
    (folder / FILE).write_text(_text({kind: look(folder) for kind, look in contents.items()}), encoding="utf-8")


def changed(folder: Path, contents: Contents) -> str | None:
    """What in folder is not as it was sealed, the first by name; None if all of it is. Reads what contents reads."""
    file = folder / FILE
    if not file.is_file():
        return f"{FILE}, which is missing (an older dsft wrote none),"
    try:
        text = file.read_text(encoding="utf-8")
        listed: Mapping[str, Mapping[str, Any]] = json.loads(text)
        found = {}
        for kind, look in contents.items():
            names = found[kind] = look(folder)
            for name in sorted({*names, *listed[kind]}):
                if names.get(name) != listed[kind].get(name):
                    return name
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{getattr(error, 'filename', None) or FILE} ({type(error).__name__})"
    return None if text == _text(found) else FILE


def names_in(folder: Path) -> list[Path]:
    """Files in folder but FILE, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir() and path != folder / FILE)


def make_way(folder: Path, what: str, wrong: str) -> Path:
    """Say that folder is made anew, and rename it; returns where it lies until it is deleted."""
    print(f"dsft: {what} {folder} is made anew: {wrong} is not as it was written", file=sys.stderr, flush=True)
    aside = folder.with_name(f".{folder.name}.changed.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside


def _text(found: Mapping[str, Mapping[str, Any]]) -> str:
    return json.dumps(found, sort_keys=True, indent=0) + "\n"
