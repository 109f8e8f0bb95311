"""The command that goes on with a run, as it is printed: a shell and Hydra read it back as the same run."""

import os
import shlex
from pathlib import Path

import pytest

from dsft.again import command_of
from dsft.compose import compose, dump_yaml
from dsft.engine.progress import STOPPED, Progress
from dsft.flags import hydra_flags
from dsft.recorder import closing


@pytest.fixture(autouse=True)
def _without_a_config_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSFT_CONFIG_DIR", raising=False)


def typed(run_dir: Path, *words: str, started: str = "local") -> str:
    """The command for a run folder of these words."""
    run_dir.mkdir(parents=True)
    (run_dir / "overrides.yaml").write_text(dump_yaml(list(words)))
    (run_dir / "provenance.json").write_text(f'{{"started": "{started}"}}')
    return command_of(run_dir)


@pytest.mark.parametrize("name", ["run", "it's a run=1", "${x}"])
def test_it_leads_to_the_folder_that_the_run_is_in(name: str, tmp_path: Path) -> None:
    words = ("model=tiny", "data=local", "data.path='a b.jsonl'", "method.target_modules=[q_proj,v_proj]")
    command = shlex.split(typed(tmp_path / name, *words))
    assert command[:3] == ["python", "-m", "dsft.run"]
    assert command[3:-1] == list(words)
    run = compose(command[3:]).run
    assert (run.run_dir, run.data.path) == (str(tmp_path / name), "a b.jsonl")


@pytest.mark.parametrize("content", [None, "["])
def test_what_was_typed_and_is_lost_is_dots(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "overrides.yaml").write_text(content)
    assert command_of(tmp_path) == f"python -m dsft.run ... run_dir={tmp_path}"


@pytest.mark.parametrize(
    "word", ["run_dir=runs/a", "run_dir=out/${now:%H%M%S}", "+run_dir=a", "launcher.max_parallel=2"]
)
def test_the_folder_itself_stands_in_the_place_of_a_run_dir_that_was_typed(word: str, tmp_path: Path) -> None:
    assert typed(tmp_path / "run", word, "model=tiny") == f"python -m dsft.run model=tiny run_dir={tmp_path}/run"


def test_a_folder_of_own_options_and_what_started_the_processes_are_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSFT_CONFIG_DIR", str(tmp_path))
    command = typed(tmp_path / "run", "model=tiny", started="torchrun")
    assert command == f"torchrun ... -m dsft.run --config-dir {tmp_path} model=tiny run_dir={tmp_path}/run"
    assert hydra_flags(shlex.split(command)[4:])[1] == ["model=tiny", f"run_dir={tmp_path}/run"]
    assert os.environ["DSFT_CONFIG_DIR"] == str(tmp_path)


@pytest.mark.parametrize(("saved", "line"), [(4, "saved; this goes on from step 4:"), (0, "begins again at step 1:")])
def test_a_run_that_is_stopped_says_it(saved: int, line: str, tmp_path: Path) -> None:
    command = typed(tmp_path / "run", "model=tiny")
    at = Progress(total=9, step=4, state=STOPPED, reason="SIGTERM")
    said = "\n".join(closing(tmp_path / "run", None, at, saved))  # type: ignore[arg-type]
    assert line in said
    assert said.endswith(f"\n  {command}")
