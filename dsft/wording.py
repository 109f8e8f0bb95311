"""What a mistake is called: Hydra's and OmegaConf's messages cut to one line, with the nearest right word."""

import difflib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from dsft_launchers.codes import USER_ERROR
from dsft_launchers.shown import say

from dsft.synonyms import KEYS, OPTIONS, SENTENCES

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
    say(f"dsft: {' '.join(str(error).split())}")
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


def shell_word(word: str) -> str:
    """Return a word as it is typed in a shell, in the quotes that need no others inside."""
    if "'" not in word or "!" in word:
        return shlex.quote(word)
    return '"' + re.sub(r'([\\"$`])', r"\\\1", word) + '"'


def suggest(word: str, options: set[str] | Sequence[str]) -> str:
    """The end of a refusal: the closest option, or all of them, or the nearest few of very many."""
    small = {option.lower(): option for option in sorted(options)}
    close = difflib.get_close_matches(word.lower(), list(small), n=1, cutoff=0.6)
    if close:
        return f"; did you mean {small[close[0]]}?"
    if len(options) > MANY:
        near = difflib.get_close_matches(word, sorted(options), n=5, cutoff=0.0)
        return f"; there are {len(options)}, the nearest: {', '.join(near)}"
    return f"; there are: {', '.join(sorted(options))}"


def one_line(error: Exception, offered: Callable[[str], Offered]) -> str:
    """Hydra's and OmegaConf's messages, cut to what the user needs. offered: group -> option -> its keys and values."""
    text = str(error)
    if found := re.search(r"Could not (?:find|load) '([a-z]+)/([^']+)'", text):
        return _no_option(found[1], found[2], offered)
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return (
            f"{found[1]} holds several values; add -m to run one after another, write a list as key=[a,b], "
            f"or a text in quotes of its own: '{found[1].partition('=')[0]}=\"...\"'"
        )
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"{found[1]} is not a key{_near_key(found[1], offered)}"
    if found := re.search(r"Could not delete '([^']+)'", text):
        return f"~{found[1]} must name a key, got what is none; a group is set to another option: {found[1]}=OPTION"
    if "nterpolation" in text and (found := re.search(r"full_key: (\S+)", text)):
        return (
            f"{found[1]} must hold no ${{...}} but keys of the configuration, got one that is none; ${{oc.env:NAME}} "
            "is a variable of the environment, \\${...} the text itself"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])


def _no_option(group: str, option: str, offered: Callable[[str], Offered]) -> str:
    """The refusal of an option that a group has not: a path or an id is meant for a key."""
    path = shell_word(f"{group}.path={as_value(option)}")
    if group == "model" and "/" in option:
        return f"model={option} is no option; for a folder or hub id: model=custom {path}"
    if group == "data" and ("/" in option or "." in option):
        return f"data={option} is no option; for a file: data=local {path}, for a hub id: data=hf data.path=ID"
    if (meant := OPTIONS.get(f"{group}={option}".lower())) is not None:
        return f"{group}={option} does not exist; {meant}"
    options = offered(group)
    if group == "experiment":
        there = ", ".join(sorted(options))
        return f"experiment={option} does not exist; there are: {there}; one of your own is conf/experiment/NAME.yaml"
    if [*options] == ["default"] and "name" in options["default"]:
        return f"{group}={option} does not exist; did you mean {group}.name={option}?"
    return f"{group}={option} does not exist{suggest(option, [*options])}"


def rule(said: Sequence[str], value: object) -> str:
    """Pydantic's messages about a value, one for each type that it may have, as what it must be and what it is."""
    parts = [each.removeprefix("Input should be ").replace("valid ", "") for each in said]
    wanted = " or ".join(dict.fromkeys(part for part in parts if part != "None"))
    wanted = wanted.replace("a integer", "an integer").replace("a array", "a list in [ ]")
    wanted = wanted.replace("Field required", "complete")
    way = ""
    if isinstance(value, float) and value.is_integer() and "integer" in wanted:
        way = f"; type {int(value)}"
    elif isinstance(value, str):
        close = difflib.get_close_matches(value, re.findall(r"'([^']+)'", wanted), n=1, cutoff=0.5)
        way = f"; did you mean {close[0]}?" if close else ""
    return f"{wanted}, got {value!r}{way}"


def own_keys(group: str) -> Offered:
    """Option -> its keys and values, of what dsft itself offers."""
    return {path.stem: yaml.safe_load(path.read_text()) or {} for path in (OWN_CONF / group).glob("*.yaml")}


def groups() -> set[str]:
    """The groups that dsft has."""
    return {path.name for path in OWN_CONF.iterdir() if path.is_dir()}


def _near_key(key: str, offered: Callable[[str], Offered]) -> str:
    """What is said of a key that is none: whose key it is, what it is called here, or the nearest ones."""
    group, _, leaf = key.partition(".")
    options = offered(group) if leaf and group in groups() else {}
    if (said := _of_another_option(key, options)) is not None:
        return said
    if (said := _elsewhere(key, offered)) is not None:
        return said
    if not options:
        names = sorted(groups() | {"run_dir"})
        if difflib.get_close_matches(group, names, n=1, cutoff=0.6):
            return suggest(group, names)
        leaves = _leaves(offered)
        close = difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1, cutoff=0.7)
        return f"; did you mean {leaves[close[0]][0]}?" if close else suggest(group, names)
    known = {str(name) for keys in options.values() for name in keys} - {"_target_", "defaults"}
    if group == "method":
        known -= {"lr"}  # of the YAML alone
    return suggest(leaf, known).replace("did you mean ", f"did you mean {group}.")


def _of_another_option(key: str, options: Offered) -> str | None:
    """What is said where an option of the group has the key, chosen or not; None where none has it."""
    group, _, leaf = key.partition(".")
    first, _, inner = leaf.partition(".")
    if group == "tracker" and first in options:
        known = set(options[first]) - {"_target_"}
        if inner not in known and inner:
            return suggest(inner, known).replace("did you mean ", f"did you mean tracker.{first}.") if known else None
        return f" without tracker={first}; add that"
    owners: list[str] = []
    for option, keys in sorted(options.items()):
        if first in keys and keys[first] == {}:
            whole = f" to be set as a whole; add what is in it one by one: +{key}.NAME=VALUE"
            return whole if leaf == first else f" yet; add it: +{key}=VALUE"
        if leaf in keys:
            owners.append(option)
    if not owners:
        return None
    return (
        f" of the chosen {group}: it needs {group}={' or '.join(owners)}; add {'one of them' if owners[1:] else 'that'}"
    )


def _elsewhere(key: str, offered: Callable[[str], Offered]) -> str | None:
    """What is said of a name that other tools use, or that another group has; None of any other."""
    name = key.rpartition(".")[2]
    if name in SENTENCES:
        return f"; {SENTENCES[name]}"
    found = [KEYS[name]] if name in KEYS else _leaves(offered).get(name, [])
    return f"; did you mean {' or '.join(found)}?" if found and key not in found else None


def _leaves(offered: Callable[[str], Offered]) -> dict[str, list[str]]:
    """Name -> the keys that end in it, of all options of all groups but those that set keys of other groups."""
    found: dict[str, list[str]] = {}
    for group in sorted(groups() - {"experiment", "tracker"}):
        for name in sorted({str(name) for keys in offered(group).values() for name in keys}):
            if name not in ("_target_", "defaults", "name") and (group, name) != ("method", "lr"):
                found.setdefault(name, []).append(f"{group}.{name}")
    return found
