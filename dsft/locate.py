"""Names that become imports: a name in a folder that is read is held to a list before anything is imported."""

import importlib
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from dsft import owners
from dsft.searched import OwnFinder, installed_only, on_pythonpath, own_folder_too

PLUGINS = "DSFT_PLUGINS"
"""Variable: packages, separated by commas, whose classes a folder that is read may name."""
GROUP = "dsft.configs"
"""The entry points of packages that add options."""


@dataclass(frozen=True)
class Allowed:
    """Whose classes may be named: dsft's, those of packages with an entry point in dsft.configs, and of DSFT_PLUGINS.

    file: where the names stand; also: packages beside those; pythonpath: and what lies in the entries of PYTHONPATH;
    anything: the command line asks, so any may be named.
    """

    file: Path | None = None
    also: tuple[str, ...] = ()
    pythonpath: bool = False
    anything: bool = False

    def refusal(self, name: str) -> str | None:
        """Return why name may not be imported, and the way out; None if it may. Nothing is imported."""
        parts = name.split(".")
        if len(parts) < 2 or not all(part.isascii() and part.isidentifier() for part in parts):
            return f"{self._told()} is not package.module.Class; name a class so"
        package = parts[0]
        if self.anything or package in ("dsft", *self.also, *plugins()):
            return None
        if package in [value.partition(".")[0] for value in providers().values()]:
            return None
        if self.pythonpath and on_pythonpath(package):
            return None
        if package in sys.stdlib_module_names:
            return f"{self._told()} is of Python's own library, of which a folder may name nothing; take the name out"
        return (
            f"{self._told()} is of no package that a folder may name; install the package that has it with an entry "
            f"point in {GROUP} or, if you trust its code, set {PLUGINS}={package}"
        )

    def _told(self) -> str:
        if self.file is None:
            return "which"
        whose = f" of {owners.owner_of(self.file)}" if self.file.exists() else ""
        return f"named in {self.file}{whose}, which"


TYPED, READ = Allowed(anything=True), Allowed()
"""What the command line names itself, or by a YAML that it chose; and what it reads."""


class ForeignNameError(ValueError):
    """A name that may not be imported; the text says why, and what to do."""


def locate(name: str, allowed: Allowed) -> Any:
    """Return what name means, as `package.module.Class`; nothing is imported unless allowed has it.

    Raises ForeignNameError, or ImportError, AttributeError or ValueError where there is no such thing.
    """
    if (why := allowed.refusal(name)) is not None:
        raise ForeignNameError(why)
    module, _, last = name.rpartition(".")
    package = module.partition(".")[0]
    around = own_folder_too if package in plugins() else nullcontext if allowed.anything else installed_only
    with around():
        try:
            found = getattr(importlib.import_module(module), last)
        except ModuleNotFoundError as error:
            if (why := OwnFinder.refused.get(str(error.name))) is not None:
                raise ImportError(why) from error
            raise
    if isinstance(found, type) and not allowed.anything:
        whose = f"{found.__module__}.{found.__name__}"
        if (why := allowed.refusal(whose)) is not None:
            raise ForeignNameError(f"which is {whose}, {why}")
    return found


def plugins() -> tuple[str, ...]:
    """Return the packages of DSFT_PLUGINS. Raises ValueError for what names none."""
    names = [name.strip() for name in os.environ.get(PLUGINS, "").split(",")]
    for name in filter(None, names):
        if not (name.isascii() and name.isidentifier()):
            raise ValueError(f"{PLUGINS} must be names of packages with commas between, got {name!r}; correct it")
    return tuple(filter(None, names))


def providers() -> dict[str, str]:
    """Return the entry points in dsft.configs of installed packages: name -> the package with its YAMLs.

    One that only the user's own folder claims to have is not installed.
    """
    with installed_only():
        return {point.name: point.value for each in distributions() for point in each.entry_points.select(group=GROUP)}


def ask_for(tree: Mapping[str, Any]) -> None:
    """Let the processes of this run, which read its folder, import what its command line asked for.

    tree: what was composed. They inherit DSFT_PLUGINS.
    """
    method = tree.get("method")
    kind = method.get("type") if isinstance(method, Mapping) else None  # a class of PEFT's, by its own key
    names = [*_targets(tree), *([kind] if isinstance(kind, str) and "." in kind else [])]
    asked = {*plugins(), *(name.partition(".")[0] for name in names)} - {"dsft", "peft"}
    if wanted := sorted(name for name in asked if name.isascii() and name.isidentifier()):
        os.environ[PLUGINS] = ",".join(wanted)


def _targets(node: Any) -> list[str]:
    """Every class that a tree names."""
    if isinstance(node, list | tuple):
        return [name for each in node for name in _targets(each)]
    if not isinstance(node, Mapping):
        return []
    own = [str(node["_target_"])] if "_target_" in node else []
    return [*own, *(name for each in node.values() for name in _targets(each))]
