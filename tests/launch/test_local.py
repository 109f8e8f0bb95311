"""The local launcher on real processes: tiny scripts, no torch, a launcher process per test."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.toys import Launch, finish, launches, pid_of, wait_gone


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    yield from launches(tmp_path)


def test_ranks_get_torchruns_variables_and_a_log_each(launch: Launch, tmp_path: Path) -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE OMP_NUM_THREADS"
    body = f"print(*[os.environ[name] for name in '{names}'.split()]); print('warn', rank, file=sys.stderr)"
    code, out, err = finish(launch(body))
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert code == 0
    assert out == f"0 2 0 2 {threads}\n"
    assert err == "warn 0\n"
    logs = [(tmp_path / "logs" / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert sorted(logs[0].splitlines()) == sorted([*out.splitlines(), "warn 0"])
    assert f"1 2 1 2 {threads}" in logs[1]
    assert "warn 1" in logs[1]


def test_what_the_user_set_is_kept(launch: Launch) -> None:
    _, out, _ = finish(launch("print(os.environ['OMP_NUM_THREADS'])", OMP_NUM_THREADS="7"))
    assert out == "7\n"


def test_rank_0_is_heard_while_it_runs(launch: Launch) -> None:
    process = launch("print('first step'); time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "first step\n"
    process.terminate()


def test_a_terminal_that_takes_nothing_holds_no_rank(launch: Launch, tmp_path: Path) -> None:
    process = launch("print(*('line %d' % n for n in range(20_000)), sep='\\n')", num_processes=1)
    assert process.wait(timeout=60) == 0  # nobody reads what it says, and a pipe holds 64 KiB
    assert (tmp_path / "logs" / "rank-0.log").read_text().splitlines() == [f"line {n}" for n in range(20_000)]


def test_kill_9_of_one_rank_ends_all_and_names_it(launch: Launch, tmp_path: Path) -> None:
    process = launch("print('step 7 done'); signal.signal(signal.SIGTERM, lambda *_: None); ready(); time.sleep(60)")
    pids = [pid_of(tmp_path, str(rank)) for rank in range(2)]
    start = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    code, _, err = finish(process)
    assert time.monotonic() - start < 12
    assert code == 76
    assert "rank 1 of 2 was killed by SIGKILL" in err
    assert "step 7 done" in err
    assert not wait_gone(pids)


def test_the_rank_that_raised_is_shown_and_not_its_victims(launch: Launch, tmp_path: Path) -> None:
    body = """
ready()
while not all((here / f"pid-{r}").exists() for r in range(2)):
    time.sleep(0.01)
if rank == 1:
    try:
        raise ValueError("rows must carry labels")
    finally:
        time.sleep(0.3)  # slower to leave than the rank that follows from it
raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:42")
"""
    code, _, err = finish(launch(body))
    assert code == 76
    shown = err[err.index("dsft: ") :]
    assert "rank 1 of 2 left with exit code 1" in shown
    assert shown.splitlines()[-1].strip() == "ValueError: rows must carry labels"
    assert "Connection closed" not in shown
    assert str(tmp_path / "logs" / "rank-1.log") in shown


def test_only_this_launch_is_read_from_a_log_that_goes_on(launch: Launch) -> None:
    finish(launch("raise ValueError('of old')", num_processes=1))
    code, _, err = finish(launch("os.kill(os.getpid(), signal.SIGKILL)", num_processes=1))
    assert code == 76
    assert "of old" not in err
    assert "it wrote nothing" in err


def test_a_user_error_is_said_once(launch: Launch) -> None:
    body = "print('data.path must exist, got x.jsonl', file=sys.stderr); sys.exit(2)"
    assert finish(launch(body)) == (2, "", "data.path must exist, got x.jsonl\n")


def test_a_user_error_of_another_rank_is_said_too(launch: Launch, tmp_path: Path) -> None:
    body = "ready(); rank == 0 and time.sleep(60); print('row 9 is empty', file=sys.stderr); sys.exit(2)"
    assert finish(launch(body)) == (2, "", "row 9 is empty\n")
    assert not wait_gone([pid_of(tmp_path, "0"), pid_of(tmp_path, "1")])


LEAVES_WITH_75 = """
asked = []
signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
ready()
while not asked:
    time.sleep(0.01)
time.sleep(1.0)  # saves
print("asked", len(asked), "times")
sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_request_to_stop_is_passed_on_once(launch: Launch, tmp_path: Path, number: signal.Signals) -> None:
    process = launch(LEAVES_WITH_75)
    pids = [pid_of(tmp_path, str(rank)) for rank in range(2)]
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 75
    assert out == "asked 1 times\n"
    assert number.name in err
    assert not wait_gone(pids)


def test_a_request_to_stop_while_ranks_still_import_is_75(launch: Launch, tmp_path: Path) -> None:
    process = launch("signal.signal(signal.SIGINT, signal.SIG_DFL); ready(); time.sleep(60)")
    pids = [pid_of(tmp_path, str(rank)) for rank in range(2)]
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 75
    assert not wait_gone(pids)


def test_ranks_that_do_not_leave_are_killed_after_the_grace(launch: Launch, tmp_path: Path) -> None:
    body = "signal.signal(signal.SIGINT, signal.SIG_IGN); ready(); rank == 0 and sys.exit(75); time.sleep(60)"
    process = launch(body, grace_s=1.0)
    pids = [pid_of(tmp_path, str(rank)) for rank in range(2)]
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 76
    assert "killed rank 1" in err
    assert not wait_gone(pids)


WITH_GRANDCHILDREN = """
nap = [sys.executable, "-c", "import time; time.sleep(60)"]
children = [subprocess.Popen(nap), subprocess.Popen(nap, start_new_session=True)]
for index, child in enumerate(children):
    (here / f"pid-{rank}-{index}").write_text(str(child.pid))
ready()
time.sleep(60)
"""


def family(folder: Path) -> list[int]:
    ranks = [pid_of(folder, str(rank)) for rank in range(2)]
    return ranks + [int((folder / f"pid-{rank}-{child}").read_text()) for rank in range(2) for child in range(2)]


def test_kill_9_of_the_launcher_leaves_no_process(launch: Launch, tmp_path: Path) -> None:
    process = launch(WITH_GRANDCHILDREN)
    pids = family(tmp_path)
    process.kill()
    process.wait()
    assert not wait_gone(pids)


def test_a_failure_leaves_no_grandchild(launch: Launch, tmp_path: Path) -> None:
    process = launch(WITH_GRANDCHILDREN)
    pids = family(tmp_path)
    os.kill(pids[0], signal.SIGKILL)
    assert finish(process)[0] == 76
    assert not wait_gone(pids, timeout_s=0.5)


MEET = """
place = os.environ["DSFT_MEETING"]
found = os.stat(place)
if rank == 0:
    open(os.path.join(place, "store"), "w").close()
    print(place, found.st_uid, oct(found.st_mode))
ready()
"""


def test_each_launch_has_a_private_folder_to_meet_in_which_it_removes(launch: Launch) -> None:
    first, second = launch(MEET), launch(MEET)
    outcomes = [finish(first), finish(second)]
    assert [code for code, _, _ in outcomes] == [0, 0]
    places = [out.split() for _, out, _ in outcomes]
    assert all(rest == [str(os.geteuid()), "0o40700"] for _, *rest in places)
    assert len({place for place, *_ in places}) == 2
    assert not any(Path(place).exists() for place, *_ in places)


def test_the_folder_goes_also_when_the_launcher_is_killed(launch: Launch, tmp_path: Path) -> None:
    process = launch(f"{MEET}time.sleep(60)")
    assert process.stdout is not None
    place = Path(process.stdout.readline().split()[0])
    pids = [pid_of(tmp_path, str(rank)) for rank in range(2)]
    assert (place / "store").exists()
    process.kill()
    finish(process)
    assert not wait_gone(pids, timeout_s=10)
    until = time.monotonic() + 10
    while place.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not place.exists()
