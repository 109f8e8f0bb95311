"""What a verb that reads a run's folder builds of it: model, method, quantization and train, and nothing else.

Data, trackers, objective and strategy are not built. Whether the model's own code may run is the reader's to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft.building import check_names
from dsft.compose import load_yaml, part
from dsft.config import Train
from dsft.locate import Allowed
from dsft.owners import owner_of

PROVENANCE = "provenance.json"
GROUPS = ("model", "method", "quantization", "train")
FLAG = "--trust-remote-code"
"""The flag of a reader that lets the model's own code run."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Those groups of a Run."""

    model: Any
    method: Any
    quantization: Any
    train: Train


def learned(run_dir: Path, *, trust_remote_code: bool) -> Learned:
    """Return what config.yaml of a run's folder says of its result.

    trust_remote_code: the model's own code may run, if the run was made with it. Raises ValueError as check does.
    """
    tree, allowed = check(run_dir, trust_remote_code=trust_remote_code), Allowed(run_dir / "config.yaml")
    return Learned(**{name: part(name, tree[name], allowed) for name in GROUPS})


def check(run_dir: Path, *, trust_remote_code: bool) -> Mapping[str, Any]:
    """Return the tree of config.yaml, if no class in it is of a package that a folder may not name; imports nothing.

    Raises ValueError also where the model's own code is asked for and not trusted, and for a file that is no run's.
    """
    file = run_dir / "config.yaml"
    try:
        tree: Mapping[str, Any] = load_yaml(file)
    except Exception as error:  # YAML's, OmegaConf's, or a file with something else in it
        raise ValueError(f"{file} is damaged ({type(error).__name__}); restore it") from error
    for name in GROUPS:
        if not (isinstance(tree, dict) and isinstance(tree.get(name), Mapping)):
            raise ValueError(f"{file} is damaged: it must have keys below {name}; restore it")
        check_names(tree[name], name, Allowed(file))
    model = tree["model"]
    if model.get("trust_remote_code", False) is not False and not trust_remote_code:
        raise ValueError(
            f"{file} of {owner_of(file)} asks for the model's own code, of {model.get('path')} "
            f"(model.trust_remote_code=true), which runs only where you say so; add {FLAG} if you trust that code"
        )
    if model.get("trust_remote_code", False) is not False and not (run_dir / PROVENANCE).is_file():
        raise ValueError(
            f"{run_dir} must say in {PROVENANCE} which code of its base was trusted, got no such file; put it back"
        )
    return tree
