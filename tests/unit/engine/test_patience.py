"""Who waits too long says where and leaves; who is only late goes on."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from dsft_launchers.codes import CRASHED
from dsft_launchers.verdict import HANGS as HANGING
from dsft_launchers.verdict import WAITED, WENT_ON, hung

from dsft.engine.patience import Patience
from dsft.engine.waiting import waits

HANGS = """
import ctypes, os, signal, time
from dsft.engine import patience
from dsft.engine.patience import Patience

patience.ONCE_S = 1.0
code = compile("def some_collective():\\n    {work}", "/torch/distributed/planted.py", "exec")
exec(code)

with Patience(0.5) as patience:
    for step in range(1, 5):
        with patience.limit(step, tokens=8):
            if step == {at}:
                some_collective()
print("went on")
"""


IN_PHASE = """
import ctypes, time
from dsft.engine import patience
from dsft.engine.patience import Patience

patience.ONCE_S, patience.SILENT_S = 0.2, 6.0
with Patience(0.5, leaves=lambda reason: print("left:", reason, flush=True)) as limited:
    with limited.phase("evaluation", 0.1):
        with limited.phase("save", 1.0):
            time.sleep({inner})
        {work}
print("went on")
"""


def outcome(seconds: float, at: int) -> "subprocess.CompletedProcess[str]":
    return _run(HANGS.format(work=f"time.sleep({seconds})", at=at))


def _run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def test_who_waits_too_long_shows_where_and_leaves() -> None:
    done = outcome(60.0, at=4)
    assert done.returncode == CRASHED
    assert done.stderr.startswith(f"{WAITED}step 4: ")
    assert "in some_collective" in done.stderr


@pytest.mark.parametrize(("seconds", "at", "said"), [(2.0, 4, True), (0.8, 2, False), (2.5, 2, True)])
def test_who_is_late_goes_on_and_the_first_steps_have_a_longer_limit(seconds: float, at: int, said: bool) -> None:
    done = outcome(seconds, at)
    assert (done.returncode, done.stdout) == (0, "went on\n")
    assert (WAITED in done.stderr) is (WENT_ON in done.stderr) is said


def test_who_hangs_outside_of_a_collective_says_that_it_is_itself() -> None:
    done = _run(IN_PHASE.format(inner=0, work="time.sleep(60)"))
    assert done.returncode == CRASHED
    assert done.stderr.startswith(f"{HANGING}evaluation: ")
    assert "at most 1 s (train.hang_after)" in done.stderr
    assert "left: this rank hangs: evaluation: " in done.stdout


def test_a_phase_inside_of_another_has_its_own_limit_and_the_outer_one_waits() -> None:
    assert _run(IN_PHASE.format(inner=1.2, work="time.sleep(0.3)")).stdout == "went on\n"
    done = _run(IN_PHASE.format(inner=60, work="pass"))
    assert done.stderr.startswith(f"{HANGING}save: ")


def test_a_process_whose_interpreter_does_not_run_is_ended_from_outside() -> None:
    done = _run(IN_PHASE.format(inner=0, work="ctypes.PyDLL(None).sleep(60)"))
    assert done.returncode < 0
    assert ": its interpreter has not run for 6 s" in done.stderr


@contextmanager
def standing(name: str, files: str, still: threading.Event) -> "Iterator[threading.Thread]":
    """A thread whose frames lie in files, from the innermost outwards."""
    work: Any = still.wait
    for file in files.split(","):
        scope = {"work": work}
        exec(compile("def call(inner=work): inner()", file, "exec"), scope)
        work = scope["call"]
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    yield thread
    still.set()
    thread.join()


@pytest.mark.parametrize(("files", "device", "saver", "expected"), [
    ("/x/torch/distributed/distributed_c10d.py", "cpu", None, True),
    ("/x/torch/_ops.py,/x/torch/distributed/_functional_collectives.py", "cpu", None, True),
    ("/x/torch/_ops.py,/x/torch/_library/a.py,/x/torch/distributed/_functional_collectives.py", "cpu", None, True),
    ("/x/torch/nn/functional.py,/x/mine.py,/x/torch/distributed/a.py", "cpu", None, False),
    ("/x/mine.py,/x/torch/distributed/checkpoint/planner.py", "cpu", None, False),
    ("/x/dsft/strategies/ddp.py", "cpu", None, True),
    ("/x/dsft/engine/step.py", "cpu", None, False),
    ("/x/dsft/engine/step.py", "cuda", None, True),
    ("/x/mine.py", "cuda", None, False),
    ("/x/dsft/checkpoint/saver.py", "cpu", "/x/torch/distributed/distributed_c10d.py", True),
    ("/x/dsft/checkpoint/saver.py", "cpu", "/x/dsft/checkpoint/files.py", False),
])  # fmt: skip
def test_waiting_is_told_from_hanging_by_where_a_rank_stands(
    files: str, device: str, saver: str | None, expected: bool
) -> None:
    still = threading.Event()
    with standing("rank", files, still) as rank, standing("save-3" if saver else "other", saver or "/x/a.py", still):
        time.sleep(0.05)
        assert waits(rank, accelerated=device == "cuda") is expected


def test_the_time_in_which_a_process_was_itself_stopped_is_no_waiting() -> None:
    code = HANGS.format(work="os.kill(os.getpid(), signal.SIGSTOP); time.sleep(0.3)", at=4)
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as stopped:
        os.waitpid(stopped.pid, os.WUNTRACED)
        time.sleep(1.5)
        stopped.send_signal(signal.SIGCONT)
        assert stopped.communicate(timeout=60)[1] == ""
    assert stopped.returncode == 0


def test_what_stands_apart_has_a_limit_of_its_own_and_takes_none_of_the_steps() -> None:
    seen = []

    def work() -> None:
        seen.append(limited.now.name)
        time.sleep(0.05)

    with Patience(60.0) as limited:
        for step in range(1, 5):
            with limited.limit(step, tokens=8):
                before = limited.now
                limited.apart(work, "save", lambda: 7.0)()
                assert limited.now.name == f"step {step}"
                assert limited.now.until == pytest.approx(before.until + 0.05, abs=0.04)
                assert limited.now.until - limited.now.begun == pytest.approx(before.until - before.begun)
        assert limited.now.until > time.monotonic() + 60
    assert seen == ["save"] * 4
    assert max(limited.seconds) < 0.05
    assert not limited.thread.is_alive()


def test_a_step_of_more_tokens_may_take_longer() -> None:
    with Patience(60.0) as limited:
        for step in range(4):
            with limited.limit(step, tokens=10):
                time.sleep(0.05)
        allowed = []
        for tokens in (1, 10, 100):
            with limited.limit(5, tokens=tokens):
                allowed.append(limited.now.until - limited.now.begun - 60.0)
    assert allowed[1] == pytest.approx(allowed[0], rel=0.5)
    assert allowed[2] > 5 * allowed[1]


def test_without_a_margin_no_thread_watches() -> None:
    with Patience(math.inf) as unlimited:
        assert not unlimited.thread.is_alive()


def test_who_says_nothing_is_the_one_that_hangs() -> None:
    waited = f"{WAITED}step 7\n"
    assert hung([waited, "", waited]) == [1]
    assert hung([waited, waited]) == []
    assert hung([f"{waited}{WENT_ON}\n", ""]) is None
    assert hung(["", "Traceback"]) is None
