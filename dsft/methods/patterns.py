"""Regular expressions that come with an adapter or a configuration: those that could run for ever are refused."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from re import _parser as parser  # type: ignore[attr-defined]  # the standard library's own reading of an expression
from typing import Any

LONGEST = 1000
"""Characters of an expression."""
DOUBLINGS = 21
"""How often the work on one name may double: with each part that is there or not, or one of several, once."""
OF_A_REPEAT = 6
"""Doublings of a part that may match more or less text: names have some 2**6 characters."""

OF_PEFT = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters")
"""Keys of PEFT's configurations that it matches names with; of a mapping the keys."""

REPEAT = (parser.MAX_REPEAT, parser.MIN_REPEAT, parser.POSSESSIVE_REPEAT)


def check_pattern(key: str, pattern: str) -> None:
    """Raise ValueError for an expression that may take more than a moment on names of modules, or that is none."""
    way = "name the modules, or use fewer of * + ? and | and none around another"
    if len(pattern) > LONGEST:
        raise ValueError(f"{key} must be at most {LONGEST} characters, got {len(pattern):,}; {way}")
    try:
        doublings = _doublings(parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{key}: {pattern[:100]} is no regular expression ({error})") from error
    if doublings > DOUBLINGS:
        raise ValueError(f"{key} must be an expression that ends soon on any name, got {pattern[:100]}; {way}")


def check_config(config: Mapping[str, Any], place: object) -> None:
    """Raise ValueError if a PEFT configuration, of somebody's folder, holds such an expression."""
    for key in OF_PEFT:
        value = config.get(key)
        for pattern in [value] if isinstance(value, str) else value or []:
            check_pattern(f"{key} in {place}", str(pattern))


def _doublings(parts: Any) -> float:
    """How often the work may double for a parsed expression; infinity for repeats of what itself varies."""
    found = 0.0
    for kind, what in parts:
        below = sum(map(_doublings, _within(kind, what)))
        if kind in (parser.GROUPREF, parser.GROUPREF_EXISTS):
            below = math.inf
        elif kind in REPEAT and what[1] > 1:
            below = math.inf if below else OF_A_REPEAT * (what[0] != what[1])
        elif kind in REPEAT or kind is parser.BRANCH:
            below += 1
        found += below
    return found


def _within(kind: Any, what: Any) -> Iterator[Any]:
    """The parsed expressions inside one part."""
    if kind in REPEAT:
        yield what[2]
    elif kind is parser.BRANCH:
        yield from what[1]
    elif kind is parser.SUBPATTERN:
        yield what[3]
    elif kind in (parser.ASSERT, parser.ASSERT_NOT):
        yield what[1]
    elif kind is parser.ATOMIC_GROUP:
        yield what


def check_sorted(key: str, patterns: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse patterns of which another would decide in PEFT's file, where they are sorted by name."""
    for name in names:
        found = [pattern for pattern in patterns if ends_with(pattern, name)]
        if found and patterns[min(found)] != patterns[found[0]]:
            said = " and ".join(f"{patterns[each]} by {each}" for each in (found[0], min(found)))
            raise ValueError(f"{key} must say one thing of {name}, got {said}, first in PEFT's file; leave one out")


def ends_with(pattern: str, name: str) -> bool:
    """Return whether pattern is a whole name, or follows a dot at its end: PEFT's rule (get_pattern_key)."""
    check_pattern("method.options", pattern)
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
