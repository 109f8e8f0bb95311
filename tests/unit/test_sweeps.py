"""Sweeps: who shares an array, which machine's accelerators a point gets, what a point's state is, the table."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from dsft_launchers import submit
from dsft_launchers.cluster import Job

from dsft import folder
from dsft.compose import compose
from dsft.dispatch import request
from dsft.sweeps import ledger
from dsft.sweeps.arrays import Ready, arrays
from dsft.sweeps.here import shares
from dsft.sweeps.ledger import Entry
from dsft.sweeps.standing import Standing, _state
from dsft.sweeps.table import as_text, check_metric, metric_of
from dsft.wording import as_value


def point(*words: str) -> Ready:
    return Ready(compose(["model=tiny", "launcher=slurm", "launcher.dry_run=true", *words]), {})


def test_points_that_ask_for_the_same_are_one_array_and_others_are_not() -> None:
    two, one = point("launcher.nodes=2", "launcher.max_parallel=3"), point("launcher.max_parallel=3")
    found = arrays(Path("/s"), {0: one, 1: two, 2: one, 3: two, 4: one}, None, 1001)
    assert [(each.asked.nodes, each.asked.array, each.points) for each in found] == [
        (1, "0,2,4%3", [0, 2, 4]), (2, "1,3%3", [1, 3]),
    ]  # fmt: skip
    assert [each.command[4:6] for each in found] == [["/s:0", "1"], ["/s:0", "2"]]


def test_an_array_is_split_where_the_cluster_allows_no_more_tasks() -> None:
    one = point()
    found = arrays(Path("/s"), dict.fromkeys(range(25), one), None, 10)
    assert [(each.asked.array, each.first) for each in found] == [("0-9", 0), ("0-9", 10), ("0-4", 20)]
    assert [each.command[4] for each in found] == ["/s:0", "/s:10", "/s:20"]


@pytest.mark.parametrize(
    ("visible", "at_once", "devices", "expected"),
    [
        ("", 4, 1, None),
        ("0,1", 4, 0, None),
        ("0,1", 1, 2, None),
        ("2,3,5,7", 2, 2, ["2,3", "5,7"]),
        ("4,6,7", 3, 1, ["4", "6", "7"]),
    ],
)
def test_points_at_a_time_share_the_accelerators(
    visible: str, at_once: int, devices: int, expected: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert shares(at_once, devices) == expected


def test_more_points_at_a_time_than_accelerators_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ValueError, match=r"launcher\.max_parallel must be at most 1 where each point takes 2"):
        shares(2, 2)


RUNS, WAITS, HELD = Job("RUNNING", "None", nodes="n1"), Job("PENDING", "Priority"), Job("PENDING", "JobHeldUser")


@pytest.mark.parametrize(
    ("disk", "job", "expected"),
    [
        (None, None, "missing"),
        ("done", None, "done"),
        ("queued", WAITS, "queued"),
        ("queued", HELD, "held"),
        ("queued", RUNS, "running"),
        ("failed", RUNS, "running"),  # its supervisor starts the ranks again
        ("failed", WAITS, "queued"),
        ("failed", Job("FAILED", "None", 77), "failed"),
        ("restarting", RUNS, "restarting"),
        ("stopping", RUNS, "stopping"),
        ("running", WAITS, "queued"),  # it was lost with its node
        ("restarting", WAITS, "queued"),
        ("running", None, "lost"),
        ("restarting", None, "lost"),
        ("stopping", None, "lost"),
        ("queued", None, "lost"),
        ("stopped", None, "stopped"),
        ("running", Job("NODE_FAIL", "None", left_s=-5.0), "ending"),  # SLURM puts it back within seconds
        ("running", Job("NODE_FAIL", "None", left_s=-50.0), "failed"),
        ("restarting", Job("NODE_FAIL", "None", left_s=-5.0), "ending"),
        ("stopping", Job("CANCELLED", "None"), "stopped"),
        ("queued", Job("CANCELLED", "None"), "stopped"),
    ],
)
def test_what_a_point_is_by_its_folder_and_by_slurm(disk: str | None, job: Job | None, expected: str) -> None:
    status = {} if disk is None else {"state": disk, "step": 3, "reason": "so"}
    assert _state(status, "12_3", job, Path("/nowhere"))[0] == expected


HOLDS = """
import sys
from pathlib import Path

from dsft.checkpoint.lease import acquire

acquire(Path(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["running", "stopping"])
def test_a_run_of_this_machine_is_alive_while_its_process_is(state: str, tmp_path: Path) -> None:
    status = {"state": state, "step": 3, "reason": None}
    assert _state(status, None, None, tmp_path)[0] == "lost", "nobody ever held it"
    program = (
        "import sys; from pathlib import Path; from dsft.checkpoint.lease import acquire; acquire(Path(sys.argv[1])); \
print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "checkpoints")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"\n"
        os.kill(run.pid, signal.SIGSTOP)
        found, who = _state(status, None, None, tmp_path)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    assert found == state
    assert f"process {run.pid} " in str(who)
    assert _state(status, None, None, tmp_path)[0] == "lost"


def test_points_in_every_state_are_shown_and_have_a_code(tmp_path: Path) -> None:
    states = ("queued", "running", "restarting", "stopping", "stopped", "failed", "done", "held", "ending", "lost")
    points = [Standing(index, tmp_path, state, 1, "why", None) for index, state in enumerate(states)]
    book = ledger.begin("loss")
    for index in range(len(points)):
        book.put(index, Entry([f"b={index}"], None), keep=False)
    shown = [line.split()[1] for line in as_text(book, points, "loss").splitlines()[1:]]
    assert [word.lower() for word in shown] == list(states)
    assert [word for word in shown if word.isupper()] == ["FAILED", "LOST"]
    codes = {point.state: point.code for point in points if point.code}
    assert codes == {"stopped": 75, "failed": 76, "lost": 76}


def test_a_ledger_is_read_as_it_was_written_and_keeps_what_a_refused_point_was(tmp_path: Path) -> None:
    book = ledger.begin("eval/loss")
    book.put(1, Entry(["a=1", "b=2"], None), keep=False)
    book.put(0, Entry(["a=1", "b=3"], "no"), keep=False)
    book.put(1, Entry(["a=9"], "another configuration"), keep=True)
    book.write(tmp_path)
    read = ledger.read(tmp_path)
    assert read == book
    assert read is not None
    assert [read.changed(index) for index in (0, 1)] == [["b=3"], ["b=2"]]
    (tmp_path / ledger.NAME).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        ledger.read(tmp_path)


def test_one_process_at_a_time_starts_points(tmp_path: Path) -> None:
    with ledger.alone(tmp_path), pytest.raises(ValueError, match="another process"), ledger.alone(tmp_path):
        pass
    with ledger.alone(tmp_path):
        pass


@pytest.mark.parametrize(
    "name",
    [
        "plain/run-1",
        "a b",
        "it's",
        "back\\'slash",
        "end\\",
        '"q"\\"',
        "x=1,2",
        "(a)[b]{c}",
        "a\\${b}",
        "null",
        "10",
        "\u00e9",
    ],
)
def test_any_folder_can_be_handed_to_hydra(name: str) -> None:
    assert compose(["model=tiny", "launcher=local", f"run_dir={as_value(name)}"]).run.run_dir == name


def test_the_table_has_the_best_first_and_what_has_no_value_last(tmp_path: Path) -> None:
    book = ledger.begin("loss")
    for index, values in enumerate(['{"loss": 2.0, "eval/accuracy": 0.9}', '{"loss": "NaN"}', '{"loss": 1.0}', None]):
        book.put(index, Entry(["a=1", f"b={index}"], None), keep=False)
        (tmp_path / str(index)).mkdir()
        if values is not None:
            (tmp_path / str(index) / "metrics.jsonl").write_text(values + "\n")
    points = [Standing(index, tmp_path / str(index), "done", 1, None, None) for index in range(3)]
    points.append(Standing(3, tmp_path / "3", "failed", 0, "3 attempts; rank 0: x\n  y\nKeyError: z", None))
    order = [line.split()[0] for line in as_text(book, points, "loss").splitlines()[1:]]
    assert order == ["2", "0", "1", "3"]
    assert as_text(book, points, "loss").splitlines()[-1].split(maxsplit=6)[1:] == [
        "FAILED", "0", "-", "3", "-", "3 attempts; KeyError: z",
    ]  # fmt: skip
    assert as_text(book, points, "loss").split(maxsplit=7)[:7] == [
        "point", "state", "step", "loss", "b", "eval/accuracy", "why",
    ]  # fmt: skip
    assert as_text(book, points, "eval/accuracy").splitlines()[1].split()[0] == "0"
    with pytest.raises(ValueError, match="--by must be a metric of the sweep, got los; did you mean loss"):
        check_metric(points, "los")


@pytest.mark.parametrize(
    ("values", "by", "said"),
    [
        (['{"loss": 2.0, "eval/loss": 1.0}', '{"loss": 1.0, "eval/loss": 3.0}', None], "eval/loss", "by eval/loss"),
        (['{"loss": 2.0, "eval/loss": 1.0}', '{"loss": 1.0}'], "loss", "last step, as 1 of 2 points have no eval/loss"),
        ([None], "loss", "as no point has trained"),
    ],
)
def test_points_are_ranked_by_what_was_held_out_where_all_have_it(
    values: list[str | None], by: str, said: str, tmp_path: Path
) -> None:
    book, points = ledger.begin("loss"), []
    for index, line in enumerate(values):
        book.put(index, Entry([f"b={index}"], None), keep=False)
        points.append(Standing(index, tmp_path / str(index), "done", 1, None, None))
        points[index].run_dir.mkdir()
        if line is not None:
            (points[index].run_dir / "metrics.jsonl").write_text(line + "\n")
    assert metric_of(book, points)[0] == by
    assert metric_of(book, points)[1].endswith(said)
    assert metric_of(ledger.begin("eval/accuracy"), points)[0] == "eval/accuracy"


def test_what_a_killed_submission_left_of_a_configuration_does_not_take_its_folder(tmp_path: Path) -> None:
    resolved = point().composed.resolved
    (tmp_path / ".config.yaml.4711").touch()
    folder.check(tmp_path, resolved)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="run_dir must be empty or a run's folder"):
        folder.check(tmp_path, resolved)


def test_variables_that_would_win_over_the_script_do_not_reach_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\nenv > {tmp_path}/env\necho Submitted batch job 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("MEM_PER_NODE", "GPUS_PER_NODE", "SIGNAL", "ARRAY_INX", "NO_KILL", "ACCOUNT", "PARTITION"):
        monkeypatch.setenv(f"SBATCH_{name}", "1")
    asked = replace(request(point("launcher.memory=4G", "launcher.partition=p").composed, None, tmp_path), gpus=2)
    assert submit.submit(asked, ["true"], tmp_path / "slurm") == "7"
    left = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines() if "SBATCH_" in line}
    assert left == {"SBATCH_ACCOUNT"}  # the site's own, which nothing that was asked for says
