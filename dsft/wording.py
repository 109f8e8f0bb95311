"""What a mistake is called: Hydra's and OmegaConf's messages cut to one line, with the nearest right word."""

import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from dsft_launchers.codes import USER_ERROR

OWN_CONF = next(
    path for path in (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf") if path.is_dir()
)
"""The YAML tree: beside the code in an installed wheel, at the top of a checkout."""

MANY = 30
"""Options that no one wants to read in one line."""

CONSTANT = r"true|false|null|nan|inf|\.\d.*"
"""Words that Hydra's grammar reads as something else than text."""

Offered = Mapping[str, Mapping[str, Any]]
"""Option of a group -> its keys and values."""


def refuse(error: ValueError) -> int:
    """The user's mistake in one line on stderr; exit code 2."""
    print(f"dsft: {' '.join(str(error).split())}", file=sys.stderr)
    return USER_ERROR


def as_value(text: str) -> str:
    """Return text as a value that Hydra's grammar reads as this text: in double quotes where it has to be quoted."""
    if re.fullmatch(r"[A-Za-z_./][\w./:-]*", text, re.ASCII) and not re.fullmatch(CONSTANT, text, re.IGNORECASE):
        return text
    escaped = re.sub(r'(\\*)("|\$\{|$)', _escaped, text)
    return f'"{escaped}"'


def _escaped(found: re.Match[str]) -> str:
    """Backslashes before a quote, an interpolation or the end count twice, and the first two take one more."""
    return found[1] * 2 + ("\\" + found[2] if found[2] else "")


def suggest(word: str, options: set[str] | Sequence[str]) -> str:
    """The end of a refusal: the closest option, or all of them, or the nearest few of very many."""
    close = difflib.get_close_matches(word, sorted(options), n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    if len(options) > MANY:
        near = difflib.get_close_matches(word, sorted(options), n=5, cutoff=0.0)
        return f"; there are {len(options)}, the nearest: {', '.join(near)}"
    return f"; there are: {', '.join(sorted(options))}"


def one_line(error: Exception, offered: Callable[[str], Offered]) -> str:
    """Hydra's and OmegaConf's messages, cut to what the user needs. offered: group -> option -> its keys and values."""
    text = str(error)
    if found := re.search(r"Could not (?:find|load) '([a-z]+)/([^']+)'", text):
        group, option = found.groups()
        if group == "model" and "/" in option:
            return f"model={option} is no option; for a folder or hub id: model=custom model.path={option}"
        return f"{group}={option} does not exist{suggest(option, [*offered(group)])}"
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{found[1]} holds several values; add -m to run one after another, or write a list as key=[a,b]"
    if found := re.search(r"Error parsing override '([^']+)'|LexerNoViableAltException: (\S+)", text):
        return f"{found[1] or found[2]} must read KEY=VALUE; put quotes around values with ~, spaces or brackets"
    if found := re.search(r"Could not override '([^']+)'. No match in the defaults list", text):
        groups = {path.name for path in OWN_CONF.iterdir() if path.is_dir()}
        return f"{found[1]} is not a group{suggest(found[1], groups)}"
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"{found[1]} is not a key{_near_key(found[1], offered)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])


def own_keys(group: str) -> Offered:
    """Option -> its keys and values, of what dsft itself offers."""
    return {path.stem: yaml.safe_load(path.read_text()) or {} for path in (OWN_CONF / group).glob("*.yaml")}


def _near_key(key: str, offered: Callable[[str], Offered]) -> str:
    """The keys beside a misspelt one, of all options of that group."""
    group, _, leaf = key.partition(".")
    groups = {path.name for path in OWN_CONF.iterdir() if path.is_dir()}
    if not leaf or group not in groups:
        return suggest(group, groups | {"run_dir"})
    owners: dict[str, list[str]] = {}
    first = leaf.partition(".")[0]
    for option, keys in sorted(offered(group).items()):
        for name, value in keys.items():
            owners.setdefault(str(name), []).append(option)
            if name == first and value == {}:
                whole = f" to be set as a whole; add what is in it one by one: +{key}.NAME=VALUE"
                return whole if leaf == first else f" yet; add it: +{key}=VALUE"
    if leaf in owners:
        return f" of the chosen option: {group}={', '.join(owners[leaf])} has it, with its own kind of value"
    names = set(owners) - {"_target_", "defaults"}
    return suggest(leaf, names).replace("did you mean ", f"did you mean {group}.")
