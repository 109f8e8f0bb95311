"""Ranks that do not come, or do not fit together, as real processes: named at once, and nothing is written."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dsft.compose import compose
from tests.launch.processes import dsft

ROOT = Path(__file__).parents[2]
JOB = [sys.executable, "-m", "dsft.job"]

IMPATIENT = """
import os, sys, time
from pathlib import Path
from dsft.comm import meeting, world

meeting.LIMIT_S, meeting.NOTICE_S = 4.0, 1.0
rank = int(os.environ["RANK"])
"""
ABSENT = (
    IMPATIENT
    + """
if rank == int(sys.argv[2]):
    time.sleep(600)  # the planted fault: this rank hangs until the others are done with it
from dsft import job
sys.exit(job.main())
"""
)
HANGS = (
    IMPATIENT
    + """
if rank == 1:
    meeting.meet(rank, 2)
    time.sleep(600)  # the planted fault: this rank hangs until the others are done with it
world.join()
"""
)
GREETS = (
    IMPATIENT
    + """
import json
from dsft.comm.hello import greet

found = greet(world.join(), {}, sys.argv[1].split(",")[rank])
if rank == 0:
    print(json.dumps(found))
world.leave()
"""
)
LAUNCH = """
import sys
from pathlib import Path
from dsft_launchers.local import launch

size, folder, *command = sys.argv[1:]
sys.exit(launch([sys.executable, "-c", *command], num_processes=int(size), log_dir=Path(folder) / "logs", env={}))
"""


def launched(size: int, folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    typed = [sys.executable, "-c", LAUNCH, str(size), str(folder), *command]
    return subprocess.run(typed, capture_output=True, text=True, check=False, timeout=240)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ranks(command: Sequence[str], each: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """Exit code and stderr of one process per entry of each, what Popen gets for it, as if each had its own node."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}
    started = [
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=more.get("cwd"),
            env={**os.environ, **address, "RANK": str(rank), "WORLD_SIZE": str(len(each)), **more.get("env", {})},
        )
        for rank, more in enumerate(each)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def stopped_run(run_dir: Path, rows: Path, *words: str) -> dict[str, bytes]:
    """A run folder that can be gone on with, and its files' contents."""
    done = dsft(
        "model=tiny", "data=local", f"data.path={rows}", "tracker=[]", "train.precision=fp32", "train.steps=1",
        "train.global_batch_size=4", "checkpoint.verify_result=false", "launcher=local", f"run_dir={run_dir}", *words,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return contents(run_dir)


def contents(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def run_dir(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    stopped_run(folder, rows)
    return folder


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_does_not_come_is_named_and_the_others_leave(absent: int, run_dir: Path, tmp_path: Path) -> None:
    before = contents(run_dir)
    done = launched(3, tmp_path, ABSENT, str(run_dir), str(absent))
    assert done.returncode == 76
    said = [line for line in done.stderr.splitlines() if line.startswith("dsft: cannot begin: ")]
    assert len(said) == 1
    assert said[0].startswith(f"dsft: cannot begin: rank {absent} did not answer within 4 s")
    if absent:
        assert "dsft: waiting for rank 1: no answer for 1 s" in done.stderr.splitlines()
    assert said[0] in (tmp_path / "logs" / "rank-2.log").read_text().splitlines()
    assert contents(run_dir) == before


def test_a_rank_that_hangs_once_all_had_answered_is_named(tmp_path: Path) -> None:
    done = launched(2, tmp_path, HANGS)
    assert done.returncode == 76
    assert "dsft: rank 1 hangs" in done.stderr
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "dsft: this rank waited too long for another: joining: 4 s" in log
    assert "in init_process_group" in log


def test_other_code_on_one_rank_is_refused_in_one_line(run_dir: Path, tmp_path: Path) -> None:
    before = contents(run_dir)
    for name in ("dsft", "conf", "launchers"):
        shutil.copytree(ROOT / name, tmp_path / name)
    with (tmp_path / "dsft" / "engine" / "step.py").open("a") as file:
        file.write("# an edit that reached one node alone\n")
    paths = [f"{root}:{root / 'launchers'}" for root in (ROOT, tmp_path)]
    found = ranks([*JOB, str(run_dir)], [{"env": {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}} for path in paths])
    host = socket.gethostname()
    for code, said in found:
        assert code == 76
        assert "Traceback" not in said
        assert re.search(
            rf"^dsft: cannot begin: rank 1 on {host} has code \w{{12}}, rank 0 on {host} has \w{{12}}; all must be "
            "alike: bring the nodes in line, then start again$", said, re.MULTILINE,
        )  # fmt: skip
    assert contents(run_dir) == before


def test_another_base_model_on_one_node_is_refused(rows: Path, tmp_path: Path) -> None:
    folder = compose(["model=tiny", f"run_dir={tmp_path / 'none'}", "data=local", f"data.path={rows}"]).run.model
    tiny = folder.resolve().folder
    assert tiny is not None
    for place in ("here", "there"):
        shutil.copytree(tiny, tmp_path / place / "base")
    weights = tmp_path / "there" / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    run_dir = tmp_path / "here" / "run"
    done = subprocess.run(
        [sys.executable, "-m", "dsft.run", "model=tiny", "model.path=./base", "data=local", f"data.path={rows}",
         "tracker=[]", "train.precision=fp32", "train.steps=1", "train.global_batch_size=4", "launcher=local",
         "checkpoint.verify_result=false", "run_dir=run"], cwd=tmp_path / "here", capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before = contents(run_dir)
    found = ranks([*JOB, str(run_dir)], [{"cwd": tmp_path / place} for place in ("here", "there")])
    host = socket.gethostname()
    for code, said in found:
        assert code == 76
        assert f"dsft: cannot begin: rank 1 on {host} has base model " in said
        assert "has data" not in said
    assert contents(run_dir) == before


def test_nodes_are_timed_inside_and_with_their_neighbours(tmp_path: Path) -> None:
    done = launched(5, tmp_path, GREETS, "a,a,b,b,c")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [rank["host"] for rank in found["ranks"]] == ["a", "a", "b", "b", "c"]
    assert all({"rank", "pid", "host", "device", "clock_s"} == set(rank) for rank in found["ranks"])
    whole = found["all_reduce"]
    assert whole["gb_per_s"] == pytest.approx(16 * 2**20 / whole["seconds"] / 1e9, rel=0.05)  # both are rounded
    assert {host: set(seconds) for host, seconds in whole["nodes"].items()} == {
        "a": {"inside_s", "across_s"},
        "b": {"inside_s", "across_s"},
        "c": {"across_s"},
    }
    assert all(value > 0 for seconds in whole["nodes"].values() for value in seconds.values())
