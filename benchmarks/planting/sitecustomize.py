"""Plants what the variable DSFT_PLANTS says while the interpreter starts; then the user's own sitecustomize runs."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def _run(name: str, spec: "importlib.machinery.ModuleSpec | None") -> object:
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_plants = _run("_dsft_plants", importlib.util.spec_from_file_location("_dsft_plants", HERE.parent / "plants.py"))
_plants.arm()  # type: ignore[attr-defined]
_others = [path for path in sys.path if Path(path or ".").resolve() != HERE]
_run("sitecustomize", importlib.machinery.PathFinder.find_spec("sitecustomize", _others))
