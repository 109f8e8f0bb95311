"""What other people may have written runs only where this command line says so."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsft import adapters, chat, export, owners, run, sweep
from dsft.compose import compose
from dsft.locate import PLUGINS
from dsft.sweeps.ledger import Entry, Ledger
from dsft.sweeps.points import Typed, check
from tests.contract.sessions import left_by

NOBODY = 65534


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(str(compose(["model=tiny"]).run.model.resolve().folder), root / "base")
    left_by(root / "run", "bitfit", "model=custom", f"model.path={root / 'base'}")
    (root / "run" / "status.json").write_text('{"state": "done", "step": 2}')
    return root


@pytest.fixture
def place(made: Path) -> Iterator[Path]:
    """The same, as it was."""
    yield made
    for path in (made, made / "run", made / "run" / "adapter"):
        path.chmod(0o755)


def _one_line(capsys: pytest.CaptureFixture[str], *said: str) -> None:
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), out + err
    assert all(each in err for each in said), err


def _of_another(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)


def _of_all(path: Path) -> None:
    path.chmod(0o777)


def _whose() -> list[Any]:
    """Only root can give a file away."""
    return [_of_all, _of_another] if os.geteuid() == 0 else [_of_all]


@pytest.mark.parametrize("whose", _whose())
@pytest.mark.parametrize("inside", ["", "adapter"])
def test_a_run_that_another_may_have_written_is_refused_until_it_is_trusted(
    whose: Any, inside: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    folder = tmp_path / "run"
    whose(folder / inside)
    named = (f"got {folder / inside}", "add --trust", "nobody" if whose is _of_another else "may be written by anybody")
    assert chat.main([str(folder), "--prompt", "hi"]) == 2
    _one_line(capsys, "dsft: RUN must be a folder that no other user writes", *named)
    assert export.main([str(folder), "--to", "adapter", str(tmp_path / "out")]) == 2
    _one_line(capsys, *named)
    with pytest.raises(ValueError, match="must be a folder that no other user writes"):
        adapters.load(folder)
    assert not (tmp_path / "out").exists()
    assert export.main([str(folder), "--to", "adapter", str(tmp_path / "out"), "--trust"]) == 0
    assert f"dsft: note: {folder / inside}" in capsys.readouterr().err
    assert (tmp_path / "out" / "dsft_adapter.json").is_file()


def test_a_run_goes_on_in_a_folder_of_all_with_trust_alone(
    typed_alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=tiny", "data=local", "data.path=none.jsonl", "launcher=local", "tracker=none", "run_dir=run"]
    Path("run").mkdir()
    Path("run").chmod(0o777)
    assert run.main(words) == 2
    _one_line(
        capsys, "dsft: run_dir must be a folder that no other user writes, got run, which may be written by anybody"
    )
    assert run.main(["-m", "optim.lr=1e-3,2e-3", *words]) == 2
    _one_line(
        capsys, "dsft: run_dir must be a folder that no other user writes, got ", "which may be written by anybody"
    )
    assert list(Path("run").iterdir()) == []
    assert run.main(["-m", "--trust", "optim.lr=1e-3,2e-3", *words]) == 2
    assert "dsft: point 1: data.path must be a file that exists" in capsys.readouterr().err
    assert not Path("run").exists()
    Path("run").mkdir()
    Path("run").chmod(0o777)
    assert run.main(["--trust", *words]) == 2
    assert "data.path" in capsys.readouterr().err, "the next thing that is wrong"
    Path("run").chmod(0o775)
    assert run.main(words) == 2
    note, line = capsys.readouterr().err.splitlines()
    assert note.startswith("dsft: note: run may be written by its group, ")
    assert "data.path" in line


def _sweep(folder: Path, *words: str, **more: Any) -> Path:
    folder.mkdir()
    small = ["model=tiny", "data=reasoning_gym", "launcher=local", "tracker=none", "strategy=single", *words]
    book = Ledger("loss", str(more.get("cwd", Path.cwd())), more.get("config_dir"), [Entry(small, None)])
    book.write(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "more", "said"),
    [
        (["hydra.searchpath=[pkg://evil.conf]"], {}, "sweep.json is damaged"),
        (["+hydra/launcher=evil"], {}, "sweep.json is damaged"),
        ([], {"cwd": "."}, "sweep.json is damaged"),
        (["method._target_=evil.Evil"], {}, "got evil.Evil named in"),
        (["+data.more={_target_: evil.Evil}"], {}, "got evil.Evil named in"),
        (["method=mine"], {"cwd": "elsewhere"}, "got evil.Evil named in"),
        (["method=mine"], {"config_dir": "elsewhere/conf"}, "got evil.Evil named in"),
        (["model=custom", "model.path=.", "model.trust_remote_code=true"], {"cwd": "elsewhere"},
         "model.trust_remote_code must be typed for each start of a sweep"),
        (["model=custom", "model.path=.", "model.trust_remote_code=true"], {},
         "model.trust_remote_code must be typed for each start of a sweep"),
    ],
)  # fmt: skip
def test_a_sweep_that_goes_on_runs_no_code_that_its_folder_names(
    words: list[str], more: dict[str, str], said: str, typed_alone: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv(PLUGINS, raising=False)
    for place in (tmp_path, tmp_path / "elsewhere"):
        (place / "conf" / "method").mkdir(parents=True)
        (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        (place / "conf" / "method" / "mine.yaml").write_text("_target_: evil.Evil\nlr: 1.0\n")
        monkeypatch.syspath_prepend(str(place))
    monkeypatch.chdir(tmp_path)
    given = {key: value if value == "." else str(tmp_path / value) for key, value in more.items()}
    folder = _sweep(tmp_path / "sweep", *words, **given)
    path = list(sys.path)
    assert sweep.main(["resume", str(folder)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert [entry for entry in sys.path if entry not in path] == []
    assert not (folder / "0").exists()


@pytest.mark.parametrize("whose", _whose())
@pytest.mark.parametrize("key", ["cwd", "config_dir"])
def test_a_sweep_goes_to_no_folder_of_others(
    whose: Any, key: str, typed_alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs").mkdir()
    whose(tmp_path / "theirs")
    folder = _sweep(tmp_path / "sweep", **{key: str(tmp_path / "theirs")})
    here = Path.cwd()
    for verb in ("resume", "retry") if key == "cwd" else ("resume",):
        code = sweep.main([verb, str(folder)])
        said = capsys.readouterr()
        if verb == "retry":  # nothing has failed
            assert code in (0, 75), said.err
            continue
        assert code == 2
        assert f"got {tmp_path / 'theirs'}, which" in said.err
        assert said.err.count("\n") == 1
    assert Path.cwd() == here


@pytest.mark.parametrize("job", ["--user=alice", "1 2", "12_", "1;2", "\u0663", None, ["1"]])
def test_what_is_no_number_of_a_job_reaches_no_command(
    job: Any, typed_alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("scancel", "squeue", "scontrol"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {tmp_path / "called"}\n')
        (tmp_path / "bin" / name).chmod(0o755)
    folder = _sweep(tmp_path / "sweep")
    (folder / "0" / "slurm").mkdir(parents=True)
    (folder / "0" / "slurm" / "job.json").write_text(json.dumps({"job": job}))
    (folder / "0" / "status.json").write_text('{"state": "queued", "step": 0}')
    for verb in ("cancel", "status", "resume"):
        assert sweep.main([verb, str(folder)]) == 2
        _one_line(capsys, "slurm/job.json of ", " is damaged")
    assert not (tmp_path / "called").exists()


def test_a_sweep_of_all_is_looked_at_and_not_gone_on_with(
    typed_alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _sweep(tmp_path / "sweep")
    folder.chmod(0o777)
    for verb in ("resume", "retry", "cancel"):
        assert sweep.main([verb, str(folder)]) == 2
        _one_line(capsys, "dsft: SWEEP must be a folder that no other user writes")
    assert sweep.main(["status", str(folder)]) == 0
    assert f"dsft: note: {folder} may be written by anybody" in capsys.readouterr().err
    assert sweep.main(["cancel", str(folder), owners.TRUST]) == 0
    (folder / "0").mkdir()
    (folder / "0").chmod(0o777)
    assert "no other user writes" in check(folder, {0: ["model=tiny"]}, Typed()).refused[0]
