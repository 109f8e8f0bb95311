"""What ranks say to each other, as JSON: data comes out as it went in, and nothing that is received can run.

Objects that JSON does not know are spelled {kind: content}. A dataclass or a member of an enum is known by its name
among what dsft has imported already, and is filled field by field: no constructor of it is called.
"""

import base64
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

OURS = "dsft"
"""The package whose dataclasses and enums are sent."""


def spelled(value: object) -> bytes:
    """Return value as JSON. Raises TypeError for what is no data."""
    return json.dumps(_plain(value)).encode("ascii")


def understood(content: bytes) -> Any:
    """Return the value that content spells. Raises ValueError if it spells none."""
    try:
        return _value(json.loads(content))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"another rank sent what is no message ({type(error).__name__}: {error})") from error


def _plain(value: object) -> Any:
    """Return value in JSON's own types."""
    if isinstance(value, Enum) or (is_dataclass(value) and not isinstance(value, type | BaseException)):
        return _ours(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float | str):
        return next(kind(value) for kind in (int, float, str) if isinstance(value, kind))
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(part)] for key, part in value.items()]}
    for kind, name in ((tuple, "tuple"), (set, "set"), (frozenset, "frozenset")):
        if isinstance(value, kind):
            return {name: [_plain(part) for part in value]}
    raise _refusal(value)


def _ours(value: Any) -> Any:
    """Return a dataclass or a member of an enum by its name."""
    name = [type(value).__module__, type(value).__qualname__]
    if _class(name) is not type(value):
        raise _refusal(value)
    if isinstance(value, Enum):
        return {"member": [name, value.name]}
    return {"data": [name, {field.name: _plain(getattr(value, field.name)) for field in fields(value)}]}


def _refusal(value: object) -> TypeError:
    return TypeError(f"gather sends data between ranks, got {type(value).__name__}: {value!r:.200}")


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_value(part) for part in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    return KINDS[kind](content)


def _data(content: Any) -> Any:
    name, values = content
    kind = _class(name)
    if not is_dataclass(kind) or {field.name for field in fields(kind)} != values.keys():
        raise TypeError(f"{name} is no dataclass of these fields")
    made = object.__new__(kind)
    for field, value in values.items():
        object.__setattr__(made, field, _value(value))
    return made


def _member(content: Any) -> Any:
    name, member = content
    kind = _class(name)
    if kind is None or not issubclass(kind, Enum):
        raise TypeError(f"{name} is no enum")
    return kind[member]


def _class(name: Any) -> type[Any] | None:
    """Return dsft's class of this module and name, if that module is imported; None for anything else."""
    module, qualname = name
    if module != OURS and not module.startswith(f"{OURS}."):
        return None
    found = vars(sys.modules[module]).get(qualname) if module in sys.modules else None
    return found if isinstance(found, type) else None


KINDS: Mapping[str, Callable[[Any], Any]] = {
    "bytes": lambda content: base64.b64decode(content, validate=True),
    "path": Path,
    "dict": lambda content: {_value(key): _value(part) for key, part in content},
    "tuple": lambda content: tuple(map(_value, content)),
    "set": lambda content: set(map(_value, content)),
    "frozenset": lambda content: frozenset(map(_value, content)),
    "data": _data,
    "member": _member,
}
