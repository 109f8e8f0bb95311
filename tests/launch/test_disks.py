"""Disks that fill up or turn read-only under a run, through real processes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.faults import events
from tests.launch import small_disk
from tests.launch.processes import checkpoints, steps, wait_for


@contextmanager
def on_small_disk(size: str, place: Path, *words: str) -> "Iterator[tuple[subprocess.Popen[str], Path]]":
    """A run whose folder is RUN on a tmpfs of its own; the disk, seen from here, stays until the block ends."""
    place.mkdir()
    command = [sys.executable, "-m", "dsft.run", *words, f"run_dir={place / 'run'}"]
    with place.with_suffix(".txt").open("w") as said:  # a pipe that nobody reads would stop the run
        run = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, preexec_fn=partial(small_disk.mount, place, size),
        )  # fmt: skip
    disk = os.open(f"/proc/{run.pid}/root{place}", os.O_PATH)
    try:
        yield run, Path(f"/proc/{os.getpid()}/fd/{disk}")
    finally:
        if run.poll() is None:  # the test failed
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        os.close(disk)


def said_until(run: "subprocess.Popen[str]", place: Path, wanted: Callable[[str], bool]) -> str:
    """What the run on the disk at place has said, once that fulfils wanted."""

    def said() -> str | None:
        text = place.with_suffix(".txt").read_text()
        return text if wanted(text) else None

    return str(wait_for(said, run))


@pytest.mark.parametrize(
    ("background", "ranks"), [(False, 1), (True, 1), (True, 2)], ids=["plain-1", "background-1", "background-2"]
)
def test_a_full_disk_costs_saves_and_no_step(background: bool, ranks: int, rows: Path, tmp_path: Path) -> None:
    words = faults.words(rows, ["method=lora", "checkpoint.every=1"], ranks, background=background, steps=100_000)
    with on_small_disk("12m", tmp_path / "disk", *words) as (run, disk):
        run_dir = disk / "run"
        wait_for(lambda: run_dir.is_dir() and len(events(run_dir, "save")) > 3, run)
        _fill(disk / "filler")
        good = checkpoints(run_dir)
        said_until(run, tmp_path / "disk", lambda said: said.count("SAVE FAILED") >= 2)
        assert checkpoints(run_dir)[-1] >= good[-1]
        (disk / "filler").unlink()
        freed, in_flight = checkpoints(run_dir)[-1], []
        wait_for(lambda: in_flight.append(len(_unfinished(run_dir))) or checkpoints(run_dir)[-1] > freed + 20, run)
        assert max(in_flight) == 1  # never two, although a step is faster than a save
        os.kill(events(run_dir, "start")[0]["ranks"][0]["pid"], signal.SIGTERM)
        run.wait(timeout=120)
        at = json.loads((run_dir / "status.json").read_text())["step"]
        assert events(run_dir, "save_failed")
        assert steps(run_dir) == list(range(1, at + 1))
        assert checkpoints(run_dir)[-1] == at
        assert not _unfinished(run_dir)
    assert run.returncode == 75


@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints_that_turn_read_only_cost_saves_and_no_step(ranks: int, rows: Path, tmp_path: Path) -> None:
    words = faults.words(rows, ["method=lora", "checkpoint.every=1"], ranks, background=True, steps=100_000)
    with on_small_disk("12m", tmp_path / "disk", *words) as (run, disk):
        run_dir, place = disk / "run", f"{tmp_path}/disk/run/checkpoints"
        wait_for(lambda: run_dir.is_dir() and len(events(run_dir, "save")) > 3, run)
        inside = ["nsenter", "--preserve-credentials", "-U", "-m", "-t", str(run.pid), "sh", "-c"]
        side = f"{tmp_path}/disk/side"  # made read-only where no save is writing, which would keep it from being that
        binds = (f"{place} {side}", f"{side} {place}")
        closed = f"mount --bind {binds[0]} && mount -o remount,bind,ro {side} && mount --bind {binds[1]}"
        subprocess.run([*inside, f"mkdir {side} && {closed}"], check=True)
        assert "Read-only file system" in said_until(
            run, tmp_path / "disk", lambda said: said.count("SAVE FAILED") >= 2
        )
        good = checkpoints(run_dir)
        subprocess.run([*inside, f"umount -l {place}"], check=True)
        wait_for(lambda: checkpoints(run_dir)[-1] > good[-1] + 5, run)
        os.kill(events(run_dir, "start")[0]["ranks"][0]["pid"], signal.SIGTERM)
        run.wait(timeout=120)
        at = steps(run_dir)[-1]
        assert steps(run_dir) == list(range(1, at + 1))
        assert checkpoints(run_dir)[-1] == at
        assert not _unfinished(run_dir)
    assert run.returncode == 75


def _unfinished(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob("*.tmp-*"))


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_save_proves_the_disk(ranks: int, rows: Path, tmp_path: Path) -> None:
    words = faults.words(rows, ["method=lora"], ranks, background=True, steps=100_000)
    with on_small_disk("600k", tmp_path / "disk", *words) as (run, _):
        run.wait(timeout=120)
        said = (tmp_path / "disk.txt").read_text()
    assert run.returncode == 76
    assert "the first save failed" in said
    assert "No space left on device" in said
