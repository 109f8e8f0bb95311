"""What there is to choose and who provides it, asked of the sources that Hydra found: dsft's, folders, packages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """One group's chosen option and who provided its YAML (dsft, --config-dir, ./conf or a plugin)."""

    group: str
    option: str
    provider: str


def choices(chosen: Mapping[str, Any], sources: Sequence[Any]) -> list[Choice]:
    """Who provides what was chosen. chosen: group -> option, as Hydra says it; sources: the first that has it wins."""
    found = []
    for group, options in sorted(chosen.items()):
        if group.startswith("hydra/") or options is None or "@" in group:
            continue
        for option in _several(options):
            source = next((s for s in sources if s.is_config(f"{group}/{option}")), None)
            provider = "dsft" if source is None or source.provider == "main" else str(source.provider)
            found.append(Choice(group, option, provider))
    return found


def _several(options: Any) -> list[str]:
    """A group's choice as a list: Hydra gives several options of one group as the text of a list."""
    text = str(options)
    return [part.strip(" '\"") for part in text.strip("[]").split(",")]


def keys(group: str, sources: Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    """Option -> its keys and values, of everything that a group offers."""
    found: dict[str, Mapping[str, Any]] = {}
    for source in [source for source in reversed(sources) if source.is_group(group)]:
        for name in source.list(group, None):
            if source.is_config(f"{group}/{name}"):
                found[name] = source.load_config(f"{group}/{name}").config
    return found
