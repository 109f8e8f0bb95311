"""YAML of run folders, written and read again: every ${ in it is text; what OmegaConf resolves holds no secret."""

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsft.privacy import not_secret


def load_yaml(path: Path) -> Any:
    """Return the plain tree that dump_yaml has written; a ${...} without a backslash stays as it is.

    Raises ValueError for anchors, which it never writes: names for parts that hold others make a large tree of few
    bytes.
    """
    from omegaconf import OmegaConf

    text = path.read_text(encoding="utf-8")
    if "&" in text or "*" in text:
        _refuse_anchors(path, text)
    return _each_text(OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False), _unescaped)


def _refuse_anchors(path: Path, text: str) -> None:
    import yaml

    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if getattr(event, "anchor", None) is not None:
            line = event.start_mark.line + 1
            raise ValueError(
                f"{path} must be without anchors and aliases (& and *), got one in line {line}; restore it"
            )


def dump_yaml(tree: Any) -> str:
    """Return a resolved tree as YAML, in which every ${ is text: it is escaped, so that OmegaConf reads it as text."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_each_text(tree, _escaped)))


def _each_text(node: Any, change: Callable[[str], str]) -> Any:
    """Return a plain tree with each of its texts changed; keys stay."""
    if isinstance(node, Mapping):
        return {key: _each_text(value, change) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_each_text(value, change) for value in node]
    return change(node) if isinstance(node, str) else node


def _escaped(text: str) -> str:
    """Backslashes before ${ count twice, and one more takes its meaning from it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _unescaped(text: str) -> str:
    """The inverse: an odd number of backslashes before ${ is half as many before a text."""
    return re.sub(r"(?<!\\)(\\*)\1\\\$\{", r"\1${", text)


def guard_environment() -> None:
    """Have ${oc.env:NAME} refuse the names of secrets, in YAML as in what is typed."""
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    def env(name: str, *default: Any) -> Any:
        return oc.env(not_secret(name), *default)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
