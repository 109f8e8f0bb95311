"""From a plain tree to frozen dataclasses: each key is a field, each value of the field's type. Raises ValueError."""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

from dsft.locate import Allowed, ForeignNameError, locate
from dsft.wording import rule, suggest

UNLIMITED = ("train.max_grad_norm", "train.hang_after")
"""Keys for which inf means that there is no limit; every other number is finite."""


def build_value(value: Any, path: str, allowed: Allowed) -> Any:
    """Turn each mapping with a _target_ into an instance of that dataclass, from the inside out.

    allowed: which classes may be named; the names of all parts are held to it before the first is imported.
    """
    check_names(value, path, allowed)
    return _built(value, path, allowed)


def check_names(value: Any, path: str, allowed: Allowed) -> None:
    """Raise ForeignNameError for the first class in value, however deep, that may not be named; imports nothing."""
    if isinstance(value, Mapping):
        if "_target_" in value and (why := allowed.refusal(str(value["_target_"]))) is not None:
            raise ForeignNameError(_not_a_class(path, value["_target_"], why))
        for key, item in value.items():
            check_names(item, f"{path}.{key}", allowed)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_names(item, f"{path}[{index}]", allowed)


def _built(value: Any, path: str, allowed: Allowed) -> Any:
    if isinstance(value, Mapping):
        parts = {key: _built(item, f"{path}.{key}", allowed) for key, item in value.items() if key != "_target_"}
        if "_target_" not in value:
            return parts
        return build_dataclass(_class(str(value["_target_"]), path, allowed), parts, path)
    if isinstance(value, list):
        return [_built(item, f"{path}[{index}]", allowed) for index, item in enumerate(value)]
    return value


def _class(target: str, path: str, allowed: Allowed) -> type:
    try:
        found = locate(target, allowed)
    except ForeignNameError as error:
        raise ForeignNameError(_not_a_class(path, target, str(error))) from error
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}._target_ must name an importable class, got {target} ({error}); install the package that has it, "
            "or put it on PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and is_dataclass(found)):
        raise ValueError(f"{path}._target_ must name a dataclass, got {target}")
    return found


def _not_a_class(path: str, target: object, why: str) -> str:
    return f"{path}._target_ must name an importable class, got {target} {why}"


def build_dataclass(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """An instance of cls from values, each checked against its field's type; unknown and absent keys are refused.

    A field with a default may be absent: it came later than YAMLs of users, and runs that go on.
    """
    known = {field.name for field in fields(cls) if field.init}
    later = {field.name for field in fields(cls) if not (field.default is field.default_factory is MISSING)}
    dotted = f"{path}." if path else ""
    for key in values:
        if key not in known:
            raise ValueError(f"{dotted}{key} is not a key of {path or 'a run'}{suggest(str(key), known)}")
    absent = sorted(known - later - set(values))
    if absent:
        raise ValueError(f"{dotted}{absent[0]} must be given; add it to the YAML of {path or 'the run'}")
    hints = get_type_hints(cls)
    return cls(**{key: _checked(value, hints[key], f"{dotted}{key}") for key, value in values.items()})


def _checked(value: Any, hint: Any, path: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    if isinstance(value, float) and not math.isfinite(value) and not (value > 0 and path in UNLIMITED):
        raise ValueError(f"{path} must be a finite number, got {value}")
    try:
        text = json.dumps(value)
    except TypeError:  # already an instance that _build made
        return value
    try:
        return TypeAdapter(hint).validate_json(text, strict=True)
    except ValidationError as error:
        found = [each["msg"] for each in error.errors() if len(each["loc"]) < 2]
        raise ValueError(f"{path} must be {rule(found or [error.errors()[0]['msg']], value)}") from error
