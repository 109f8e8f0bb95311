"""Keys whose values are paths: a leading ~ is expanded, and what can be no run folder is refused."""

import os
from collections.abc import Mapping
from typing import Any

from dsft_launchers.shown import in_a_line

PATHS = ("run_dir", "data.path", "data.eval_path", "model.path", "method.init_from")
"""Keys in which a leading ~ or ~user is a home directory, as in a shell."""


def expand(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree whose PATHS have their ~ expanded; one of a user who is not known stays."""
    found = dict(tree)
    for key in PATHS:
        group, _, name = key.rpartition(".")
        node = found.get(group) if group else found
        if isinstance(node, Mapping) and isinstance(value := node.get(name), str):
            changed = {**node, name: os.path.expanduser(value)}
            found = {**found, group: changed} if group else changed
    return found


def check_run_dir(run_dir: object) -> None:
    """Raise ValueError for what names no folder of this machine's file systems."""
    text = "" if run_dir is None else str(run_dir)
    if not text.strip():
        raise ValueError("run_dir must name a folder, got none; leave it out for a new one below runs/")
    if in_a_line(text) != text:
        raise ValueError(f"run_dir must be without control characters, got {text!a}; choose another name")
    if "://" in text:
        raise ValueError(
            f"run_dir must be a folder of a file system, got {text}; take a folder here, and copy what is in it "
            "when the run is done"
        )
