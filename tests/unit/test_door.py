"""A path that cannot become a run folder is refused in one short line before anything is made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsft.door import at_the_door, brief, check_place

CHECK = "import sys; from pathlib import Path; from dsft.door import check_place; check_place(Path(sys.argv[1]))"
POWERLESS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
"""Root without capabilities: rights count for it as for anybody."""


def _too_long_a_name(tmp_path: Path) -> Path:
    return tmp_path / ("n" * 300)


def _too_long_a_name_below_what_is_missing(tmp_path: Path) -> Path:
    return tmp_path / "none" / ("n" * 300) / "run"


def _too_long_a_path(tmp_path: Path) -> Path:
    return tmp_path.joinpath(*["name"] * 880)


def _a_path_whose_checkpoints_would_be_too_long(tmp_path: Path) -> Path:
    return tmp_path.joinpath("n" * (4060 - len(str(tmp_path)) - 3800), *["n" * 189] * 20)


def _a_link_to_nowhere(tmp_path: Path) -> Path:
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    return tmp_path / "run"


def _below_a_link_to_nowhere(tmp_path: Path) -> Path:
    return _a_link_to_nowhere(tmp_path) / "a"


def _a_link_to_itself(tmp_path: Path) -> Path:
    (tmp_path / "run").symlink_to(tmp_path / "run")
    return tmp_path / "run" / "a"


def _a_file(tmp_path: Path) -> Path:
    (tmp_path / "run").touch()
    return tmp_path / "run"


def _below_a_file(tmp_path: Path) -> Path:
    return _a_file(tmp_path) / "a" / "b"


def _checkpoints_a_file(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").touch()
    return tmp_path


@pytest.mark.parametrize(("make", "said"), [
    (_too_long_a_name, "File name too long"), (_too_long_a_name_below_what_is_missing, "File name too long"),
    (_too_long_a_path, "File name too long"), (_a_path_whose_checkpoints_would_be_too_long, "File name too long"),
    (_a_link_to_nowhere, "is a link to nowhere"), (_below_a_link_to_nowhere, "is a link to nowhere"),
    (_a_link_to_itself, "Too many levels of symbolic links"), (_a_file, "is a file"), (_below_a_file, "is a file"),
    (_checkpoints_a_file, "checkpoints"),
], ids=lambda each: getattr(each, "__name__", ""))  # fmt: skip
def test_a_path_that_cannot_be_a_folder_is_refused(make, said: str, tmp_path: Path) -> None:
    run_dir = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="run_dir must") as refused:
        check_place(run_dir)
    assert said in str(refused.value)
    assert len(str(refused.value)) < 1000
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("rest", ["", "a", "a/b/c", "run/../other"])
def test_a_folder_that_is_there_or_can_be_made_is_taken(rest: str, tmp_path: Path) -> None:
    check_place(tmp_path / rest)
    (tmp_path / "checkpoints").mkdir()
    check_place(tmp_path / rest)


@pytest.mark.parametrize(("place", "mode"), [
    (".", 0o000), (".", 0o600), (".", 0o300), (".", 0o500), ("checkpoints", 0o000), ("checkpoints", 0o300),
    ("..", 0o600), ("..", 0o000),
])  # fmt: skip
def test_a_folder_without_rights_is_refused_in_one_line(place: str, mode: int, tmp_path: Path) -> None:
    run_dir = tmp_path / "user" / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    changed = (run_dir / place).resolve()
    changed.chmod(mode)
    try:
        done = subprocess.run(
            [*POWERLESS, sys.executable, "-c", CHECK, str(run_dir)], capture_output=True, text=True, check=False
        )
    finally:
        changed.chmod(0o700)
    assert done.stderr.splitlines()[-1].startswith(f"ValueError: run_dir must be writable, got {run_dir}: Permission")
    assert done.returncode == 1


def test_a_working_folder_that_was_removed_is_refused(tmp_path: Path) -> None:
    script = f"import os; os.rmdir({str(tmp_path)!r})\n{CHECK}"
    done = subprocess.run(
        [sys.executable, "-c", script, "run"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "ValueError: run_dir must be writable, got run: No such file or directory" in done.stderr


def test_a_long_path_is_shortened_in_the_middle() -> None:
    assert brief("a/b") == "a/b"
    assert brief("a" * 5000 + "end").endswith("end (5,003 characters)")


def test_what_fails_later_is_refused_alike(tmp_path: Path) -> None:
    def make() -> None:
        with at_the_door(tmp_path / "run"):
            (tmp_path / "none" / "deeper").mkdir()

    with pytest.raises(ValueError, match=r"got .*/run: No such file or directory in .*/none/deeper; choose another"):
        make()
