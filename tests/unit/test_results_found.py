"""A result that is not whole, or whose folder cannot be read, is refused in one line before its base is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsft import folder, published
from dsft.compose import compose
from dsft.results import find

POWERLESS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that left a whole model in two files."""
    words = ["model=tiny", "method=full", "data=reasoning_gym", "launcher=local", "strategy=single", "tracker=[]"]
    plan = {"model": "tiny", "parameters": {"trainable": 1}}
    digests = dict.fromkeys(("base_fingerprint", "base_digest", "data_digest", "tokens_digest"), "d" * 64)
    folder.create(tmp_path, compose(words), plan, digests)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "config.json").write_text("{}")
    (tmp_path / "adapter" / "README.md").write_text("a model")
    for name in ("model-00001.safetensors", "model-00002.safetensors"):
        save_file({name: torch.zeros(9)}, tmp_path / "adapter" / name)
    published.describe(tmp_path / "adapter")
    return tmp_path


def test_a_file_of_a_whole_model_that_is_gone_is_missed(run_dir: Path) -> None:
    assert find([run_dir])[0].whole
    (run_dir / "adapter" / "model-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold its whole result, got .*model-00002\.safetensors missing"):
        find([run_dir])


def test_what_a_person_wrote_into_its_readme_is_no_damage(run_dir: Path) -> None:
    (run_dir / "adapter" / "README.md").write_text("the best model")
    (run_dir / "adapter" / "notes.txt").write_text("of mine")
    assert find([run_dir])[0].run_dir == run_dir


@pytest.mark.parametrize("path", ["n" * 300, "name/" * 880], ids=["a long name", "a long path"])
def test_a_path_that_is_too_long_is_refused_in_one_line(path: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"RUN must be a folder that can be read, got .*: File name too long"
    ) as refused:
        find([tmp_path / path])
    assert len(str(refused.value)) < 1000
    assert "\n" not in str(refused.value)


def test_a_run_below_a_folder_without_rights_is_refused_in_one_line(run_dir: Path, tmp_path: Path) -> None:
    script = "import sys; from dsft.results import find; find(sys.argv[1:])"
    tmp_path.chmod(0o600)
    try:
        done = subprocess.run(
            [*POWERLESS, sys.executable, "-c", script, str(run_dir)], capture_output=True, text=True, check=False
        )
    finally:
        tmp_path.chmod(0o700)
    assert "ValueError: RUN must be a folder that can be read, got" in done.stderr
    assert done.stderr.splitlines()[-1].endswith(": Permission denied; give the run_dir of a run")


def test_a_run_that_diverged_says_at_which_step(run_dir: Path) -> None:
    for path in (run_dir / "adapter").iterdir():
        path.unlink()
    (run_dir / "status.json").write_text('{"state": "diverged", "step": 1, "reason": "step 2: loss nan"}')
    with pytest.raises(ValueError, match=r"has diverged and has none: step 2: loss nan; begin anew"):
        find([run_dir])
