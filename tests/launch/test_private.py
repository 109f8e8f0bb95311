"""Where ranks meet: who can reach it, what it listens on, and what may be said there."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from dsft_launchers.place import MEETING, private_folder
from dsft_launchers.verdict import CannotBeginError

from dsft.comm import meeting
from tests.launch.test_meeting import free_port, launched

LOOKS = """
import json, os, sys, torch
from dsft.comm.world import join, leave

def listens():
    here = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    mine = {os.readlink(path) for path in here if os.path.islink(path)}
    found = []
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/self/net/{table}").read().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in mine:
                found.append(words[1].partition(":")[0])
    return found

def outsider(place):
    read, write = os.pipe()
    if os.fork() == 0:
        os.setgid(65534), os.setuid(65534)
        said = []
        for act in (lambda: os.listdir(place), lambda: open(f"{place}/store"), lambda: open(f"{place}/x", "w")):
            try:
                act()
                said.append("")
            except OSError as error:
                said.append(type(error).__name__)
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    return json.loads(os.read(read, 4096))

world = join()
place = os.environ.get("DSFT_MEETING")
refused = ""
try:
    world.gather(torch.ones(1))
except TypeError as error:
    refused = str(error)
seen = {"refused": refused, "listens": listens(), "other": outsider(place) if place and os.geteuid() == 0 else None}
everyone = world.gather(seen)
if world.rank == 0:
    print(json.dumps(everyone))
leave()
"""
LOOPBACK = ("0100007F", "00000000000000000000000001000000")
"""127.0.0.1 and ::1, as the kernel writes them."""


def ranks(address: Mapping[str, str], size: int = 2) -> list[Any]:
    """What LOOKS found on ranks that find each other at an address, as under srun or torchrun."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LOOKS], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)},
        )
        for rank in range(size)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0] * size
    found: list[Any] = json.loads(said[0])
    return found


def test_ranks_of_one_machine_meet_where_nobody_else_can(tmp_path: Path) -> None:
    done = launched(2, tmp_path, LOOKS)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for rank in json.loads(done.stdout):
        assert set(rank["listens"]) <= set(LOOPBACK), "a rank listens on another interface"
        assert len(rank["listens"]) <= 1, "gloo listens, and nothing else: no store"
        assert rank["refused"].startswith("gather sends data between ranks, got Tensor: ")
        assert rank["other"] in (None, ["PermissionError"] * 3)


def test_a_store_of_one_node_listens_on_the_loopback_alone() -> None:
    """Whatever its address is called: all ranks are here."""
    address = {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo"}
    first, second = ranks({**address, "LOCAL_WORLD_SIZE": "2"})
    assert set(first["listens"]) <= set(LOOPBACK)
    assert len(first["listens"]) == 1 + len(second["listens"]), "rank 0 serves the store besides"


def bound(address: str, *, elsewhere: bool) -> str:
    with meeting._listening(address, int(free_port()), elsewhere=elsewhere) as server:
        name: str = server.getsockname()[0]
        return name


def test_a_store_listens_at_its_address_and_nowhere_else(capfd: pytest.CaptureFixture[str]) -> None:
    assert bound("127.0.0.1", elsewhere=False) == "127.0.0.1"
    assert bound("127.0.0.1", elsewhere=True) == "127.0.0.1"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("address", ["192.0.2.1", "127.0.1.1"])
def test_an_address_that_others_know_otherwise_is_told(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert bound(address, elsewhere=True) == "0.0.0.0"
    assert f"listens on all interfaces: MASTER_ADDR={address} is no address of this machine" in capfd.readouterr().err


def test_a_name_without_an_address_is_told() -> None:
    with pytest.raises(CannotBeginError, match=r"rank 0 finds no address for MASTER_ADDR=no\.such\.host\.invalid"):
        meeting._listening("no.such.host.invalid", 1, elsewhere=False)


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = rf"rank 0 cannot listen at 127.0.0.1:{port} \({os.strerror(errno.EADDRINUSE)}"
        with pytest.raises(CannotBeginError, match=said):
            meeting._listening("127.0.0.1", port, elsewhere=False)


def test_a_folder_that_others_may_enter_is_no_place_to_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setenv(MEETING, str(tmp_path))
    with pytest.raises(CannotBeginError, match=f"DSFT_MEETING must name a folder of this user alone, got {tmp_path}"):
        meeting.meet(0, 2)


@pytest.mark.parametrize(("mode", "taken"), [(0o700, True), (0o755, False)])
def test_a_logins_own_folder_is_taken_where_it_is_private(
    mode: int, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    runtime.chmod(mode)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    with private_folder() as place:
        assert (place.parent == runtime) is taken
        assert place.stat().st_mode & 0o777 == 0o700
        (place / "store").touch()
    assert not place.exists()


def test_no_place_to_meet_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone too"))
    said = r"TMPDIR must be a local folder .* got .*gone \(No such file or directory\)"
    with pytest.raises(ValueError, match=said), private_folder():
        pass
