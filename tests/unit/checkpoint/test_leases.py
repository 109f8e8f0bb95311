"""A run that a living process of another start holds is not taken over; one whose process is gone is, at once."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsft.checkpoint.lease import (
    START,
    HeldError,
    Lease,
    LeaseLostError,
    acquire,
    claim,
    holder,
    refuse_living,
)
from dsft.checkpoint.store import Store

HOLD = """
import os, sys, time
from pathlib import Path
from dsft.checkpoint.lease import acquire
lease, _ = acquire(Path(sys.argv[1]), os.environ)
with lease.beating():
    print("held", flush=True)
    sys.stdin.read()
"""
MINE = {START: "the second shell"}
OTHER_HOST = {"host": "another-node"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@contextmanager
def holding(folder: Path, start: str = "the first shell") -> "Iterator[subprocess.Popen[str]]":
    """A process that holds folder's run inside, unless it was ended."""
    env = {**os.environ, START: start}
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def newest(folder: Path) -> Path:
    return max(folder.glob("lease-*"))


def amend(folder: Path, values: Mapping[str, object], *, age_s: float = 0.0) -> None:
    """Change what the newest lease file says, as if it had been written elsewhere and last touched so long ago."""
    path = newest(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    now = time.time()
    os.utime(path, (now - age_s, now - age_s))


def test_only_the_newest_writer_may_commit(folder: Path) -> None:
    first, before = acquire(folder)
    assert before is None
    first.check()
    second, earlier = acquire(folder)
    assert second.token > first.token
    assert "process" in str(earlier)
    second.check()
    with pytest.raises(LeaseLostError, match="was taken over by process"):
        first.check()


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "SIGSTOP"])
def test_a_living_run_is_not_taken_over(stopped: bool, folder: Path) -> None:
    with holding(folder) as first:
        if stopped:
            first.send_signal(signal.SIGSTOP)
        before = sorted(path.name for path in folder.iterdir())
        for take in (claim, acquire, refuse_living):
            with pytest.raises(HeldError) as held:
                take(folder, MINE)
            said = str(held.value)
            assert f"process {first.pid} on {socket.gethostname()}, since 20" in said
            assert "resume.takeover=true" in said
            assert "\n" not in said
        assert sorted(path.name for path in folder.iterdir()) == before
        who = holder(folder.parent)
        assert who is not None
        assert who.alive
        assert who.line.startswith(f"process {first.pid} on ")


@pytest.mark.parametrize("waited_for", [False, True], ids=["zombie", "gone"])
def test_a_dead_ones_run_is_taken_over_at_once(waited_for: bool, folder: Path) -> None:
    with holding(folder) as first:
        first.kill()
        if waited_for:
            first.wait()
        else:
            os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
        who = holder(folder.parent)
        assert who is not None
        assert not who.alive
        claimed = claim(folder, MINE)
        lease, before = acquire(folder, MINE)
        assert lease.token == claimed.token + 1
        assert str(before).startswith(f"process {first.pid} on "), "not the claim of its own start"


def test_takeover_takes_a_living_run(folder: Path) -> None:
    with holding(folder):
        token = int(newest(folder).name[6:])
        assert claim(folder, MINE, takeover=True).token == token + 1
        assert acquire(folder, MINE)[0].token == token + 2


def test_processes_of_one_start_take_over_from_each_other(folder: Path) -> None:
    with holding(folder, MINE[START]):
        refuse_living(folder, MINE)
        assert acquire(folder, MINE)[0].token == 2


def test_who_left_holds_nothing_also_for_another_host(folder: Path) -> None:
    with holding(folder) as first:
        amend(folder, OTHER_HOST)
        with pytest.raises(HeldError):
            claim(folder, MINE)
        assert first.stdin is not None
        first.stdin.close()
        assert first.wait() == 0
        assert "released" in json.loads(newest(folder).read_text())
        amend(folder, OTHER_HOST)
        claim(folder, MINE)


@pytest.mark.parametrize(("age_s", "held"), [(0.0, True), (45.0, True), (75.0, False)])
def test_on_another_host_the_heartbeat_tells(age_s: float, held: bool, folder: Path) -> None:
    acquire(folder, {START: "elsewhere"})
    amend(folder, OTHER_HOST, age_s=age_s)
    who = holder(folder.parent)
    assert who is not None
    assert who.alive == held
    if held:
        with pytest.raises(HeldError, match="on another-node"):
            claim(folder, MINE)
    else:
        claim(folder, MINE)


def test_another_container_of_this_host_is_judged_by_its_heartbeat(folder: Path) -> None:
    acquire(folder, {START: "elsewhere"})
    amend(folder, {"space": "pid:[1]", "pid": 2**30})
    with pytest.raises(HeldError):
        claim(folder, MINE)
    amend(folder, {}, age_s=75.0)
    claim(folder, MINE)


def test_a_pid_that_another_process_has_by_now_holds_nothing(folder: Path) -> None:
    with holding(folder):
        amend(folder, {"started": 1})
        claim(folder, MINE)


def test_a_lease_of_an_older_dsft_is_held_only_if_its_pid_lives_on_this_host(folder: Path) -> None:
    with holding(folder) as first:
        old = {"pid": first.pid, "host": socket.gethostname(), "time": time.time()}
        newest(folder).write_text(json.dumps(old))
        with pytest.raises(HeldError):
            claim(folder, MINE)
        newest(folder).write_text(json.dumps({**old, **OTHER_HOST}))
        claim(folder, MINE)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_lease_that_says_nothing_holds_nothing(content: str, folder: Path) -> None:
    acquire(folder, MINE)
    newest(folder).write_text(content)
    assert acquire(folder, {START: "other"}) == (
        Lease(folder, 2, json.loads(newest(folder).read_text())),
        "another process",
    )


def test_a_beat_touches_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsft.checkpoint.lease.BEAT_S", 0.01)
    lease, _ = acquire(folder, MINE)
    os.utime(newest(folder), (0, 0))
    with lease.beating():
        while newest(folder).stat().st_mtime == 0:
            time.sleep(0.01)
        shutil.rmtree(folder)
    assert not folder.exists()


def test_a_run_that_is_gone_is_not_written_any_more(folder: Path) -> None:
    lease, _ = acquire(folder, MINE)
    shutil.rmtree(folder.parent)
    for strict in (False, True):
        with pytest.raises(LeaseLostError, match=f"{folder.parent} is gone"):
            lease.check(strict=strict)
    with pytest.raises(OSError, match="No such file"):
        Store(folder.parent).begin(3)
    assert not folder.parent.exists()


@pytest.mark.parametrize("gone", ["folder", "file"])
def test_checkpoints_alone_that_are_gone_are_made_again(gone: str, folder: Path) -> None:
    acquire(folder, MINE)
    lease, _ = acquire(folder, MINE)
    shutil.rmtree(folder)
    if gone == "file":
        folder.mkdir()
    lease.check(strict=True)
    assert [path.name for path in folder.iterdir()] == ["lease-000002"]
    with holding(folder, MINE[START]), pytest.raises(LeaseLostError, match="was taken over"):
        lease.check()


def test_a_new_run_in_the_place_of_a_removed_one_is_left_alone(folder: Path) -> None:
    for _ in range(3):
        lease, _ = acquire(folder, MINE)
    shutil.rmtree(folder.parent)
    with holding(folder):
        assert [path.name for path in folder.iterdir()] == ["lease-000001"]
        with pytest.raises(LeaseLostError, match="was taken over by process"):
            lease.check()
        assert [path.name for path in folder.iterdir()] == ["lease-000001"]


def test_a_folder_that_cannot_be_read_says_nothing(folder: Path) -> None:
    lease, _ = acquire(folder, MINE)
    shutil.rmtree(folder)
    folder.write_text("")
    lease.check()
    with pytest.raises(NotADirectoryError):
        lease.check(strict=True)


def test_a_restart_by_torchrun_takes_over_from_the_attempt_before(folder: Path) -> None:
    with holding(folder):
        amend(folder, {"start": "torchrun:first", **OTHER_HOST})
        again = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1", START: "second"}
        with pytest.raises(HeldError):
            acquire(folder, {**again, "TORCHELASTIC_RESTART_COUNT": "0"})
        acquire(folder, again)


def test_of_two_that_claim_at_once_one_is_refused(folder: Path) -> None:
    code = HOLD.replace("acquire(", "claim(").replace("import acquire", "import claim").replace("lease, _", "lease")
    command = [sys.executable, "-c", code.replace("print(", "print(os.environ['DSFT_START'], "), str(folder)]
    four = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, START: name},
        )
        for name in ("a", "b", "c", "d")
    ]  # fmt: skip
    try:
        said = [process.stdout.readline() for process in four if process.stdout]
    finally:
        errors = [process.communicate()[1] for process in four]
    assert sum("held" in line for line in said) == 1, errors
    assert sum("HeldError" in error for error in errors) == 3
