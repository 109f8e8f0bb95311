"""A method from a package that pip has built and installed: trained, killed, resumed, exported as ours are."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import faults, matrix
from benchmarks.verdicts import verdict
from tests.launch.processes import dsft

SOURCE = Path(__file__).parents[1] / "plugin"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
ALONE = ("--no-deps", "--no-index")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package as pip installs it, from a wheel; nothing else of the environment changes."""
    place = tmp_path_factory.mktemp("plugin")
    shutil.copytree(SOURCE, place / "source")  # the build leaves files beside what it builds
    wheel = [*PIP, "wheel", *ALONE, "--no-build-isolation", "--wheel-dir", place / "wheels", place / "source"]
    subprocess.run(wheel, check=True)
    (built,) = (place / "wheels").glob("*.whl")
    subprocess.run([*PIP, "install", *ALONE, "--target", place / "site", built], check=True)
    return place / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    monkeypatch.syspath_prepend(site)
    return site


def _said(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run_dir(site: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on two ranks, and what is bit-equal to it beside it: one that was killed and went on."""
    place = tmp_path_factory.mktemp("runs")
    words = faults.words(rows, ["method=loudness", "strategy=fsdp"], 2, background=True, steps=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        done = dsft(*words, "checkpoint.verify_result=true", f"run_dir={place / 'reference'}")
        assert done.returncode == 0, done.stderr
        verdict = faults.survive(place / "reference", place / "run", words, 2, 1, random.Random(0))
    assert len(verdict.kills) == 1
    assert verdict.resumed_from
    assert not verdict.different
    return place / "reference"


def test_it_trains_resumes_to_the_bit_and_says_whose_it_is(run_dir: Path) -> None:
    plan, kept = (json.loads((run_dir / f"{name}.json").read_text()) for name in ("plan", "provenance"))
    assert plan["providers"] == {"method": "plugin loudness"}
    assert plan["parameters"]["trainable"] == 21
    assert "optim.lr=auto" not in str(plan["repaired"])
    assert {"group": "method", "option": "loudness", "provider": "plugin loudness"} in kept["choices"]
    assert kept["packages"]["dsft-loudness"] == "1.2.3"
    assert json.loads((run_dir / "adapter" / "verified.json").read_text())["same"] is True
    assert faults.events(run_dir, "start")[0]["versions"]["dsft-loudness"] == "1.2.3"


def test_it_equals_one_process_where_ranks_share_its_tensors(
    installed: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 21 numbers, each a tensor: fewer than fit evenly on ranks, and odd."""
    monkeypatch.setitem(matrix.METHODS, "loudness", ["method=loudness"])
    columns = [column for column in matrix.COLUMNS if column.name in ("fsdp x2", "zero3 x2")]
    row = "tiny loudness none"
    alone = {"adamw": matrix.run_columns((matrix.SINGLE,), rows, methods=("loudness",), only=(row,))["single"]}
    found = matrix.run_columns(columns, rows, methods=("loudness",), only=(row,), alone=alone)
    said = {column.name: verdict(row, found[column.name][row], alone["adamw"][row], column) for column in columns}
    assert {tuple(each) for each in said.values()} == {("off",)}, said


def test_it_exports_as_an_adapter_and_merged(run_dir: Path, installed: Path, tmp_path: Path) -> None:
    from dsft.compose import read
    from dsft.loaded import load

    for what in ("adapter", "merged"):
        done = _said("dsft.export", run_dir, "--to", what, tmp_path / what)
        assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "adapter" / "dsft_adapter.json").read_text())
    assert said["method"] == {"_target_": "dsft_loudness.loudness.Loudness", "roles": ["attention", "mlp"]}
    assert "`pip install dsft` and the package of `dsft_loudness`" in (tmp_path / "adapter" / "README.md").read_text()
    tokens = torch.arange(40)[None] + 60
    with torch.no_grad():
        adapted = load(read(run_dir), tmp_path / "adapter")(input_ids=tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=tokens).logits
    assert float((merged - adapted).abs().max() / adapted.abs().max()) < 1e-5  # fp32, another order of products


def test_where_it_is_not_installed_one_line_says_so(run_dir: Path, rows: Path, tmp_path: Path) -> None:
    words = faults.words(rows, ["method=loudness", "strategy=fsdp"], 2, background=True, steps=40)
    missing = "method._target_ must name an importable class, got dsft_loudness.loudness.Loudness"
    tried = {
        "method=loudness does not exist": (2, dsft(*words, f"run_dir={run_dir}")),
        missing: (2, _said("dsft.export", run_dir, "--to", "adapter", tmp_path / "out")),
        f"dsft: cannot begin: {missing}": (76, _said("dsft.job", run_dir)),
    }
    for line, (code, done) in tried.items():
        assert done.returncode == code, done.stderr
        assert line in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    assert "install the package that has it" in tried[missing][1].stderr
    assert not (tmp_path / "out").exists()


def test_a_name_and_a_value_of_it_are_checked_as_ours_are(installed: Path, tmp_path: Path) -> None:
    run_dir = f"run_dir={tmp_path / 'run'}"
    for words, line in (
        (["method=loudnes"], "method=loudnes does not exist; did you mean loudness?"),
        (
            ["method=loudness", "method.roles=[]"],
            "method.roles must be of attention, mlp, shared_experts, router, other, got []",
        ),
        (["method=loudness", "method.role=[mlp]"], "method.role is not a key; did you mean method.roles?"),
    ):
        done = dsft("model=tiny", *words, run_dir)
        assert done.returncode == 2
        assert line in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_a_config_dir_does_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SOURCE), prepend=os.pathsep)
    folder = SOURCE / "dsft_loudness" / "conf"
    done = _said("dsft.plan", "--config-dir", folder, "model=tiny", "method=loudness", "tracker=[none]", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["providers"] == {"method": "--config-dir"}
    assert "optim.lr=auto: 0.01, as the YAML of the method has it" in json.loads(done.stdout)["repaired"]
