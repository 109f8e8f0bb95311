"""Random numbers of a model that cannot be drawn per example: inside attention, of a router, for whole layers."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KINDS = {
    "attention": "dropout inside attention",
    "jitter": "noise in a router",
    "layers": "layers that are left out at random",
}
"""What a value asks for."""
KEYED = "dropout"
"""What other values ask for: it can be drawn per example, and is."""


def unkeyed(numbers: Any) -> dict[str, tuple[float, str]]:
    """Name -> (value above 0, what it asks for) of all that numbers, a configuration or a mapping, asks for.

    A name of an inner configuration is written behind its own, with a dot.
    """
    return {".".join(path): (value, kind) for path, value, kind in _found(numbers, ()) if kind != KEYED}


def still(config: "PretrainedConfig") -> None:
    """Set to 0 what unkeyed finds in config."""
    for name in unkeyed(config):
        _set(config, name, 0.0)


def as_published(config: "PretrainedConfig", original: "PretrainedConfig") -> None:
    """Give config the values back that were set to 0 in a copy of original: those of unkeyed, and of any dropout."""
    for path, value, _ in _found(original, ()):
        _set(config, ".".join(path), value)


def told(config: "PretrainedConfig") -> Iterator[str]:
    """One line for each value that still sets to 0, for who runs the model."""
    for name, (value, kind) in unkeyed(config).items():
        yield f"{name}={value:g} of the model is set to 0: {kind} would depend on how examples are packed"


def refuse(numbers: Mapping[str, Any] | None) -> None:
    """Raise ValueError where a user's own numbers of model.config ask for any of it."""
    for name, (value, kind) in unkeyed(numbers or {}).items():
        raise ValueError(
            f"model.config.{name} must be 0, got {value:g}: {kind} would depend on how examples are packed; set it to 0"
        )


def _found(numbers: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float, str]]:
    for key, value in (numbers if isinstance(numbers, Mapping) else vars(numbers)).items():
        if isinstance(value, Mapping) or hasattr(value, "to_dict"):
            yield from _found(value, (*path, str(key)))
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and (kind := _kind(str(key))):
            yield (*path, str(key)), value, kind


def _kind(key: str) -> str | None:
    """What a value of this name asks for, if it is one of KINDS."""
    if "jitter" in key:
        return KINDS["jitter"]
    if "layerdrop" in key or "layer_drop" in key or "drop_path" in key:
        return KINDS["layers"]
    if "drop" in key:
        return KINDS["attention"] if "att" in key else KEYED
    return None


def _set(config: Any, name: str, value: float) -> None:
    *owners, key = name.split(".")
    for owner in owners:
        config = config[owner] if isinstance(config, dict) else getattr(config, owner)
    if isinstance(config, dict):
        config[key] = value
    else:
        setattr(config, key, value)
