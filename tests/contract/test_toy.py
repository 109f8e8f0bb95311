"""The contracts themselves: a method of one .py and one .yaml elsewhere is held to them, and a broken one fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

TOY = Path(__file__).parents[1] / "plugin"
"""A package with the toy method `loudness`."""

BROKEN = '''
"""The toy, broken in one way each."""

from dataclasses import dataclass

import torch
from torch import nn

from dsft.methods.branches import grow
from dsft.methods.native import Native
from dsft_loudness.loudness import Loud, Loudness


def over(model, around):
    for linear in [module for module in model.modules() if isinstance(module, Loud)]:
        grow(linear, around)


class Straying(nn.Module):
    def forward(self, x):
        if self.training:
            self.weight.data[0, 0] += 0.1
        return super().forward(x)


class Counting(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x) * (1 + 0.01 * self.calls)


class Leaking(nn.Module):
    def forward(self, x):
        y = super().forward(x)
        return y + 0.01 * y.mean(1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Strays(Loudness):
    def add(self, model, anatomy):
        super().add(model, anatomy)
        over(model, Straying)


@dataclass(frozen=True, kw_only=True)
class Counts(Loudness):
    def add(self, model, anatomy):
        super().add(model, anatomy)
        over(model, Counting)


@dataclass(frozen=True, kw_only=True)
class Leaks(Loudness):
    def add(self, model, anatomy):
        super().add(model, anatomy)
        over(model, Leaking)


@dataclass(frozen=True, kw_only=True)
class Shouts(Loudness):
    def initial(self, model, name, param, read):
        return torch.full(param.shape, 0.5)


@dataclass(frozen=True, kw_only=True)
class Idles(Loudness):
    def add(self, model, anatomy):
        super().add(model, anatomy)
        model.idle = nn.Parameter(torch.zeros(1, device=next(model.parameters()).device))


@dataclass(frozen=True, kw_only=True)
class Forgets(Loudness):
    def save(self, model, weights, folder, base):
        return super().save(model, dict(list(weights.items())[1:]), folder, base)


@dataclass(frozen=True, kw_only=True)
class Mismerges(Loudness):
    def merge(self, model):
        for linear in [module for module in model.modules() if isinstance(module, Loud)]:
            del linear.loudness
            linear.__class__ = linear.plain
        return model
'''

CAUGHT = {
    "Strays": "test_moves_what_it_declares_and_nothing_else",
    "Idles": "test_moves_what_it_declares_and_nothing_else",
    "Shouts": "test_starts_as_the_base_or_says_that_it_does_not",
    "Counts": "test_gradients_are_the_same_with_recomputation_and_dropout",
    "Leaks": "test_packed_equals_one_example_at_a_time",
    "Forgets": "test_what_is_saved_is_read_back_as_the_model_that_was_trained",
    "Mismerges": "test_merged_it_computes_what_was_trained_or_is_refused",
}
"""What is broken -> the contract that says so. Counts resumes with other bits too: it has state that is not saved."""
RESUMES = "test_resumed_from_a_saved_state_it_ends_with_the_same_bits"


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Test[method] -> passed, of all contract tests of the toy and those that the broken ones should fail."""
    place = tmp_path_factory.mktemp("toy")
    yaml = (TOY / "dsft_loudness" / "conf" / "method" / "loudness.yaml").read_text()
    shutil.copytree(TOY / "dsft_loudness" / "conf", place / "conf")
    (place / "broken.py").write_text(BROKEN)
    for kind in CAUGHT:
        text = yaml.replace("dsft_loudness.loudness.Loudness", f"broken.{kind}")
        (place / "conf" / "method" / f"{kind}.yaml").write_text(text)
    broken = [f"({kind} and {test})" for kind, test in [*CAUGHT.items(), ("Counts", RESUMES)]]
    chosen = " or ".join(["loudness", "focal", *broken])
    path = os.pathsep.join([str(TOY), str(place), os.environ.get("PYTHONPATH", "")])
    report = place / "report.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-k", chosen,
         *(f"tests/contract/test_{part}.py" for part in ("conf", "methods", "objectives", "results"))],
        cwd=TOY.parents[1], env={**os.environ, "DSFT_CONFIG_DIR": str(place / "conf"), "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {case.attrib["name"]: len(case) == 0 for case in cases}


def test_a_method_of_one_py_and_one_yaml_is_held_to_every_contract(verdicts: dict[str, bool]) -> None:
    held = {name: passed for name, passed in verdicts.items() if "loudness" in name}
    assert {name.partition("[")[0] for name in held} == {
        "test_composes_and_builds", "test_keys_are_the_fields_of_its_class", RESUMES,
        "test_a_reference_is_the_policy_at_the_start", *CAUGHT.values(),
    }  # fmt: skip
    assert all(held.values()), held


def test_an_objective_of_one_py_and_one_yaml_is_held_to_its_contract(verdicts: dict[str, bool]) -> None:
    held = {name: passed for name, passed in verdicts.items() if "[focal]" in name}
    assert {name.partition("[")[0] for name in held} == {
        "test_micro_batches_and_silence_change_nothing", "test_an_evaluation_divides_as_a_step_does",
        "test_its_yaml_says_when_to_choose_it",
    }  # fmt: skip
    assert all(held.values()), held


@pytest.mark.parametrize("kind", CAUGHT)
def test_a_broken_method_fails_the_contract_that_it_breaks(verdicts: dict[str, bool], kind: str) -> None:
    assert verdicts[f"{CAUGHT[kind]}[{kind}]"] is False


def test_state_that_is_not_saved_fails_the_contract_of_resuming(verdicts: dict[str, bool]) -> None:
    assert verdicts[f"{RESUMES}[Counts]"] is False
