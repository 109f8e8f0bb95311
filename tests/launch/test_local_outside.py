"""The process beside a rank: it ends a rank whose interpreter does not run, and no other."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dsft_launchers.verdict import HANGS

from tests.launch.toys import Launch, finish, is_alive, launches, reason, wait_gone

LAUNCHERS = Path(__file__).parents[2] / "launchers"

PRELUDE = """
import ctypes, faulthandler, os, signal, sys, threading, time
faulthandler.enable()
from dsft_launchers.outside import Outside

outside = Outside()
outside.beat(ALLOWED_S, "evaluation")
def beat():
    while outside.pipe >= 0:
        outside.beat(ALLOWED_S, "evaluation")
        time.sleep(0.1)
thread = threading.Thread(target=beat, daemon=True)
thread.start()
print(outside.process.pid, flush=True)
"""


class Watched:
    """A rank with its watcher, in a process group of their own."""

    def __init__(self, body: str, *, allowed_s: float = 1.0) -> None:
        program = PRELUDE.replace("ALLOWED_S", str(allowed_s)) + body
        self.rank = subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(LAUNCHERS)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self.rank.stdout is not None
        self.watcher = int(self.rank.stdout.readline())

    def finish(self) -> tuple[int, str, str]:
        out, err = self.rank.communicate(timeout=60)
        return self.rank.returncode, out, err


@pytest.fixture
def started() -> Iterator[list[Watched]]:
    watched: list[Watched] = []
    yield watched
    for each in watched:
        if each.rank.poll() is None:
            os.killpg(each.rank.pid, signal.SIGKILL)
        each.rank.communicate()
        assert not wait_gone([each.watcher])


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    yield from launches(tmp_path)


def test_a_rank_that_holds_the_interpreter_is_ended_and_leaves_its_stacks(started: list[Watched]) -> None:
    started.append(Watched("ctypes.PyDLL(None).sleep(60)"))
    code, _, err = started[0].finish()
    assert code == -signal.SIGABRT
    assert err.startswith(f"{HANGS}evaluation: its interpreter has not run for ")
    assert "Fatal Python error: Aborted" in err
    assert 'File "<string>"' in err, "the stack of the line that hangs"


def test_a_rank_that_ignores_the_first_signal_is_killed(started: list[Watched]) -> None:
    body = "faulthandler.disable(); signal.signal(signal.SIGABRT, signal.SIG_IGN); ctypes.PyDLL(None).sleep(60)"
    started.append(Watched(body))
    code, _, err = started[0].finish()
    assert code == -signal.SIGKILL
    assert err.startswith(f"{HANGS}evaluation: ")


def test_a_rank_that_is_only_busy_goes_on(started: list[Watched]) -> None:
    started.append(Watched("until = time.monotonic() + 3\nwhile time.monotonic() < until: pass\nprint('done')"))
    assert started[0].finish() == (0, "done\n", "")


def test_a_rank_that_said_how_long_it_may_take_goes_on(started: list[Watched]) -> None:
    started.append(Watched("ctypes.PyDLL(None).sleep(2); print('done')", allowed_s=30.0))
    assert started[0].finish() == (0, "done\n", "")


NAPS = "until = time.monotonic() + 3\nwhile time.monotonic() < until: time.sleep(0.1)\nprint('done')"


@pytest.mark.parametrize("body", [NAPS, NAPS.replace("time.sleep(0.1)", "pass")], ids=["waits", "is busy"])
def test_time_in_which_both_are_stopped_does_not_count(started: list[Watched], body: str) -> None:
    started.append(Watched(body))
    time.sleep(0.5)
    os.killpg(started[0].rank.pid, signal.SIGSTOP)
    time.sleep(3.0)
    os.killpg(started[0].rank.pid, signal.SIGCONT)
    assert started[0].finish() == (0, "done\n", "")


def test_a_rank_that_is_stopped_alone_is_ended(started: list[Watched]) -> None:
    started.append(Watched("time.sleep(60)"))
    os.kill(started[0].rank.pid, signal.SIGSTOP)
    code, _, err = started[0].finish()
    assert code == -signal.SIGKILL
    assert err.startswith(f"{HANGS}evaluation: ")


FORKS = "if os.fork() == 0: time.sleep(3); os._exit(0)\n"  # it inherits the pipe, as a data worker does


@pytest.mark.parametrize("end", ["", "os._exit(76)", "os.kill(os.getpid(), 9)", "outside.close()"])
@pytest.mark.parametrize("before", ["", FORKS], ids=["alone", "with a child"])
def test_the_watcher_goes_with_its_rank(started: list[Watched], before: str, end: str) -> None:
    started.append(Watched(before + end, allowed_s=60.0))
    started[0].rank.wait(timeout=60)
    assert not wait_gone([started[0].watcher], timeout_s=2.0)


def test_signals_to_the_group_are_the_ranks(started: list[Watched]) -> None:
    body = "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\nprint('bound', flush=True)\n" + NAPS
    started.append(Watched(body))
    assert started[0].rank.stdout is not None
    assert started[0].rank.stdout.readline() == "bound\n"
    os.killpg(started[0].rank.pid, signal.SIGTERM)
    assert is_alive(started[0].watcher)
    assert started[0].finish() == (0, "asked\ndone\n", "")


def test_a_watcher_that_died_disturbs_no_rank(started: list[Watched]) -> None:
    started.append(Watched(NAPS))
    os.kill(started[0].watcher, signal.SIGKILL)
    assert started[0].finish() == (0, "done\n", "")


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("hang", ["ctypes.PyDLL(None).sleep(60)", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_the_launcher_names_a_rank_that_was_ended_from_outside(
    launch: Launch, tmp_path: Path, size: int, hang: str
) -> None:
    body = PRELUDE.replace("ALLOWED_S", "1.0") + f"{hang} if rank == {size - 1} else time.sleep(60)\n"
    code, _, err = finish(launch(body, num_processes=size))
    assert code == 76
    said = rf"rank {size - 1} hangs in evaluation: its interpreter has not run for \d+ s"
    assert re.fullmatch(said, str(reason(tmp_path)))
    assert f"dsft: rank {size - 1} hangs in evaluation: " in err
