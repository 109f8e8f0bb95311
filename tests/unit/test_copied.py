"""The code of a SLURM job is what was submitted: every file of it, and no other."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from dsft_launchers import copied, supervise
from dsft_launchers.codes import CRASHED
from dsft_launchers.verdict import CannotBeginError

from dsft import snapshot
from dsft.dispatch import queued
from dsft.job import work

CONTENTS = {"dsft/run.py": b"run", "dsft/job.py": b"job", "launchers/a.py": b""}


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy in a run folder, as a job has it."""
    text = copied.listed(CONTENTS)
    place = tmp_path / "code" / copied.name_of(copied.digest_of(text))
    for name, content in {**CONTENTS, copied.LIST: text.encode()}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    queued(tmp_path, "7", snapshot.Snapshot(place, text))
    return place


def _change(code: Path) -> str:
    (code / "dsft" / "run.py").write_bytes(b"ran")
    return "dsft/run.py"


def _take_out(code: Path) -> str:
    (code / "launchers" / "a.py").unlink()
    return "launchers/a.py"


def _add(code: Path) -> str:
    (code / "torch.py").touch()
    return "torch.py"


def _compile(code: Path) -> str:
    (code / "dsft" / "__pycache__").mkdir()
    (code / "dsft" / "__pycache__" / "run.cpython-313.pyc").touch()
    return "dsft/__pycache__/run.cpython-313.pyc"


def _link(code: Path) -> str:
    (code / "dsft" / "run.py").rename(code.parent / "run.py")
    (code / "dsft" / "run.py").symlink_to(code.parent / "run.py")
    return "dsft/run.py"


def _list_too(code: Path) -> str:
    (code / copied.LIST).write_text(copied.listed({**CONTENTS, _change(code): b"ran"}))
    return copied.LIST


def _lose_the_list(code: Path) -> str:
    (code / copied.LIST).unlink()
    return copied.LIST


WAYS = (_change, _take_out, _add, _compile, _link, _list_too, _lose_the_list)


@pytest.mark.parametrize("way", WAYS)
def test_a_job_does_not_go_on_with_other_code(
    way: object, code: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the job, which ends with 76 and starts nothing, nor a rank."""
    run_dir = code.parents[1]
    assert copied.imports_another(run_dir, code) is None
    name = way(code)  # type: ignore[operator]
    monkeypatch.setattr(supervise, "ROOT", code)
    assert supervise._attend(run_dir, 1, 1, ["absent"], 60) == CRASHED
    status = json.loads((run_dir / "status.json").read_text())
    line = f"{code / name} is not what was submitted (slurm/job.json); remove {code} and start the run again"
    assert (status["state"], status["reason"]) == ("failed", line)
    assert capsys.readouterr().out.count(line) == 1
    assert not (run_dir / "logs").exists()


def test_a_rank_of_a_job_looks_at_what_it_imports(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSFT_SUPERVISED", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(CannotBeginError, match=f"^the job imports .*, and not the copy .* submitted, code/{code.name}"):
        work(code.parents[1], None)  # type: ignore[arg-type]


def test_a_job_that_a_wheel_submitted_has_no_copy(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    queued(tmp_path / "run", "7", None)
    assert copied.imports_another(tmp_path / "run", Path("anywhere")) is None


def test_a_copy_is_for_reading_and_another_of_its_name_is_refused(tmp_path: Path) -> None:
    mine = snapshot.of(tmp_path)
    assert mine is not None
    snapshot.copy(mine)
    assert copied.changed(mine.place, mine.digest) is None
    found = {stat.S_IMODE(path.stat().st_mode) for path in [mine.place, *mine.place.rglob("*")] if path.is_dir()}
    assert found == {0o500}
    assert {stat.S_IMODE(path.stat().st_mode) for path in mine.place.rglob("*") if path.is_file()} == {0o400}
    assert "export PYTHONDONTWRITEBYTECODE=1" in snapshot.environment(mine)
    snapshot.copy(mine)
    (mine.place / "dsft" / "run.py").chmod(0o600)
    (mine.place / "dsft" / "run.py").write_text("another")
    with pytest.raises(ValueError, match=r"must hold the code as it was .* got another dsft/run.py; remove"):
        snapshot.copy(mine)
    for path in mine.place.rglob("*"):
        path.chmod(0o700)
    os.chmod(mine.place, 0o700)
    shutil.rmtree(mine.place)
