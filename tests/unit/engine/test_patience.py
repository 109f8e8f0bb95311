"""Who waits too long says where and leaves; who is only late goes on."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
from dsft_launchers.codes import CRASHED
from dsft_launchers.verdict import WAITED, WENT_ON, hung

from dsft.engine import patience
from dsft.engine.patience import Patience

HANGS = """
import os, signal, time
from dsft.engine.patience import Patience

def some_collective():
    {work}

with Patience(0.5) as patience:
    for step in range(1, 5):
        with patience.limit(step, tokens=8):
            if step == {at}:
                some_collective()
print("went on")
"""


def outcome(seconds: float, at: int) -> "subprocess.CompletedProcess[str]":
    code = HANGS.format(work=f"time.sleep({seconds})", at=at)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def test_who_waits_too_long_shows_where_and_leaves() -> None:
    done = outcome(60.0, at=4)
    assert done.returncode == CRASHED
    assert done.stderr.startswith(f"{WAITED}step 4: ")
    assert "in some_collective" in done.stderr


@pytest.mark.parametrize(("seconds", "at", "said"), [(2.0, 4, True), (2.0, 2, False)])
def test_who_is_late_goes_on_and_nothing_is_judged_before_a_median(seconds: float, at: int, said: bool) -> None:
    done = outcome(seconds, at)
    assert (done.returncode, done.stdout) == (0, "went on\n")
    assert (WAITED in done.stderr) is (WENT_ON in done.stderr) is said


def test_the_time_in_which_a_process_was_itself_stopped_is_no_waiting() -> None:
    code = HANGS.format(work="os.kill(os.getpid(), signal.SIGSTOP); time.sleep(0.3)", at=4)
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as stopped:
        os.waitpid(stopped.pid, os.WUNTRACED)
        time.sleep(1.5)
        stopped.send_signal(signal.SIGCONT)
        assert stopped.communicate(timeout=60)[1] == ""
    assert stopped.returncode == 0


def test_what_stands_apart_is_not_limited() -> None:
    limits = []
    with Patience(60.0) as limited:
        for step in range(1, 5):
            with limited.limit(step, tokens=8):
                before = limited.until
                limited.apart(lambda: limits.append(limited.until))()
                assert limited.until >= before
                assert math.isfinite(limited.until) is (step > patience.FEWEST)
        assert limited.until == math.inf
    assert limits == [math.inf] * 4
    assert not limited.thread.is_alive()


def test_a_step_of_more_tokens_may_take_longer() -> None:
    with Patience(60.0) as limited:
        for step in range(4):
            with limited.limit(step, tokens=10):
                time.sleep(0.05)
        allowed = []
        for tokens in (1, 10, 100):
            with limited.limit(5, tokens=tokens):
                allowed.append(limited.until - limited.begun - 60.0)
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
