"""An extra of pyproject.toml names only what the code imports, and the README names every extra."""

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("dsft", "launchers", "benchmarks")
TOOLS = "dev"
"""The extra that is for working on the project: no product code imports pytest or ruff."""
ASKS = ("import_module", "find_spec")


def extras(root: Path) -> Mapping[str, Sequence[str]]:
    """Extra -> the modules of its packages."""
    found: Mapping[str, Sequence[str]] = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    return {
        extra: [re.match(r"[\w.-]+", each)[0].replace("-", "_") for each in packages]  # type: ignore[index]
        for extra, packages in found.items()
    }


def imported(root: Path) -> set[str]:
    """Top modules that a statement or importlib imports, or asks for."""
    files = (path for folder in SOURCES for path in sorted((root / folder).rglob("*.py")))
    return {name.partition(".")[0] for path in files for name in _names(ast.parse(path.read_text()))}


def _names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ASKS and isinstance(node.args[0].value, str):
                yield node.args[0].value


def unused(root: Path) -> list[str]:
    """Extra and module, for each that nothing imports."""
    there = imported(root)
    return [
        f"{extra}: {module}"
        for extra, modules in extras(root).items()
        if extra != TOOLS
        for module in modules
        if module not in there
    ]


def untold(root: Path) -> set[str]:
    """Extras that only one of pyproject.toml and the README's table has."""
    table = (root / "README.md").read_text().partition("| extra |")[2].partition("\n\n")[0]
    return set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) ^ set(extras(root))


def test_every_package_of_an_extra_is_imported() -> None:
    assert unused(ROOT) == []


def test_the_readme_names_every_extra() -> None:
    assert untold(ROOT) == set()


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A project with an extra that nothing imports, and one that the README leaves out."""
    (tmp_path / "dsft").mkdir()
    (tmp_path / "dsft" / "one.py").write_text(
        "from flash_stuff.deep import thing\nloader = importlib.import_module('late_one')\nname = 'idle_one'\n"
    )
    (tmp_path / "pyproject.toml").write_text(
        "[project.optional-dependencies]\n"
        "gpu = ['flash-stuff>=2', 'late_one', 'idle-one[x]>=1']\ndev = ['tool']\nnew = ['flash_stuff']\n"
    )
    (tmp_path / "README.md").write_text("| extra | for |\n| --- | --- |\n| `gpu` | x |\n| `dev` | x |\n\n| `new` | |\n")
    return tmp_path


def test_it_sees_what_is_not_imported(planted: Path) -> None:
    assert unused(planted) == ["gpu: idle_one"]


def test_it_sees_what_the_readme_leaves_out(planted: Path) -> None:
    assert untold(planted) == {"new"}
