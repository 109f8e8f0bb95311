"""What is asked for stays what it is in a batch script, or is refused before there is one: no shell reads a value."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from dsft_launchers import submit

from dsft import config, dispatch
from dsft.compose import Composed, compose
from dsft.paths import check_run_dir

NASTY = (
    "plain", "two words", "it's", 'a "quote"', "$(touch X)", "`touch X`", "${HOME}", "a;touch X", "a\\", "#", "--uid=0",
    "\u00fcml\u00e4ut", "\u4e2d \u6587", "*", "~", "!", "a\ntouch X\n#", "a\n", "a\rb", "a\tb", "a\x00b", "a\x1b[2Jb",
    "a\x85b", "a\u2028b", " ", "",
)  # fmt: skip
BROKEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
FIELDS = {"partition": "partition", "account": "account", "qos": "qos", "memory": "mem", "constraint": "constraint",
          "exclude": "exclude", "reservation": "reservation"}  # fmt: skip
"""Key of launcher=slurm -> the option of sbatch that it is."""


@pytest.fixture(scope="module")
def composed() -> Composed:
    return compose(["model=tiny", "launcher=slurm", "launcher.dry_run=true", "launcher.time=60"])


def script(composed: Composed, run_dir: Path, **keys: object) -> str:
    launcher = composed.run.launcher
    assert isinstance(launcher, config.Slurm)
    check_run_dir(str(run_dir))
    changed = replace(composed, run=replace(composed.run, launcher=replace(launcher, **keys), run_dir=str(run_dir)))
    asked = dispatch.request(changed, None, run_dir)
    return submit.script(asked, dispatch.batch_step(changed, str(run_dir)), run_dir / "slurm")


def options(text: str) -> dict[str, str]:
    """As sbatch reads them: a word of a shell each."""
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    words = [shlex.split(line) for line in lines]
    assert all(len(each) == 1 for each in words), words
    return dict(each[0].removeprefix("--").partition("=")[::2] for each in words)


def test_every_field_reads_back_equal_or_is_refused(composed: Composed, tmp_path: Path) -> None:
    made = []
    for nasty in NASTY:
        tries = [(key, {key: nasty}) for key in FIELDS]
        tries += [("extra", {"extra": {"comment": nasty}}), ("setup", {"setup": [f": {shlex.quote(nasty)}"]})]
        tries += [("prefix", {"prefix": shlex.quote(nasty)}), ("run_dir", {})]
        for key, keys in tries:
            run_dir = Path(os.path.abspath(tmp_path), f"x{nasty}" if key == "run_dir" else "x")
            if BROKEN.search(nasty):
                with pytest.raises(ValueError, match=r"must be without (line breaks and other )?control") as refusal:
                    script(composed, run_dir, **keys)
                assert not BROKEN.search(str(refusal.value))
                continue
            text = script(composed, run_dir, **keys)
            found, last = options(text), shlex.split(text.splitlines()[-1])
            if key in FIELDS and nasty:
                assert found[FIELDS[key]] == nasty
            if key == "extra" and nasty:
                assert found["comment"] == nasty
            if key == "prefix":
                assert last[-1] == nasty
            assert last[:2] == ["exec", sys.executable]
            assert last[5] == str(run_dir)
            assert found["output"] == f"{run_dir}/slurm/%j.log"
            made.append(text)
    for number, text in enumerate(made):
        (tmp_path / f"{number}.sh").write_text(text)
    checks = "for file in *.sh; do bash -n $file || exit 1; done"
    done = subprocess.run(["bash", "-c", checks], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(made) > 100


@pytest.mark.parametrize("option", ["comment=a --uid", "comment\n#SBATCH --uid", "a b", "", "-x", "Comment", "a\u00e9"])
def test_an_option_of_another_name_than_sbatch_has_is_refused(option: str, composed: Composed, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"launcher\.extra must name options of sbatch"):
        script(composed, tmp_path, extra={option: "1"})


def test_a_folder_that_would_end_a_line_is_refused_before_sbatch(
    composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a\nb").mkdir()
    monkeypatch.chdir(tmp_path / "a\nb")
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch: it is not asked
    request = dispatch.request(composed, None, tmp_path / "run")
    with pytest.raises(ValueError, match="the folder in which you type it must be without line breaks"):
        submit.submit(request, ["true"], tmp_path / "run" / "slurm")
    assert not (tmp_path / "run").exists()
