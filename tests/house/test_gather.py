"""Ranks send each other data: no exception goes into a gather, and none of ours has an __init__ of its own.

An exception whose __init__ takes other arguments than its message can be sent and not be received: the run ends in the
TypeError of a rank that had no fault. World.gather refuses exceptions when it runs; this finds them before.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("dsft", "launchers")


def sources(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for folder in SHIPPED:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), ast.parse(path.read_text())


def own_inits(root: Path) -> list[str]:
    """Exception classes that cannot be received, as pickle makes them anew from their args alone."""
    classes = [(place, node) for place, tree in sources(root) for node in ast.walk(tree) if _is_class(node)]
    errors = {"BaseException"}
    while more := {node.name for _, node in classes if node.name not in errors and _bases(node, errors)}:
        errors |= more
    return [
        f"{place}:{each.lineno} {node.name} is an exception with an {each.name} of its own"
        for place, node in classes if node.name in errors
        for each in node.body if isinstance(each, ast.FunctionDef) and each.name in ("__init__", "__new__")
    ]  # fmt: skip


def _is_class(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef)


def _bases(node: ast.ClassDef, errors: set[str]) -> bool:
    names = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
    return any(name in errors or name.endswith(("Error", "Exception")) for name in names)


def gathered_errors(root: Path) -> list[str]:
    """Places where a name that an except clause bound, or one that was set to it, goes into a gather as it is."""
    found = []
    for place, tree in sources(root):
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                errors = _errors(function)
                for call in ast.walk(function):
                    if _is_gather(call) and (sent := errors & set(_sent(call.args[0]))):
                        found.append(f"{place}:{call.lineno} gathers {', '.join(sorted(sent))}, an exception")
    return found


def _is_gather(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "gather"


def _errors(function: ast.FunctionDef) -> set[str]:
    """Names in a function that may stand for an exception that it caught."""
    errors = {node.name for node in ast.walk(function) if isinstance(node, ast.ExceptHandler) and node.name}
    for _ in range(2):
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and errors & set(_sent(node.value)):
                names = [name for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
                errors |= {name.id for name in names}
    return errors


def _sent(value: ast.AST) -> Iterator[str]:
    """Names whose objects are in the value of an expression: not those of which only an attribute or text is taken."""
    if isinstance(value, ast.Name):
        yield value.id
    elif isinstance(value, ast.Call) and ast.unparse(value.func).endswith(".with_traceback"):
        yield from _sent(value.func.value)
    elif isinstance(value, ast.Tuple | ast.List | ast.Dict | ast.IfExp | ast.BoolOp | ast.Set):
        for part in ast.iter_child_nodes(value):
            yield from _sent(part)


CHECKS = [own_inits, gathered_errors]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_ranks_send_each_other_data(check) -> None:
    assert check(ROOT) == []


PLANTED = [
    (own_inits, "class DamagedError(Exception):\n    def __init__(self, file, why):\n        self.file = file\n"),
    (own_inits, "class A(ValueError): ...\nclass B(A):\n    def __init__(self, file): ...\n"),
    (own_inits, "import errno\nclass Odd(errno.Exception):\n    def __new__(cls, file): ...\n"),
    (gathered_errors, "def f(world):\n try: g()\n except E as error:\n  bad = error\n world.gather((1, bad))\n"),
    (
        gathered_errors,
        "def f(world):\n try: g()\n except E as error:\n  bad = error.with_traceback(None)\n world.gather(bad)\n",
    ),
    (gathered_errors, "def f(w):\n a = None\n try: g()\n except E as e:\n  a = e\n b = [a]\n w.gather(b)\n"),
]


@pytest.mark.parametrize(("check", "text"), PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, check, text: str) -> None:
    (tmp_path / "dsft").mkdir()
    (tmp_path / "dsft/rows.py").write_text(text)
    assert len(check(tmp_path)) == 1


def test_words_of_an_error_are_let_through(tmp_path: Path) -> None:
    text = "class A(Exception):\n    @property\n    def damage(self): ...\n"
    text += "class Plain:\n    def __init__(self, a): ...\n"
    text += "def f(world):\n try: g()\n except E as error:\n  bad, why = str(error), error.damage\n"
    text += " world.gather((bad, why))\n"
    (tmp_path / "dsft").mkdir()
    (tmp_path / "dsft/rows.py").write_text(text)
    assert [check(tmp_path) for check in CHECKS] == [[], []]
