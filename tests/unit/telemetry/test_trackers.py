"""Trackers: real wandb in offline mode, a real TensorBoard event file, and one that fails."""

import importlib.util
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from dsft.telemetry import track_wandb
from dsft.telemetry.track_auto import AutoTracker
from dsft.telemetry.track_none import NoTracker
from dsft.telemetry.track_tensorboard import TensorBoardTracker
from dsft.telemetry.track_wandb import WandbTracker, reachable
from dsft.telemetry.trackers import Trackers

KEYS: dict[str, Any] = {"project": "p", "entity": None, "name": None, "group": "g"}


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))


def stored_history(run_dir: Path, count: int) -> list[dict[str, Any]]:
    """Every logged row of the offline runs under run_dir; wandb's service may write the last a moment after finish."""
    rows: list[dict[str, Any]] = []
    until = time.monotonic() + 10.0
    while len(rows) < count and time.monotonic() < until:
        rows = _history(run_dir)
        time.sleep(0.1)
    return rows


def _history(run_dir: Path) -> list[dict[str, Any]]:
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        for data in stored_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in items.items()})
    return rows


def stored_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: 7 bytes of header, then blocks of 32 KiB of (crc32, length, type, piece)."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, last
            yield record
            record = b""


def descendants(pid: int) -> list[int]:
    """Every process below pid."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [*children, *(below for child in children for below in descendants(child))]


def test_wandb_offline_keeps_its_files_its_id_and_its_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    first = WandbTracker(mode="auto", **KEYS)
    first.check()
    assert first.resolved_mode() == "offline"
    run_id = first.open(run_dir, {"train": {"steps": 3}}, None)
    first.log(1, {"loss": 2.0})
    first.log(2, {"loss": 1.0})
    first.close()
    assert run_id
    time.sleep(1.1)  # wandb names the folder of an attempt by the second
    second = WandbTracker(mode="offline", **KEYS)
    assert second.open(run_dir, {"train": {"steps": 4}}, run_id) == run_id
    second.log(3, {"loss": 0.5})
    second.log(3, {"eval/loss": 0.7})
    second.close()
    second.close()
    rows = stored_history(run_dir, 3)
    assert [(row["_step"], row["loss"]) for row in rows] == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert rows[2]["eval/loss"] == 0.7
    assert {path.name for path in run_dir.iterdir()} == {"wandb"}
    assert capfd.readouterr() == ("", "")


def test_wandb_service_outlives_the_preemption_signals(tmp_path: Path) -> None:
    tracker = WandbTracker(mode="offline", **KEYS)
    tracker.open(tmp_path, {}, None)
    time.sleep(1.0)  # the service starts one more process
    started = descendants(os.getpid())
    assert started
    for pid in started:
        os.kill(pid, signal.SIGUSR1)
        os.kill(pid, signal.SIGUSR2)
    time.sleep(0.3)
    assert set(started) <= set(descendants(os.getpid()))
    tracker.log(1, {"loss": 2.0})
    tracker.close()
    assert [row["loss"] for row in stored_history(tmp_path, 1)] == [2.0]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, set()) & {signal.SIGUSR1, signal.SIGUSR2}


ORPHANED = """
import os, signal, sys, time
from pathlib import Path
from dsft.telemetry.track_wandb import WandbTracker, reachable
from dsft.telemetry.trackers import Trackers

wandb = WandbTracker(mode="offline", project="p", entity=None, name=None, group=None)
trackers = Trackers({"wandb": wandb}, lambda name, message: print(message))
trackers.open(Path(sys.argv[1]), {}, None)
for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
    os.kill(int(pid), signal.SIGTERM)
time.sleep(1.0)
for step in (1, 2, 3):
    trackers.log(step, {"loss": 1.0})
    time.sleep(0.2)
trackers.close()
"""


def test_a_wandb_service_that_died_is_named_once_and_the_run_goes_on(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ORPHANED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("tracker wandb failed and is left out from here on: ConnectionResetError")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_wandb_mode_follows_key_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tracker = WandbTracker(mode="auto", **KEYS)
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    assert tracker.resolved_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracker.resolved_mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(ValueError, match="WANDB_MODE must be one of"):
        tracker.check()


def test_wandb_goes_offline_and_says_so_where_its_server_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    told: list[tuple[str, str]] = []
    trackers = Trackers({"auto": AutoTracker(**KEYS)}, lambda name, message: told.append((name, message)))
    assert trackers.open(tmp_path, {}, "some1d") == "some1d"
    trackers.log(1, {"loss": 2.0})
    trackers.close()
    assert [row["loss"] for row in stored_history(tmp_path, 1)] == [2.0]
    assert len(told) == 1
    assert told[0][1].startswith("tracker auto: http://127.0.0.1:9 cannot be reached, wandb is offline; wandb sync")


def test_a_server_is_reachable_if_it_answers_anything_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # says 501 to every request
        Thread(target=server.handle_request).start()
        assert reachable(f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(track_wandb, "PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not reachable(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_wandb_online_without_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tracker.wandb.mode=online needs a key.*choose tracker.wandb.mode=offline"):
        WandbTracker(mode="online", **KEYS).check()


def test_an_absent_package_is_refused_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "wandb")
    with pytest.raises(ValueError, match=r"wandb, which is missing; pip install 'dsft\[wandb\]'"):
        WandbTracker(mode="offline", **KEYS).check()
    hide(monkeypatch, "tensorboard")
    with pytest.raises(ValueError, match=r"pip install 'dsft\[tensorboard\]'"):
        TensorBoardTracker(flush_s=1.0).check()


def test_auto_takes_wandb_only_where_it_is_set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    auto = AutoTracker(**KEYS)
    auto.check()
    assert auto.why() == "tracker=auto: none, no W&B key and no WANDB_MODE is set"
    assert auto.open(tmp_path, {}, None) is None
    auto.log(1, {"loss": 1.0})
    auto.close()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "none" in auto.why()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert auto.why() == "tracker=auto: wandb, offline"
    hide(monkeypatch, "wandb")
    assert "wandb is missing" in auto.why()
    assert auto.open(tmp_path, {}, None) is None


def test_auto_logs_to_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    auto = AutoTracker(**KEYS)
    assert auto.open(tmp_path, {}, "some1d") == "some1d"
    auto.log(1, {"loss": 4.0})
    auto.close()
    assert [row["loss"] for row in stored_history(tmp_path, 1)] == [4.0]


def test_tensorboard_file_reads_back_with_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 4), (3, 6)):  # the second attempt does steps 3 and 4 again
        tracker = TensorBoardTracker(flush_s=10.0)
        tracker.check()
        assert tracker.open(tmp_path, {}, None) is None
        for step in range(first, last + 1):
            tracker.log(step, {"loss": first + step, "lr": 0.1})
        tracker.close()
        tracker.close()
        time.sleep(1.1)  # event files are named by the second
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 2.0), (2, 3.0), (3, 6.0), (4, 7.0), (5, 8.0), (6, 9.0),
    ]  # fmt: skip


def test_tensorboard_refuses_an_interval_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"tracker.tensorboard.flush_s must be above 0, got 0"):
        TensorBoardTracker(flush_s=0.0)


class Failing:
    def open(self, run_dir: Path, config: Mapping[str, Any], run_id: str | None) -> str | None:
        return "id"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        raise ConnectionError("gone")

    def close(self) -> None:
        raise AssertionError("a tracker that failed gets no further call")


def test_a_tracker_that_fails_is_named_once_and_left_out(tmp_path: Path) -> None:
    faults: list[tuple[str, str]] = []
    trackers = Trackers({"none": NoTracker(), "bad": Failing()}, lambda name, message: faults.append((name, message)))
    assert trackers.open(tmp_path, {}, None) == "id"
    for step in (1, 2):
        trackers.log(step, {"loss": 1.0})
    trackers.close()
    assert [name for name, _ in faults] == ["bad"]
    assert "ConnectionError('gone')" in faults[0][1]
    assert list(trackers.live) == ["none"]
