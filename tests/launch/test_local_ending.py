"""What a launch failed of: the one rank and its error, whatever the others say, on one, two and three ranks."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from dsft_launchers.verdict import CANNOT_BEGIN, CRASH, HANGS, LOST_PEER, REFUSED, WAITED

from tests.launch.toys import Launch, finish, launches, pid_of, reason, wait_gone

SIZES = pytest.mark.parametrize("size", [1, 2, 3])


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    yield from launches(tmp_path)


FOLLOWS = f"""
def say(text):
    print(text, file=sys.stderr, flush=True)
def leave_together():
    ready()
    while not all((here / f"pid-{{r}}").exists() for r in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.01)
last = rank == int(os.environ["WORLD_SIZE"]) - 1
def fail(text):
    say("Traceback (most recent call last):")
    say("  File 'x.py', line 1, in <module>")
    say(text)
    say("{CRASH}" + text)
def follow():
    say("{LOST_PEER}RuntimeError: [/pytorch/gloo/transport/tcp/pair.cc:537] Connection reset by peer")
    os._exit(76)
leave_together()
"""


@SIZES
def test_the_reason_is_the_error_of_the_rank_that_raised_it(launch: Launch, tmp_path: Path, size: int) -> None:
    body = 'last or follow(); fail("ReadTimeout: the verifier timed out, connection reset by peer"); os._exit(76)'
    code, _, err = finish(launch(FOLLOWS + body, num_processes=size))
    assert code == 76
    error = "ReadTimeout: the verifier timed out, connection reset by peer"
    assert reason(tmp_path) == f"rank {size - 1}: {error}"
    shown = err[err.index("dsft: rank") :]
    assert f"rank {size - 1} of {size} left with exit code 76" in shown
    assert shown.splitlines()[-1].strip() == error, "neither the last word again nor what came after it"


@SIZES
def test_a_rank_that_says_its_error_and_leaves_late_is_the_cause(launch: Launch, tmp_path: Path, size: int) -> None:
    body = """
last or (time.sleep(0.3), follow())
fail("ValueError: planted")
time.sleep(60 if rank else 0.5)
sys.exit(76)
"""
    assert finish(launch(FOLLOWS + body, num_processes=size))[0] == 76
    assert reason(tmp_path) == f"rank {size - 1}: ValueError: planted"


@SIZES
@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV])
def test_a_signal_in_the_end_of_a_crashed_rank_is_not_the_cause(
    launch: Launch, tmp_path: Path, size: int, number: signal.Signals
) -> None:
    body = f"""
last or follow()
fail("ValueError: planted")
say("terminate called without an active exception")
say("Fatal Python error: Aborted")
os.kill(os.getpid(), {number:d})
time.sleep(60)
"""
    code, _, err = finish(launch(FOLLOWS + body, num_processes=size))
    assert code == 76
    assert reason(tmp_path) == f"rank {size - 1}: ValueError: planted"
    shown = err[err.index("dsft: rank") :]
    assert f"rank {size - 1} of {size} left with exit code 76" in shown
    assert "SIG" not in shown
    assert "terminate called" not in shown
    assert "Fatal Python error" not in shown


@SIZES
def test_a_rank_that_was_killed_is_the_cause(launch: Launch, tmp_path: Path, size: int) -> None:
    body = "if last: os.kill(os.getpid(), 9)\ntime.sleep(0.2); follow()"
    assert finish(launch(FOLLOWS + body, num_processes=size))[0] == 76
    how = "was killed by SIGKILL (kill -9, or the machine ran out of memory)"
    assert reason(tmp_path) == f"rank {size - 1} {how}"


@SIZES
def test_a_rank_that_says_that_it_hangs_is_the_cause(launch: Launch, tmp_path: Path, size: int) -> None:
    body = f"""
last or (time.sleep(0.3), follow())
say("{HANGS}evaluation: 62.1 s, at most 60 s")
say("stacks")
os._exit(76)
"""
    code, _, err = finish(launch(FOLLOWS + body, num_processes=size))
    assert code == 76
    assert reason(tmp_path) == f"rank {size - 1} hangs in evaluation: 62.1 s, at most 60 s"
    assert f"dsft: rank {size - 1} hangs in evaluation: 62.1 s, at most 60 s; the stacks are in" in err


@pytest.mark.parametrize("size", [2, 3])
def test_a_silent_rank_hangs_in_what_the_others_waited_for(launch: Launch, tmp_path: Path, size: int) -> None:
    body = f"""
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
if rank == 2:
    time.sleep(0.2)
    follow()  # its own limit had not come yet
say("{WAITED}evaluation: 62.1 s, at most 60 s")
say("stacks")
say("{LOST_PEER}RuntimeError: Connection reset by peer")
os._exit(76)
"""
    code, _, err = finish(launch(FOLLOWS + body, num_processes=size))
    assert code == 76
    assert reason(tmp_path) == "rank 1 hangs in evaluation"
    assert "dsft: rank 1 hangs in evaluation; the stacks are in" in err


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_waited_for_each_other_are_all_the_cause(launch: Launch, tmp_path: Path, size: int) -> None:
    body = f'say("{WAITED}step 7: 9.9 s, the median is 0.1 s"); os._exit(76)'
    assert finish(launch(FOLLOWS + body, num_processes=size))[0] == 76
    assert reason(tmp_path) == "all ranks waited for each other in step 7"


@pytest.mark.parametrize("size", [2, 3])
def test_of_ranks_that_only_lost_a_peer_the_first_is_named(launch: Launch, tmp_path: Path, size: int) -> None:
    assert finish(launch(FOLLOWS + "last or time.sleep(0.5); follow()", num_processes=size))[0] == 76
    why = str(reason(tmp_path))
    assert why.startswith(f"rank {size - 1} left first, for it lost a peer: RuntimeError: [/pytorch/gloo")


@SIZES
@pytest.mark.parametrize("who", ["True", "rank == 0", "last"])
def test_a_run_that_is_refused_ends_with_2_and_its_line_once(
    launch: Launch, tmp_path: Path, size: int, who: str
) -> None:
    line = "no checkpoint verifies; resume.anew=true begins anew"
    body = f'if {who}:\n    say("{REFUSED}{line}")\n    os._exit(2)\ntime.sleep(0.2); follow()'
    code, _, err = finish(launch(FOLLOWS + body, num_processes=size))
    assert (code, reason(tmp_path)) == (2, line)
    assert [each for each in err.splitlines() if not each.startswith(LOST_PEER)] == [f"{REFUSED}{line}"]


@SIZES
@pytest.mark.parametrize("who", ["True", "rank == 0", "last"])
def test_what_keeps_the_ranks_from_beginning_is_said_once(launch: Launch, tmp_path: Path, size: int, who: str) -> None:
    line = "rank 3 (n2) did not answer within 120 s"
    body = f'if {who}:\n    say("{CANNOT_BEGIN}{line}")\n    os._exit(76)\ntime.sleep(0.2); follow()'
    code, _, err = finish(launch(FOLLOWS + body, num_processes=size))
    assert (code, reason(tmp_path)) == (76, f"cannot begin: {line}")
    assert [each for each in err.splitlines() if not each.startswith(LOST_PEER)] == [f"{CANNOT_BEGIN}{line}"]


@SIZES
def test_a_launch_whose_logs_are_removed_ends_with_76_and_one_line(launch: Launch, tmp_path: Path, size: int) -> None:
    body = """
rank or __import__("shutil").rmtree(here / "logs")
rank and time.sleep(0.5)
rank and follow()
say("dsft: RUN is gone: it was removed or renamed; this process writes no more")
os._exit(76)
"""
    code, _, err = finish(launch(FOLLOWS + body, num_processes=size))
    assert code == 76
    assert err == "dsft: RUN is gone: it was removed or renamed; this process writes no more\n"
    assert reason(tmp_path) == "RUN is gone: it was removed or renamed; this process writes no more"


@SIZES
def test_an_error_is_known_though_the_logs_are_removed(launch: Launch, tmp_path: Path, size: int) -> None:
    body = """
__import__("shutil").rmtree(here / "logs", True)
last or (time.sleep(0.5), follow())
fail("KeyError: 1")
os._exit(76)
"""
    assert finish(launch(FOLLOWS + body, num_processes=size))[0] == 76
    assert reason(tmp_path) == f"rank {size - 1}: KeyError: 1"


@SIZES
def test_a_launch_that_is_done_or_stopped_has_no_reason(launch: Launch, tmp_path: Path, size: int) -> None:
    for code in (0, 75):
        assert finish(launch(f"sys.exit({code})", num_processes=size))[0] == code
        assert reason(tmp_path) is None


SAVES = """
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
asked = []
ready()
while not asked:
    time.sleep(0.01)
END
"""
LOSES = f'time.sleep(0.3); print("{LOST_PEER}RuntimeError: Connection closed by peer", file=sys.stderr); os._exit(76)'


@SIZES
@pytest.mark.parametrize("end", ["time.sleep(60)", LOSES], ids=["waits for it", "loses it"])
def test_a_request_to_stop_before_all_ranks_are_bound_to_it_is_75(
    launch: Launch, tmp_path: Path, size: int, end: str
) -> None:
    begins = f"if rank == {size - 1}:\n    ready()\n    time.sleep(60)\n"
    process = launch(begins + SAVES.replace("END", end), num_processes=size, grace_s=60.0)
    pids = [pid_of(tmp_path, str(rank)) for rank in range(size)]
    os.kill(process.pid, signal.SIGTERM)
    code, _, err = finish(process)
    assert (code, reason(tmp_path)) == (75, None)
    assert f"dsft: stopped without a save: rank {size - 1} had only just begun" in err
    assert not wait_gone(pids)


def test_an_error_after_a_request_to_stop_is_still_one(launch: Launch, tmp_path: Path) -> None:
    crash = f'print("{CRASH}OSError: no space", file=sys.stderr); os._exit(76)'
    begins = "if rank == 1:\n    ready()\n    time.sleep(60)\n"
    process = launch(begins + SAVES.replace("END", crash))
    for rank in range(2):
        pid_of(tmp_path, str(rank))
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process)[0] == 76
    assert reason(tmp_path) == "rank 0: OSError: no space"
