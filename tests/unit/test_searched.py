"""Processes of dsft import what is installed first and what lies in the user's folder last, or not at all."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsft import searched, snapshot
from dsft.compose import compose
from dsft.locate import GROUP, PLUGINS, TYPED, Allowed, ForeignNameError, locate, providers
from dsft.sweeps.here import run_here
from tests.warm import fresh

RAN = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n"
MINE = """
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Mine:
    def __post_init__(self):
        raise ValueError("mine was built")
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with files that are called like libraries, installed, of Python, and absent."""
    for name in ("rich", "logging", "colorsys", "yaml", "flash_attn", "apex", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(RAN)
    (tmp_path / "evil.pth").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.chdir(tmp_path)
    with fresh():  # what is searched is settled when an interpreter begins
        yield tmp_path


def test_a_point_of_a_sweep_takes_no_file_of_its_folder_for_a_library(hostile: Path) -> None:
    assert run_here(hostile, {0: ["--version"]}, at_once=2, devices=1).codes == {0: 0}
    assert (hostile / "logs" / "0.log").read_text().startswith("dsft ")
    assert not (hostile / "ran").exists()


@pytest.mark.parametrize("more", ["", os.pathsep])
def test_a_verb_that_reads_searches_the_folder_not_at_all(
    more: str, hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where an entry of PYTHONPATH is empty, as behind `export PYTHONPATH=$PYTHONPATH:/a`."""
    (hostile / "sitecustomize.py").unlink()  # the interpreter takes it before there is any program
    monkeypatch.setenv("PYTHONPATH", more + os.environ.get("PYTHONPATH", ""))
    (hostile / "nice-adapter").mkdir()
    (hostile / "nice-adapter" / "dsft_adapter.json").write_text('{"method": {"_target_": "flash_attn.X"}}')
    command = [sys.executable, "-m", "dsft.chat", "nice-adapter", "--prompt", "hi"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "nice-adapter" in done.stderr
    assert not (hostile / "ran").exists()


def test_ones_own_option_and_module_are_asked_for_where_they_are_typed(hostile: Path) -> None:
    (hostile / "conf" / "tracker").mkdir(parents=True)
    (hostile / "mine.py").write_text(MINE)
    (hostile / "conf" / "tracker" / "mine.yaml").write_text("mine:\n  _target_: mine.Mine\n")
    words = ["model=tiny", "tracker=mine", "launcher=local", "--json"]
    done = subprocess.run([sys.executable, "-m", "dsft.plan", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "dsft: mine was built\n")
    assert not (hostile / "ran").exists()
    conf = hostile / "conf"
    for place in (conf, conf / "tracker", conf / "tracker" / "mine.yaml"):
        mode = place.stat().st_mode
        place.chmod(0o777)
        with pytest.raises(ValueError, match="conf must be your own") as refused:
            compose([*words[:3], "method=lora", "data=reasoning_gym"])
        for said in (f"got {conf}, and {place} may be written by anybody", f"--config-dir {conf}"):
            assert said in str(refused.value)
        place.chmod(mode)
    (hostile / "lm").mkdir()
    (hostile / "lm" / "other.yaml").touch()
    (hostile / "lm" / "other.yaml").chmod(0o666)
    (conf / "model").symlink_to(hostile / "lm")
    (conf / "loop").symlink_to(conf)
    with pytest.raises(ValueError, match=r"and .*/conf/(model|loop/model)/other.yaml may be written by anybody"):
        compose([*words[:3], "method=lora", "data=reasoning_gym"])


@pytest.mark.parametrize("given", [None, "", ":", "/a", ":/a", "/a:", "/a::/b", ":::"])
@pytest.mark.parametrize("code", [None, Path("/runs/it's/code/1")])
def test_a_job_has_no_empty_entry_on_its_path(given: str | None, code: Path | None) -> None:
    copy = code and snapshot.Snapshot(code, "0" * 64)
    lines = [*snapshot.environment(copy), 'printf %s "$PYTHONPATH"']
    env = {"PATH": os.environ["PATH"], **({} if given is None else {"PYTHONPATH": given})}
    done = subprocess.run(["bash", "-euc", "\n".join(lines)], env=env, capture_output=True, text=True, check=True)
    own = [str(code), str(code / "launchers")] if code else []
    expected = [*own, *(entry for entry in (given or "").split(":") if entry)]
    assert done.stdout.split(":") == (expected or [""])


@pytest.mark.parametrize(
    "held", [["sweep.json"], ["dsft_adapter.json"], ["adapter_config.json"], ["config.yaml", "provenance.json"]]
)
def test_the_folder_of_what_is_read_is_not_the_users_own(held: list[str], tmp_path: Path) -> None:
    for name in held:
        assert searched.why_not(tmp_path) is None
        (tmp_path / name).touch()
    assert f"what {held[0]} describes" in str(searched.why_not(tmp_path))


def test_a_folder_that_all_may_write_gives_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert searched.own_folder() == str(tmp_path)
    tmp_path.chmod(0o777)
    assert searched.own_folder() == ""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    shutil.rmtree(gone)
    assert searched.own_folder() == ""


@pytest.mark.parametrize("place", ["own.py", "whole", "whole/part.py", "__pycache__"])
def test_a_module_that_all_may_write_is_not_imported(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "whole" / "__init__.py").touch()
    for name in ("own.py", "whole/part.py"):
        (tmp_path / name).write_text(RAN + MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    searched.take(searched.own_folder())
    module = "own" if "whole" not in place else "whole.part"
    (tmp_path / place).chmod(0o777)
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "own.py").write_text(RAN)
    try:
        assert importlib.util.find_spec(module.partition(".")[0]) is None or place == "whole/part.py"
        assert str(tmp_path / "hydra_plugins") not in (
            importlib.util.find_spec("hydra_plugins").submodule_search_locations or []
        )
        with pytest.raises(ImportError, match=f"{place}.* may be written by anybody"):
            locate(f"{module}.Mine", TYPED)
        assert not list(tmp_path.rglob("ran"))
        (tmp_path / place).chmod(0o700)
        locate(f"{module}.Mine", TYPED)
        assert list(tmp_path.rglob("ran"))
    finally:
        for name in ("own", "whole.part", "whole"):
            sys.modules.pop(name, None)


def test_what_only_the_users_folder_claims_to_install_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "claims-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: claims\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nclaims = claims.conf\n")
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "evil.py").write_text(RAN)
    monkeypatch.setattr(sys, "path", [*sys.path, searched.OwnFolder(tmp_path)])
    monkeypatch.delenv(PLUGINS, raising=False)
    assert "claims" not in providers()
    with pytest.raises(ForeignNameError):
        locate("claims.evil.Evil", Allowed())
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path[:-1]])
    assert providers()["claims"] == "claims.conf"
    monkeypatch.setattr(sys, "path", [*sys.path[1:], searched.OwnFolder(tmp_path)])
    assert not (tmp_path / "claims" / "ran").exists()


def test_a_sweeps_words_may_name_what_the_user_has_put_on_pythonpath(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "put_there.py").write_text(RAN)
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path / 'own'}")
    monkeypatch.delenv(PLUGINS, raising=False)
    assert Allowed(pythonpath=True).refusal("put_there.Thing") is None
    assert Allowed().refusal("put_there.Thing") is not None
    assert Allowed(pythonpath=True).refusal("this.Zen") is not None
    assert not (tmp_path / "own" / "ran").exists()
