"""Every YAML under conf/ composes and builds, found by glob, and its keys are its dataclass's fields."""

import importlib
from dataclasses import fields
from pathlib import Path

import pytest

from dsft.compose import _PLAIN, OWN_CONF, _plain_class, compose, load_yaml
from tests.contract.sessions import FOLDERS

OPTIONS = {path.relative_to(folder): path for folder in reversed(FOLDERS) for path in sorted(folder.glob("*/*.yaml"))}
SOURCE = (
    "{_target_: dsft.data.local.Local, path: rows.jsonl, eval_path: null, format: auto, fields: {}, system: null, "
    "verify: none, eval_fraction: 0.0, shuffle: true, max_eval: null}"
)
NEEDED = {
    "data/local": ["data.path=rows.jsonl"],
    "data/hf": ["data.path=some/set"],
    "data/mixture": [f"data.sources={{a: {SOURCE}}}", "data.weights={a: 1.0}"],
    "model/custom": ["model.path=some/model"],
    "launcher/slurm": ["launcher.dry_run=true"],
}  # fmt: skip
PROCESSES = {"strategy/single": 1}


def _words(option: str) -> list[str]:
    group, name = option.split("/")
    chosen = f"tracker=[{name}]" if group == "tracker" else f"{group}={name}"
    devices = PROCESSES.get(option, 2 if group == "strategy" and name != "auto" else 1)
    extra = ["strategy.shard_size=2"] if option == "strategy/hsdp" else []
    return [chosen, f"launcher.devices={devices}", *extra, *NEEDED.get(option, [])]


@pytest.mark.parametrize("path", OPTIONS, ids=str)
def test_composes_and_builds(path: Path) -> None:
    option = str(path.with_suffix(""))
    run = compose(_words(option)).run
    assert run.train.global_batch_size >= 1


@pytest.mark.parametrize("path", OPTIONS, ids=str)
def test_keys_are_the_fields_of_its_class(path: Path) -> None:
    tree, text = load_yaml(OPTIONS[path]), OPTIONS[path].read_text()
    if tree is None or "@package _global_" in text or (path.parts[0], path.stem) == ("strategy", "auto"):
        return  # sets other groups' keys, which compose checks
    for base in tree.pop("defaults", []):
        tree = {**load_yaml(OPTIONS[path.with_stem(base)]), **tree}
    if path.parts[0] in _PLAIN:
        cls = _plain_class(path.parts[0], tree)
    else:
        module, _, name = tree["_target_"].rpartition(".")
        cls = getattr(importlib.import_module(module), name)
    rate = {"lr"} if path.parts[0] == "method" else set()  # what optim.lr=auto stands for, which every method names
    assert rate <= set(tree)
    assert {key for key in tree if key != "_target_"} - rate == {field.name for field in fields(cls) if field.init}


def test_every_group_has_options() -> None:
    groups = {path.name for path in OWN_CONF.iterdir() if path.is_dir()}
    assert groups == {path.parts[0] for path in OPTIONS}
