"""What is for a run's user alone: secrets of the environment, data and models that not everybody may read, folders."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsft_launchers.files import readable_by_all

SECRET = re.compile(
    r"KEY(?!BOARD|WORD)|TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|(?:^|_)(?:PASS|PAT|AUTH|CREDS?)(?:_|$)",
    re.IGNORECASE,
)
"""Names of variables whose values are nobody else's."""

FILES = ("path", "eval_path", "init_from")
"""Names of keys whose value may be a file or folder of this machine."""


class SecretError(ValueError):
    """A value of the configuration is to be taken from a secret of the environment."""


def not_secret(name: str) -> str:
    """Return the name of a variable of the environment. Raises SecretError for one of a secret: values are stored."""
    if SECRET.search(name):
        raise SecretError(
            f"must hold no secret, got ${{oc.env:{name}}}, whose value would stand in the run folder; leave it in the "
            "environment, where libraries read it, or give a variable that is no secret a name without KEY, TOKEN, "
            "SECRET, PASS, PASSWORD, PAT, AUTH and CREDENTIAL"
        )
    return name


def private_input(tree: Mapping[str, Any]) -> str | None:
    """Return the first key=path of a resolved tree that not every user may read; None if there is none.

    What has a hub id is everybody's.
    """
    for key, path in _files(tree, ""):
        if not readable_by_all(Path(path)):
            return f"{key}={path}"
    return None


def _files(node: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _files(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, str) and key.rpartition(".")[2] in FILES and os.path.exists(node):
        yield key, node


def for_trackers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved tree as trackers get it: without the launcher's keys, and files without their folders."""
    return {key: _without_folders(value, key) for key, value in tree.items() if key != "launcher"}


def _without_folders(node: Any, key: str) -> Any:
    if isinstance(node, Mapping):
        return {name: _without_folders(value, str(name)) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_without_folders(value, key) for value in node]
    if not isinstance(node, str):
        return node
    local = node.startswith(("/", "~", "./", "../")) or ((key in FILES or key == "run_dir") and os.path.exists(node))
    return os.path.basename(node.rstrip("/")) or node if local else node
