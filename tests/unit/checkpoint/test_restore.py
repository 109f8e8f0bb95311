"""No damaged checkpoint is loaded: the older one is taken, the bad one set aside, the bad file named."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cells import write_rows
from benchmarks.faults import words
from dsft import folder
from dsft.checkpoint import manifest
from dsft.checkpoint.lease import LeaseLostError, acquire
from dsft.checkpoint.store import Store
from dsft.comm.world import World
from dsft.compose import load_yaml, read
from dsft.engine.assemble import Session, assemble
from dsft.engine.resume import resume

STEPS = [1, 3, 6]
FILES = ["manifest.json", ".metadata", "__0_0.distcp", "__1_0.distcp"]


class Told:
    """A watch that keeps the events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, dict[str, object]]] = []

    def event(self, event: str, step: int, details: dict[str, object]) -> None:
        self.events.append((event, step, details))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with checkpoints of three steps."""
    place = tmp_path_factory.mktemp("finished")
    write_rows(place / "rows.jsonl", 10)
    command = words(place / "rows.jsonl", ["method=lora", "strategy=fsdp"], 2, background=False, steps=6)
    run = [sys.executable, "-m", "dsft.run", *command, "checkpoint.keep=9", f"run_dir={place / 'run'}"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(path.name[5:]) for path in reversed(Store(place / "run").newest_first())] == STEPS
    return place / "run"


@pytest.fixture(scope="module")
def session(finished: Path) -> Session:
    run = read(finished)
    from dsft.strategies.single import Single

    alone = World(0, 1, 0, torch.device("cpu"))
    run = replace(run, strategy=Single())
    return assemble(run, run.model.resolve(), alone)


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resumed(session: Session, run_dir: Path) -> tuple[int, Told]:
    told = Told()
    who = folder.identity(run_dir, load_yaml(run_dir / "config.yaml"))
    lease, _ = acquire(run_dir / "checkpoints")
    return resume(session, run_dir, who, lease, 9, told).step, told  # type: ignore[arg-type]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def zero_a_block(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(len(content[middle : middle + 64]))
    path.write_bytes(content)


def put_an_older_one_there(path: Path) -> None:
    shutil.copy(path.parent.with_name(manifest.folder_name(3)) / path.name, path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, zero_a_block, Path.unlink, put_an_older_one_there])
def test_a_damaged_file_is_named_and_the_older_step_taken(
    name: str, damage: Callable[[Path], None], session: Session, run_dir: Path
) -> None:
    newest = run_dir / "checkpoints" / manifest.folder_name(6)
    assert sorted(path.name for path in newest.iterdir()) == sorted(FILES)
    damage(newest / name)
    step, told = resumed(session, run_dir)
    assert step == 3
    (event, bad, details), *_ = told.events
    assert (event, bad, details["file"]) == ("quarantine", 6, name)
    assert not newest.exists()
    assert (run_dir / "quarantine" / newest.name / "reason.json").is_file()


def test_a_file_of_an_older_step_is_recognized_as_such(session: Session, run_dir: Path) -> None:
    """Also where size and place are right: DCP by itself would load a mixture of two steps."""
    newest = run_dir / "checkpoints" / manifest.folder_name(6)
    put_an_older_one_there(newest / "__1_0.distcp")
    _, told = resumed(session, run_dir)
    assert "belongs elsewhere (dsft checkpoint, step 3" in str(told.events[0][2]["reason"])


def test_whole_checkpoints_load_and_say_from_where(session: Session, run_dir: Path) -> None:
    step, told = resumed(session, run_dir)
    assert step == 6
    assert told.events == [("resume", 6, {"checkpoint": "step-00000006", "ranks_then": 2, "ranks_now": 1})]


def test_nothing_left_that_verifies_begins_anew(session: Session, run_dir: Path) -> None:
    for path in (run_dir / "checkpoints").glob("step-*/__0_0.distcp"):
        flip_a_bit(path)
    step, told = resumed(session, run_dir)
    assert step == 0
    assert [event for event, _, _ in told.events] == ["quarantine"] * len(STEPS)


def test_a_checkpoint_that_crashed_two_starts_is_passed_over(session: Session, run_dir: Path) -> None:
    store = Store(run_dir)
    store.mark_crash(6, attempt=2)
    store.mark_crash(6, attempt=2)  # the other rank of the same attempt
    assert resumed(session, run_dir)[0] == 6
    store.mark_crash(6, attempt=3)
    step, told = resumed(session, run_dir)
    assert step == 3
    assert told.events[0][2]["reason"] == "2 starts from it crashed"
    assert store.crashes(run_dir / "checkpoints" / manifest.folder_name(6)) == 0


def test_what_nobody_finished_is_removed(session: Session, run_dir: Path) -> None:
    for leftover in ("step-00000009.tmp-1234", "step-00000001.old-1234"):
        (run_dir / "checkpoints" / leftover).mkdir()
    assert resumed(session, run_dir)[0] == 6
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("step-*")) == [
        manifest.folder_name(step) for step in STEPS
    ]


def test_another_runs_checkpoint_is_not_taken(session: Session, run_dir: Path) -> None:
    provenance = json.loads((run_dir / "provenance.json").read_text())
    (run_dir / "provenance.json").write_text(json.dumps({**provenance, "run": "another"}))
    step, told = resumed(session, run_dir)
    assert step == 0
    assert "belongs to another run" in str(told.events[0][2]["reason"])


def test_another_optimizer_begins_anew_on_what_was_learned(session: Session, run_dir: Path) -> None:
    content = json.loads((run_dir / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert content["progress"]["optimizer"] == "adamw"
    other = replace(session, run=replace(session.run, optim=replace(session.run.optim, name="sgd")))
    session.run.strategy.update.optimizer.state.clear()
    step, told = resumed(other, run_dir)
    assert step == 6
    assert [event for event, _, _ in told.events] == ["optimizer_anew", "resume"]
    assert not session.run.strategy.update.optimizer.state


def test_a_starter_that_lost_its_lease_moves_nothing(session: Session, run_dir: Path) -> None:
    flip_a_bit(run_dir / "checkpoints" / manifest.folder_name(6) / "__0_0.distcp")
    unfinished = Store(run_dir).begin(9)
    slow, _ = acquire(run_dir / "checkpoints")
    acquire(run_dir / "checkpoints")
    who = folder.identity(run_dir, load_yaml(run_dir / "config.yaml"))
    with pytest.raises(LeaseLostError):
        resume(session, run_dir, who, slow, 9, Told())  # type: ignore[arg-type]
    assert unfinished.is_dir()
    assert (run_dir / "checkpoints" / manifest.folder_name(6)).is_dir()


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    session: Session, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_right(path: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(manifest, "_sha256", no_right)
    with pytest.raises(PermissionError):
        resumed(session, run_dir)
    assert (run_dir / "checkpoints" / manifest.folder_name(6)).is_dir()


def test_a_lost_provenance_keeps_the_runs_own_name(run_dir: Path) -> None:
    before = folder.provenance(run_dir)
    resolved = load_yaml(run_dir / "config.yaml")
    (run_dir / "provenance.json").unlink()
    assert folder._known(run_dir)["run"] == before["run"]
    same = {key: before[key] for key in ("base_digest", "data_digest")}
    folder.check_digests(run_dir, same, resolved)
    with pytest.raises(ValueError, match=r"data was .* by its content"):
        folder.check_digests(run_dir, {**same, "data_digest": "other rows"}, resolved)


def test_retention_keeps_the_newest_and_the_round_ones(run_dir: Path) -> None:
    store = Store(run_dir)
    assert store.retain(keep=1, keep_every=3, newest=6) == [1]
    assert store.retain(keep=1, keep_every=0, newest=3) == []  # 3 was just written, 6 is the newest
    assert store.retain(keep=1, keep_every=0, newest=6) == [3]
    assert [path.name for path in store.newest_first()] == [manifest.folder_name(6)]


def test_only_the_newest_writer_may_commit(tmp_path: Path) -> None:
    first, before = acquire(tmp_path / "checkpoints")
    assert before is None
    first.check()
    second, holder = acquire(tmp_path / "checkpoints")
    assert second.token > first.token
    assert "process" in str(holder)
    second.check()
    with pytest.raises(LeaseLostError, match="was taken over by process"):
        first.check()


def test_an_unfinished_save_that_was_cleared_cannot_be_committed(run_dir: Path) -> None:
    """The gap between the last look at the lease and the rename: the newer writer's clearing closes it."""
    store = Store(run_dir)
    lease, _ = acquire(store.folder)
    place = store.begin(9)
    content = manifest.read(store.newest_first()[0])
    store.clear()
    with pytest.raises(FileNotFoundError):
        store.commit(place, content, lease)
    assert len(store.newest_first()) == len(STEPS)
