"""Imports point down, sisters do not know each other, nothing goes round, a back end has one importer.

Read from the syntax tree, so imports inside functions count; only `if TYPE_CHECKING:` is exempt.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LEAVES = ("models", "quantizers", "strategies", "methods", "objectives", "data", "telemetry", "checkpoint")
VERBS = (
    "run", "preflight", "dispatch", "ending", "job", "plan", "stage", "export", "verify", "adapters", "chat", "report",
    "sweep", "sweeps",
)  # fmt: skip

FLOORS = (
    ("config", "imports", "offline", "synonyms", "cache", "first", "installed", "owners", "searched", "locate"),
    ("comm",),
    ("course", "grouped", "moved"),
    ("protocols", "objective", "headed", "packed"),
    ("strategy",),
    LEAVES,
    ("engine",),
    ("rules", "repairs", "idle", "options", "proven", "wording", "entry", "examined"),
    ("paths", "privacy"),
    ("spelling", "building", "flags", "yaml_files"),
    ("compose",),
    (
        "folder",
        "basis",
        "again",
        "origin",
        "door",
        "likeness",
        "earlier",
        "published",
        "recorder",
        "snapshot",
        "learned",
        "loaded",
        "compared",
        "results",
    ),
    VERBS,
    ("__main__",),
)
"""From the ground up: a package or module below dsft/ may import from lower floors only.

Verbs may use each other (run plans before it runs); leaves may not.
"""

IMPORTERS = {
    "hydra": ("dsft/compose.py", "launchers/hydra_plugins/"),
    "omegaconf": ("dsft/compose.py", "dsft/yaml_files.py", "launchers/hydra_plugins/"),
    "bitsandbytes": ("dsft/quantizers/", "dsft/engine/optimizers.py"),
    "deepspeed": ("dsft/strategies/zero",),
    "wandb": ("dsft/telemetry/",),
    "tensorboard": ("dsft/telemetry/",),
    "torchao": ("dsft/methods/grid.py",),
    "peft": ("dsft/methods/", "dsft/export.py", "dsft/verify.py"),
    "submitit": ("launchers/dsft_launchers/submit.py",),
}
"""A back end -> the only files (or beginnings of paths) that may import it."""

FORBIDDEN = {
    "launchers/dsft_launchers/": ("torch", "transformers", "dsft", "hydra", "omegaconf"),
    "dsft/config.py": ("torch",),
    "dsft/engine/": ("dsft.methods", "dsft.objectives", "dsft.quantizers"),
}
"""A part of the project -> what it never imports."""


def modules(root: Path) -> dict[str, Path]:
    """Name -> file of every module of dsft."""
    found = {}
    for path in sorted((root / "dsft").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, module: str = "") -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, late and by name included."""
    for node in _run_time(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(module.split(".")[: -node.level]) if node.level else ""
            source = ".".join(filter(None, (package, node.module)))
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            constants = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            yield from ((node.lineno, str(value)) for value in constants)


def _run_time(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from _run_time(node)


def edges(root: Path) -> Iterator[tuple[str, int, str]]:
    """(module, line, imported module) within dsft."""
    known = modules(root)
    for module, path in known.items():
        anchor = f"{module}.__init__" if path.name == "__init__.py" else module
        for line, name in imports(path, anchor):
            target = name if name in known else name.rpartition(".")[0]
            if target in known and target not in ("dsft", module):
                yield module, line, target


def unplaced(root: Path) -> list[str]:
    placed = {name for floor in FLOORS for name in floor}
    return sorted({f"dsft/{part(name)} is on no floor" for name in modules(root) if part(name) not in placed | {""}})


def part(module: str) -> str:
    """methods for dsft.methods.freeze."""
    return [*module.split("."), ""][1]


def wrong_arrows(root: Path) -> list[str]:
    level = {name: height for height, floor in enumerate(FLOORS) for name in floor}
    found = []
    for module, line, target in edges(root):
        source, goal = part(module), part(target)
        if source == goal or source not in level or goal not in level:
            continue
        if level[goal] > level[source]:
            found.append(f"{module}:{line} imports up to {target}")
        elif source in LEAVES and goal in LEAVES:
            found.append(f"{module}:{line} imports its sister {target}")
    return found


def cycles(root: Path) -> list[str]:
    """One line per strongly connected set of modules, found by removing whatever nothing leads to or from."""
    graph: dict[str, set[str]] = {name: set() for name in modules(root)}
    for module, _, target in edges(root):
        graph[module].add(target)
    while True:
        reached = {target for targets in graph.values() for target in targets}
        loose = {name for name, targets in graph.items() if not targets or name not in reached}
        if not loose:
            break
        graph = {name: targets - loose for name, targets in graph.items() if name not in loose}
    return [f"import cycle among: {', '.join(sorted(graph))}"] if graph else []


def stray_importers(root: Path) -> list[str]:
    found = []
    for folder in ("dsft", "launchers"):
        for path in sorted((root / folder).rglob("*.py")):
            place = path.relative_to(root).as_posix()
            for line, name in imports(path):
                top = name.split(".")[0]
                if top in IMPORTERS and not place.startswith(IMPORTERS[top] or "\0"):
                    found.append(f"{place}:{line} imports {top}; only {IMPORTERS[top] or 'nobody'} may")
    return found


def forbidden_imports(root: Path) -> list[str]:
    found = []
    for folder in ("dsft", "launchers"):
        for path in sorted((root / folder).rglob("*.py")):
            place = path.relative_to(root).as_posix()
            banned = [name for start, names in FORBIDDEN.items() if place.startswith(start) for name in names]
            for line, name in imports(path):
                found += [f"{place}:{line} imports {b}" for b in banned if name == b or name.startswith(f"{b}.")]
    return found


CHECKS = [unplaced, wrong_arrows, cycles, stray_importers, forbidden_imports]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_its_arrows(check) -> None:
    assert check(ROOT) == []


PLANTED = [
    (unplaced, {"dsft/misc_things.py": ""}, "misc_things"),
    (wrong_arrows, {"dsft/models/a.py": "from dsft.engine import loop", "dsft/engine/loop.py": ""}, "up to"),
    (wrong_arrows, {"dsft/models/a.py": "def f():\n    import dsft.data.b", "dsft/data/b.py": ""}, "its sister"),
    (wrong_arrows, {"dsft/models/a.py": "from ..engine import loop", "dsft/engine/loop.py": ""}, "up to"),
    (
        cycles,
        {"dsft/data/a.py": "import dsft.data.b", "dsft/data/b.py": "def f():\n  from dsft.data import a"},
        "cycle",
    ),
    (stray_importers, {"dsft/engine/loop.py": "def f():\n    import wandb"}, "wandb"),
    (stray_importers, {"dsft/run.py": "from omegaconf import OmegaConf"}, "omegaconf"),
    (stray_importers, {"dsft/data/a.py": "import importlib\nimportlib.import_module('deepspeed.ops')"}, "deepspeed"),
    (stray_importers, {"dsft/strategies/fsdp.py": "import bitsandbytes as bnb"}, "bitsandbytes"),
    (forbidden_imports, {"launchers/dsft_launchers/local.py": "import torch.distributed"}, "torch"),
    (forbidden_imports, {"dsft/engine/step.py": "from dsft.methods.lora import Lora"}, "dsft.methods"),
]


@pytest.mark.parametrize(("check", "files", "message"), PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, check, files: dict[str, str], message: str) -> None:
    for name, text in {**files, "dsft/__init__.py": "", "dsft/engine/__init__.py": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = check(tmp_path)
    assert len(found) == 1
    assert message in found[0]


def test_what_only_the_type_checker_sees_is_no_arrow(tmp_path: Path) -> None:
    (tmp_path / "dsft").mkdir()
    (tmp_path / "dsft/config.py").write_text("if TYPE_CHECKING:\n    from dsft import run\n")
    (tmp_path / "dsft/run.py").write_text("from dsft import config\n")
    assert [check(tmp_path) for check in CHECKS] == [[]] * len(CHECKS)
