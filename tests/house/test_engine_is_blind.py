"""The engine names no method, objective or quantizer: the options of these groups occur nowhere in its code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GROUPS = ("method", "objective", "quantization")
WORDS_OF_THE_ENGINE = {"none", "full", "prompt"}
"""Options that are also words of gradient checkpointing, of Strategy.full and of generation."""


def options(root: Path) -> set[str]:
    """Names of the options and of their classes, in lower case."""
    names = set()
    for group in GROUPS:
        for path in (root / "conf" / group).rglob("*.yaml"):
            names.add(path.stem.lower())
            names |= {
                target.lower() for target in re.findall(r"^_target_:.*?(\w+)\s*(?:#.*)?$", path.read_text(), re.M)
            }
    return names - WORDS_OF_THE_ENGINE


def words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every identifier and string; docstrings are left out."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [item for item in body if not _is_text(item)]  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "module", "value"):
            text = getattr(node, field, None)
            if isinstance(text, str):
                yield getattr(node, "lineno", 0), text


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def named_options(root: Path) -> list[str]:
    known = options(root)
    found = []
    for path in sorted((root / "dsft/engine").rglob("*.py")):
        for line, text in words(ast.parse(path.read_text())):
            spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower()
            pieces = {text.lower(), *re.split(r"[^a-z0-9]+", spaced)}
            found += [f"{path.name}:{line} names {name} in {text!r}" for name in sorted(known & pieces)]
    return found


def asked_classes(root: Path) -> list[str]:
    """isinstance on a class of an option's kind."""
    found = []
    for path in sorted((root / "dsft/engine").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "type"):
                if re.search(r"\b(run\.)?(method|objective|quantization|quantizer)\b", ast.unparse(node.args[0])):
                    found.append(f"{path.name}:{node.lineno} asks for a class: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("check", [named_options, asked_classes], ids=lambda check: check.__name__)
def test_the_engine_is_blind(check) -> None:
    assert check(ROOT) == []


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (named_options, "if run.method.name == 'lora': pass"),
        (named_options, "is_lora = True"),
        (named_options, "x = PeftLora()"),
        (named_options, "from dsft.objectives import sft"),
        (named_options, "x = model.AdaptWithRanks"),
        (asked_classes, "if isinstance(run.method, Thing): pass"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, check, code: str) -> None:
    plant(tmp_path, code)
    assert check(tmp_path)


@pytest.mark.parametrize("code", ['"""Unlike lora."""', "x = strategy.full(p)", "x = soft", "isinstance(p, DTensor)"])
def test_other_words_are_let_through(tmp_path: Path, code: str) -> None:
    plant(tmp_path, code)
    assert [named_options(tmp_path), asked_classes(tmp_path)] == [[], []]


def plant(root: Path, code: str) -> None:
    for folder in ("conf/method", "conf/objective", "conf/quantization", "dsft/engine"):
        (root / folder).mkdir(parents=True)
    (root / "conf/method/lora.yaml").write_text("_target_: dsft.methods.x.AdaptWithRanks  # ours\n")
    (root / "conf/method/full.yaml").write_text("")
    (root / "conf/objective/sft.yaml").write_text("")
    (root / "dsft/engine/loop.py").write_text(code)
