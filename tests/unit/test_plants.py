"""The planting tool: a fault happens at the call and on the rank that are named, and nowhere else."""

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.plants import Plant, environment, happened, planted

TOY = """
import os, sys
class Thing:
    @staticmethod
    def still(value): return value
    def moves(self, value): return value
def plain(value): return value
"""
USED = "import toy; print([toy.plain(n) for n in range(4)], toy.Thing.still(5), toy.Thing().moves(6))"


def _ran(
    tmp_path: Path, *plants: Plant, flags: tuple[str, ...] = (), rank: str = "0"
) -> "subprocess.CompletedProcess[str]":
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "toy.py").write_text(TOY)
    (tmp_path / "own" / "sitecustomize.py").write_text("print('my own')")
    env = {**os.environ, "RANK": rank, **environment(plants, tmp_path / "fired")}
    env["PYTHONPATH"] += os.pathsep + str(tmp_path / "own")
    return subprocess.run([sys.executable, *flags, "-c", USED], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("flags", [(), ("-P",)], ids=["plain", "safe-path"])
def test_a_started_process_is_planted_beside_its_own_sitecustomize(tmp_path: Path, flags: tuple[str, ...]) -> None:
    plants = (
        Plant("toy:Thing.still", "run", "echo $PLANT_PARENT"),
        Plant("toy:plain", "raise", "OSError(28, 'full')", when="args[0] == 2"),
    )
    done = _ran(tmp_path, *plants, flags=flags)
    assert done.stdout == "my own\n"
    assert "OSError: [Errno 28] full" in done.stderr
    assert [line["place"] for line in happened(tmp_path / "fired")] == ["toy:plain"]


def test_plants_of_another_rank_do_not_happen(tmp_path: Path) -> None:
    done = _ran(tmp_path, Plant("toy:plain", "kill", rank=1), Plant("toy:Thing.moves", "kill", rank=1))
    assert done.stdout == "my own\n[0, 1, 2, 3] 5 6\n"
    assert happened(tmp_path / "fired") == []


def test_the_nth_call_of_a_rank_is_killed(tmp_path: Path) -> None:
    done = _ran(tmp_path, Plant("toy:Thing.moves", "kill", rank=1), rank="1")
    assert done.returncode == -9
    assert [(line["what"], line["rank"]) for line in happened(tmp_path / "fired")] == [("kill", 1)]


def test_within_this_process_a_plant_is_there_and_goes() -> None:
    from shutil import disk_usage as mine

    with planted(Plant("shutil:disk_usage", "raise", "OSError(5, 'gone')", nth=2)):
        from shutil import disk_usage

        disk_usage("/")
        with pytest.raises(OSError, match="gone"):
            disk_usage("/")
        disk_usage("/")
    from shutil import disk_usage

    assert disk_usage is mine


def test_who_holds_the_interpreters_lock_lets_no_thread_run() -> None:
    from threading import Thread

    ticks: list[float] = []
    thread = Thread(target=lambda: [(ticks.append(time.monotonic()), time.sleep(0.01)) for _ in range(60)])
    with planted(Plant("os:getcwd", "hold_gil", "0.3")):
        thread.start()
        os.getcwd()
    thread.join()
    assert max(after - before for before, after in pairwise(ticks)) >= 0.25


@pytest.mark.parametrize("plant", [{"place": "os:getcwd", "what": "explode"}, {"place": "getcwd", "what": "kill"}])
def test_what_would_never_happen_is_refused(plant: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Plant(**plant)
