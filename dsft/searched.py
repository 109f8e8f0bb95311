"""Where Python looks for modules: what is installed first, the folder in which a command was typed last.

dsft's own processes are started with -P. A verb that runs what was typed calls `own_folder_last`; a verb that reads
what others may have made imports nothing from the folder in which it is typed.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import machinery
from importlib.machinery import FileFinder, ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from dsft import owners

TYPED_IN = "DSFT_TYPED_IN"
"""Variable of dsft's own processes: the folder in which the command was typed; empty where nothing comes from it."""

HELD = ("sweep.json", "adapter_config.json", "dsft_adapter.json")
"""Files that make a folder one that is read; a run's has RUN beside them."""
RUN = ("config.yaml", "provenance.json")

ROOT = str(Path(__file__).parents[1])


HYDRA = "hydra_plugins"
"""Hydra imports all that it finds below this name, whoever asks for what."""


class OwnFolder(str):
    """The entry of sys.path that is the user's folder and nothing that is installed."""

    __slots__ = ()


class OwnFinder(FileFinder):
    """Finds modules in the user's own folder, but for those that another user may have written, and Hydra's plugins.

    Libraries look for others that they could use: to them such a module is not there, and refused says why.
    """

    refused: ClassVar[dict[str, str]] = {}
    """Name of a module -> why it was not found."""

    reached: ClassVar[set[str]] = set()
    """The user's folder, and the folders of packages that were found in it."""

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a module as Python does, and look at whose its files are before any of it is read."""
        spec = super().find_spec(fullname, target) if fullname != HYDRA else None
        if spec is None:
            return None
        folders = list(spec.submodule_search_locations or [])
        kept = [spec.cached, os.path.dirname(spec.cached)] if spec.cached else []
        for place in [spec.origin, *folders, *kept]:
            if place and os.path.exists(place) and (why := owners.doubt(Path(place))) is not None:
                self.refused[fullname] = f"{place} {why}; see what is in it, and make it yours alone (chown, chmod o-w)"
                return None
        for folder in folders:
            self.reached.add(folder)
            sys.path_importer_cache.pop(folder, None)
        return spec

    @classmethod
    def of(cls, entry: str) -> "OwnFinder":
        """Return the finder of an entry of sys.path. Raises ImportError, as hooks do, if it is not the user's."""
        if entry not in cls.reached:
            raise ImportError(entry)
        return cls(
            entry,
            (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
            (machinery.SourceFileLoader, machinery.SOURCE_SUFFIXES),
            (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
        )


def python(module: str) -> list[str]:
    """Return the beginning of the command that starts a module of dsft, without the folder that it starts in."""
    return [sys.executable, "-P", "-m", module]


def own_folder_last(*, inherited: bool = False) -> None:
    """Let modules be found in the folder in which the command was typed, behind all others; children do the same.

    inherited: this process was started by another of dsft's, which has said which folder it is.
    """
    if not inherited or TYPED_IN not in os.environ:
        os.environ[TYPED_IN] = own_folder()
    if paths := os.environ.get("PYTHONPATH"):  # an empty entry is the folder that a child starts in
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths.split(os.pathsep)))
    if ROOT not in sys.path:  # a checkout that is not installed, in whose folder the command was typed
        sys.path.append(ROOT)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), ROOT]))
    take(os.environ[TYPED_IN])


def take(folder: str) -> None:
    """Make folder the user's own on sys.path; an empty one takes the former away."""
    os.environ[TYPED_IN] = folder
    sys.path[:] = [entry for entry in sys.path if not isinstance(entry, OwnFolder)]
    if folder and folder not in sys.path:
        sys.path.append(_searched(folder))


def _searched(folder: str) -> OwnFolder:
    """Return the entry of sys.path for the user's folder, whose modules are found by OwnFinder from now on."""
    OwnFinder.reached.add(folder)
    if OwnFinder.of not in sys.path_hooks:
        sys.path_hooks.insert(0, OwnFinder.of)
    sys.path_importer_cache.pop(folder, None)
    return OwnFolder(folder)


def own_folder() -> str:
    """Return the folder in which this process works, or "" where its files may be another's or are not there to be run.

    That is a folder that others may write, the folder of a run, of a sweep or of an adapter.
    """
    try:
        here = os.getcwd()
    except OSError:  # it was deleted
        return ""
    return "" if why_not(Path(here)) else here


def why_not(folder: Path) -> str | None:
    """Return why nothing is imported from folder, and no ./conf of it is read; None if it is the user's own."""
    try:
        if (doubt := owners.doubt(folder)) is not None:
            return doubt
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    held = [name for name in HELD if (folder / name).exists()]
    if all((folder / name).exists() for name in RUN):
        held.append(RUN[0])
    return f"is the folder of what {held[0]} describes" if held else None


def on_pythonpath(package: str) -> bool:
    """Return True if the user has put a folder with this module on PYTHONPATH; nothing is imported."""
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    return PathFinder.find_spec(package, entries) is not None


@contextmanager
def installed_only() -> Iterator[None]:
    """Within it modules of the user's own folder are not found."""
    own = [entry for entry in sys.path if isinstance(entry, OwnFolder)]
    sys.path[:] = [entry for entry in sys.path if not isinstance(entry, OwnFolder)]
    try:
        yield
    finally:
        sys.path.extend(own)


@contextmanager
def own_folder_too() -> Iterator[None]:
    """Within it modules of this process' folder are found behind all others, if it is the user's own."""
    folder = own_folder()
    added = [_searched(folder)] if folder and folder not in sys.path else []
    sys.path.extend(added)
    try:
        yield
    finally:
        sys.path[:] = [entry for entry in sys.path if not any(entry is each for each in added)]
