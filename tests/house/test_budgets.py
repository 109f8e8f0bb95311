"""Sizes, names and small habits: what keeps a file readable."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("dsft", "launchers")
ALL = (*SHIPPED, "tests", "benchmarks")

FILE_LINES, FUNCTION_LINES, ARGUMENTS = 300, 50, 6
FILE_BUDGETS = {"dsft/engine/step.py": 80, "dsft/engine/loop.py": 160}
"""Raised only by a commit that says why."""

BAD_NAMES = re.compile(r"(^|_)(utils?|helpers?|common|base|misc|managers?|handlers?)(_|$)")
CONFIG_NAMES = {"cfg", "config", "conf", "node", "options", "run", "settings"}
ISSUE = re.compile("TO" + r"DO\(#\d+\)")
MARKERS = re.compile("TO" + "DO|FIX" + "ME|XX" + "X")  # split, or this line would be found


def python_files(root: Path, folders: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path


def long_files(root: Path) -> list[str]:
    found = []
    for place, path in python_files(root, ALL):
        lines, budget = len(path.read_text().splitlines()), FILE_BUDGETS.get(place, FILE_LINES)
        if lines > budget:
            found.append(f"{place} has {lines} lines; {budget} at most")
    return found


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def long_functions(root: Path) -> list[str]:
    found = []
    for place, path in python_files(root, SHIPPED):
        for function in functions(path):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > FUNCTION_LINES:
                found.append(f"{place}:{function.lineno} {function.name} has {lines} lines; {FUNCTION_LINES} at most")
    return found


def many_arguments(root: Path) -> list[str]:
    found = []
    for place, path in python_files(root, SHIPPED):
        for function in functions(path):
            names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args)]
            if len([name for name in names if name not in ("self", "cls")]) > ARGUMENTS:
                found.append(f"{place}:{function.lineno} {function.name} takes {len(names)} positional arguments")
    return found


def vague_names(root: Path) -> list[str]:
    return [f"{place} says nothing by its name" for place, path in python_files(root, ALL) if _is_vague(place)]


def _is_vague(place: str) -> bool:
    return any(BAD_NAMES.search(part.removesuffix(".py")) for part in place.split("/"))


def soft_configs(root: Path) -> list[str]:
    """Defaults in Python for what the YAML tree decides: config.get(key, default), getattr(config, key, default)."""
    found = []
    for place, path in python_files(root, ("dsft",)):
        if place.startswith("dsft/models/"):
            continue  # there, a config is the base model's own config.json
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _reads_with_default(node):
                found.append(f"{place}:{node.lineno} {ast.unparse(node)}: the default belongs into the YAML")
    return found


def _reads_with_default(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute) and call.func.attr == "get" and len(call.args) + len(call.keywords) == 2:
        subject = call.func.value
    elif isinstance(call.func, ast.Name) and call.func.id == "getattr" and len(call.args) == 3:
        subject = call.args[0]
    else:
        return False
    parts = re.findall(r"[a-z]+", ast.unparse(subject).lower()) or [""]
    return parts[-1] in CONFIG_NAMES or parts[0] in CONFIG_NAMES


def open_ends(root: Path) -> list[str]:
    found = []
    for place, path in python_files(root, ALL):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if MARKERS.search(ISSUE.sub("", line)):
                found.append(f"{place}:{number} an open end without an issue: {line.strip()}")
    return found


def not_ascii(root: Path) -> list[str]:
    return [f"{place} is not ASCII" for place, path in python_files(root, ALL) if not path.read_bytes().isascii()]


CHECKS = [long_files, long_functions, many_arguments, vague_names, soft_configs, open_ends, not_ascii]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_its_budgets(check) -> None:
    assert check(ROOT) == []


PLANTED = [
    (long_files, "dsft/data/rows.py", "x = 1\n" * 301),
    (long_files, "dsft/engine/step.py", "x = 1\n" * 81),
    (long_files, "dsft/engine/loop.py", "x = 1\n" * 161),
    (long_functions, "dsft/data/rows.py", "def f():\n" + "    x = 1\n" * 50),
    (many_arguments, "dsft/data/rows.py", "def f(a, b, c, d, e, g, h): ..."),
    (vague_names, "dsft/data/text_utils.py", ""),
    (vague_names, "tests/helpers.py", ""),
    (vague_names, "dsft/common/rows.py", ""),
    (soft_configs, "dsft/engine/loop.py", "x = config.get('steps', 10)"),
    (soft_configs, "dsft/engine/loop.py", "x = run.train.get('steps', 10)"),
    (soft_configs, "dsft/engine/loop.py", "x = getattr(self.config, 'steps', 10)"),
    (open_ends, "dsft/data/rows.py", "x = 1  # TO" + "DO: later"),
    (not_ascii, "dsft/data/rows.py", "x = '\u00fc'"),
]


@pytest.mark.parametrize(("check", "place", "text"), PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, check, place: str, text: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(text, encoding="utf-8")
    assert len(check(tmp_path)) == 1


def test_good_code_is_let_through(tmp_path: Path) -> None:
    text = "def f(a, b, c, d, e, g, *, h): ...\nx = counts.get('a', 0)\ny = config['a']\n# TO" + "DO(#12) x\n"
    (tmp_path / "dsft").mkdir()
    (tmp_path / "dsft/rows.py").write_text(text)
    assert [check(tmp_path) for check in CHECKS] == [[]] * len(CHECKS)
