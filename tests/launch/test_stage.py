"""What a run needs of the network is fetched once, by dsft.stage; a job looks for it where that put it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsft.models.tiny import Tiny
from tests.launch.hub import served
from tests.launch.processes import steps

NOWHERE = "http://127.0.0.1:9"


def python(module: str, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)


@pytest.fixture
def caches(tmp_path: Path) -> dict[str, str]:
    """Empty ones, and no hub."""
    return {"HF_HOME": str(tmp_path / "hf"), "DSFT_CACHE": str(tmp_path / "dsft"), "HF_ENDPOINT": NOWHERE}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import yaml

    keys = yaml.safe_load((Path(__file__).parents[2] / "conf/model/tiny.yaml").read_text())
    del keys["_target_"]
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(str(Tiny(**keys).resolve().folder), folder, ignore=shutil.ignore_patterns("sealed.json"))
    return folder


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_what_is_staged_once_is_all_that_a_run_without_a_network_needs(
    model: Path, rows: Path, caches: dict[str, str], tmp_path: Path
) -> None:
    data = tmp_path / "rows"
    data.mkdir()
    shutil.copy(rows, data / "train.jsonl")
    words = ["model=custom", "model.path=org/tiny", "data=hf", "data.path=org/rows", "tracker=[]", "train.steps=2"]
    with served({"org/tiny": model, "datasets/org/rows": data}) as (address, asked):
        first = python("dsft.stage", *words, **{**caches, "HF_ENDPOINT": address})
        assert (first.returncode, first.stderr) == (0, "")
        assert any("model.safetensors" in path for path in asked)
        asked.clear()
        second = python("dsft.stage", *words, **{**caches, "HF_ENDPOINT": address})
        assert not any("model.safetensors" in path or "train.jsonl" in path for path in asked)
    lines = first.stdout.splitlines()
    assert lines[0].startswith(
        f"model        new: {size(model):,} bytes in 6 files, {tmp_path}/hf/hub/models--org--tiny/"
    )
    assert [line.split()[0] for line in lines] == ["model", "data", "data", "tokens", "digest", "staged"]
    again = second.stdout.splitlines()
    assert (second.returncode, second.stderr) == (0, "")
    assert [line.split(":")[0] for line in again[:3]] == [
        f"{what:<12} nothing new" for what in ("model", "data", "tokens")
    ]
    assert again[4] == "staged       nothing was fetched, all was there"
    tokens = snapshot(tmp_path / "dsft" / "tokens")
    ran = python("dsft.run", *words, "launcher=local", f"run_dir={tmp_path / 'run'}", HF_HUB_OFFLINE="1", **caches)
    assert ran.returncode == 0, ran.stderr
    assert steps(tmp_path / "run") == [1, 2]
    assert snapshot(tmp_path / "dsft" / "tokens") == tokens


def test_what_a_user_has_in_a_folder_is_not_called_fetched(model: Path, rows: Path, caches: dict[str, str]) -> None:
    done = python("dsft.stage", "model=custom", f"model.path={model}", "data=local", f"data.path={rows}", **caches)
    assert done.stdout.startswith(
        f"model        nothing new: {size(model):,} bytes in {model}\ndata         nothing new\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "method.rank=4,8"], "dsft.stage takes overrides only, got -m"),
        (["data.path=none.jsonl"], "none.jsonl"),
        (["model=custom", "model.path=org/absent"], "model.path=org/absent is no local folder and the hub did not"),
        (["model=tny"], "did you mean tiny?"),
    ],
)
def test_what_cannot_be_staged_is_refused_in_one_line(
    words: list[str], said: str, rows: Path, caches: dict[str, str]
) -> None:
    done = python("dsft.stage", "model=tiny", "data=local", f"data.path={rows}", *words, **caches)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["model", "weights", "tokenizer", "data"])
def test_what_is_not_staged_is_refused_before_there_is_a_job(
    missing: str, model: Path, rows: Path, caches: dict[str, str], tmp_path: Path
) -> None:
    words = {
        "model": ["model=custom", "model.path=org/tiny", "data=local", f"data.path={rows}"],
        "tokenizer": ["model=llama8b", "model.init=random", "data=local", f"data.path={rows}"],
        "data": ["model=tiny", "data=hf", "data.path=org/rows"],
    }
    if missing == "weights":  # another program fetched what it needed of the model
        part = tmp_path / "hf" / "hub" / "models--org--tiny"
        shutil.copytree(model, part / "snapshots" / "c", ignore=shutil.ignore_patterns("*.safetensors"))
        (part / "refs").mkdir()
        (part / "refs" / "main").write_text("c")
    typed = words["model" if missing == "weights" else missing]
    more = ("launcher=slurm", "launcher.dry_run=true", "tracker=[]", f"run_dir={tmp_path / 'run'}")
    with served({}) as (address, asked):
        done = python("tests.launch.submission", *typed, *more, **{**caches, "HF_ENDPOINT": address})
        assert asked == []
    refused, unchecked = done.stderr.splitlines()
    assert "stage it first, where there is a network: python -m dsft.stage with the same overrides" in refused
    assert unchecked.startswith("dsft: not checked, as it is not on this machine: ")
    assert ("the data" if missing == "data" else "the model's weights and tokenizer") in unchecked
    assert ("the model's shape" in unchecked) is (missing == "model")
    assert done.returncode == 0  # the script alone needs nothing of it
    assert done.stdout.startswith("#!/bin/bash")
    assert not (tmp_path / "run").exists()


def test_a_job_asks_no_hub_unless_the_user_says_so(rows: Path, tmp_path: Path) -> None:
    asked = {
        "nothing": ({}, [], "1 1 1"),
        "environment": ({"HF_HUB_OFFLINE": "0"}, [], "0 0 0"),
        "one of them": ({"HF_DATASETS_OFFLINE": "0"}, [], "1 0 1"),
        "setup": ({}, ["launcher.setup=['export HF_HUB_OFFLINE=0']"], "0 0 0"),
    }
    for name, (env, words, expected) in asked.items():
        more = ("model=tiny", "data=local", f"data.path={rows}", "tracker=[]", f"run_dir={tmp_path / 'run'}")
        done = python("dsft.run", *more, "launcher=slurm", "launcher.dry_run=true", *words, **env)
        assert done.returncode == 0, done.stderr
        script = done.stdout[done.stdout.index("#!/bin/bash") :].splitlines()
        lines = [*script[: next(n for n, line in enumerate(script) if line.startswith("exec "))]]
        lines.append("echo $HF_HUB_OFFLINE $HF_DATASETS_OFFLINE $TRANSFORMERS_OFFLINE")
        said = subprocess.run(
            ["bash"], input="\n".join(lines), capture_output=True, text=True, env={**os.environ, **env}, check=True
        )
        assert said.stdout.split("\n")[0] == expected, name
