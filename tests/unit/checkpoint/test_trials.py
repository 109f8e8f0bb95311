"""A checkpoint is judged by evidence: it stays set aside only if the run gets past its crash without it."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from dsft.checkpoint import manifest
from dsft.checkpoint.store import Store
from dsft.checkpoint.trials import RECORDS
from dsft.engine.assemble import Session
from dsft.telemetry.record import METRICS, SAMPLES, rewind
from tests.unit.checkpoint.dying import DIED, start
from tests.unit.checkpoint.resuming import resumed

AT = 8
"""The step at which starts from 6 crash."""


def crash_twice(run_dir: Path, *, step: int = 6, at: int = AT) -> None:
    for attempt in (2, 2, 3):  # two ranks of the same attempt count once
        assert Store(run_dir).settle_trial() is None
        Store(run_dir).mark_crash(step, attempt, at)


def there(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in reversed(Store(run_dir).newest_first())]


def aside(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "quarantine").glob("*"))


def test_after_two_crashes_the_older_one_is_tried(session: Session, run_dir: Path) -> None:
    store = Store(run_dir)
    store.mark_crash(6, attempt=2, at=7)
    store.mark_crash(6, attempt=2, at=7)  # the other rank of the same attempt
    assert resumed(session, run_dir)[0] == 6
    store.mark_crash(6, attempt=3, at=AT)
    step, told = resumed(session, run_dir)
    assert step == 3
    event, of, details = told.events[0]
    assert (event, of) == ("quarantine", 6)
    assert str(details["reason"]).startswith("2 starts from it crashed, the last by step 8; it comes back unless")
    assert aside(run_dir) == ["step-00000006"]
    assert resumed(session, run_dir)[0] == 3, "a start that was killed says nothing about either"


def test_a_crash_that_follows_to_the_older_one_puts_the_newer_back_for_good(session: Session, run_dir: Path) -> None:
    crash_twice(run_dir)
    before = [path.read_bytes() for path in sorted((run_dir / "checkpoints" / "step-00000006").iterdir())]
    assert resumed(session, run_dir)[0] == 3
    store = Store(run_dir)
    store.mark_crash(3, attempt=4, at=AT)
    settled = store.settle_trial()
    assert settled is not None
    assert (settled.event, settled.step) == ("put_back", 6)
    assert "at step 8 as well" in settled.details["reason"]
    assert there(run_dir) == [1, 3, 6]
    assert [path.read_bytes() for path in sorted((run_dir / "checkpoints" / "step-00000006").iterdir())] == before
    assert aside(run_dir) == []
    for attempt in range(5, 9):
        step, told = resumed(session, run_dir)
        assert step == 6
        assert [event for event, _, _ in told.events] == ["resume"]
        store.mark_crash(6, attempt, AT)
    assert there(run_dir) == [1, 3, 6]


def test_a_crash_by_which_nobody_settled_is_settled_by_the_next_start(session: Session, run_dir: Path) -> None:
    crash_twice(run_dir)
    assert resumed(session, run_dir)[0] == 3
    Store(run_dir).mark_crash(0, attempt=4, at=AT - 1)  # after a save since: rank 1, whose rank 0 was killed
    step, told = resumed(session, run_dir)
    assert step == 6
    assert [event for event, _, _ in told.events] == ["put_back", "resume"]


@pytest.mark.parametrize("settled_by", ["the crash", "the next start"])
def test_records_of_steps_before_the_one_put_back_come_back_too(
    settled_by: str, session: Session, run_dir: Path
) -> None:
    """A start from the older one drops later lines; an error in its first step leaves none to replace them."""
    assert RECORDS == (METRICS, SAMPLES)
    before = [(run_dir / name).read_bytes() for name in (METRICS, SAMPLES) if (run_dir / name).is_file()]
    assert before
    crash_twice(run_dir, at=7)
    assert resumed(session, run_dir)[0] == 3
    rewind(run_dir / METRICS, 3)
    Store(run_dir).mark_crash(3, attempt=4, at=4)
    if settled_by == "the crash":
        Store(run_dir).settle_trial()
    assert resumed(session, run_dir)[0] == 6
    assert [(run_dir / name).read_bytes() for name in (METRICS, SAMPLES) if (run_dir / name).is_file()] == before
    assert list((run_dir / "checkpoints" / "crashes").glob("trial.*")) == []


def test_records_that_reach_further_stay(session: Session, run_dir: Path) -> None:
    crash_twice(run_dir, at=20)
    assert resumed(session, run_dir)[0] == 3
    (run_dir / "checkpoints" / "step-00000007").mkdir()
    (run_dir / METRICS).write_text('{"step": 7}\n')
    Store(run_dir).mark_crash(0, attempt=4, at=20)
    settled = Store(run_dir).settle_trial()
    assert settled is not None
    assert settled.event == "put_back"
    assert there(run_dir) == [1, 3, 6, 7]
    assert (run_dir / METRICS).read_text() == '{"step": 7}\n'


@pytest.mark.parametrize("reached", ["saved", "crashed later"])
def test_it_stays_aside_once_the_run_got_past_its_crash(reached: str, session: Session, run_dir: Path) -> None:
    crash_twice(run_dir)
    assert resumed(session, run_dir)[0] == 3
    store = Store(run_dir)
    shutil.copytree(run_dir / "checkpoints" / "step-00000003", run_dir / "checkpoints" / "step-00000006")
    assert store.settle_trial() is None, "the same step saved again is not past it"
    if reached == "saved":
        (run_dir / "checkpoints" / "step-00000008").mkdir()
    else:
        store.mark_crash(3, attempt=4, at=AT + 1)
    settled = store.settle_trial()
    assert settled is not None
    assert (settled.event, settled.step) == ("condemned", 6)
    assert "got past that step without it" in (run_dir / "quarantine" / "step-00000006" / "reason.json").read_text()
    assert store.settle_trial() is None
    assert store.trials.crashes(run_dir / "checkpoints" / "step-00000003") == (reached == "crashed later")
    assert store.trials.crashes(run_dir / "checkpoints" / "step-00000006") == 0


def test_the_same_step_saved_again_is_acquitted_with_the_one_on_trial(session: Session, run_dir: Path) -> None:
    crash_twice(run_dir)
    assert resumed(session, run_dir)[0] == 3
    store, again = Store(run_dir), run_dir / "checkpoints" / "step-00000006"
    again.mkdir()
    store.mark_crash(0, attempt=4, at=AT)
    settled = store.settle_trial()
    assert settled is not None
    assert settled.event == "put_back"
    assert "was saved again meanwhile" in settled.details["reason"]
    assert list(again.iterdir()) == []
    assert aside(run_dir) == ["step-00000006"]
    for attempt in (5, 6):
        store.mark_crash(6, attempt, AT)
    assert store.trials.reason(again) is None


def test_the_only_checkpoint_is_never_moved(session: Session, run_dir: Path) -> None:
    for step in (1, 3):
        shutil.rmtree(run_dir / "checkpoints" / manifest.folder_name(step))
    crash_twice(run_dir)
    step, told = resumed(session, run_dir)
    assert step == 6
    assert [event for event, _, _ in told.events] == ["resume"]


def test_no_damaged_one_is_tried(session: Session, run_dir: Path) -> None:
    for step in (1, 3):
        (run_dir / "checkpoints" / manifest.folder_name(step) / "__0_0.distcp").write_bytes(b"")
    crash_twice(run_dir)
    assert resumed(session, run_dir)[0] == 6
    assert there(run_dir) == [1, 3, 6]


@pytest.mark.parametrize("lost", ["gone", "damaged"])
def test_without_another_the_one_on_trial_comes_back(lost: str, session: Session, run_dir: Path) -> None:
    crash_twice(run_dir)
    assert resumed(session, run_dir)[0] == 3
    for step in (1, 3):
        folder = run_dir / "checkpoints" / manifest.folder_name(step)
        shutil.rmtree(folder)
        if lost == "damaged":
            folder.mkdir()
    step, told = resumed(session, run_dir)
    assert step == 6
    assert [event for event, _, _ in told.events] == ["put_back", "resume"]


def test_marks_of_an_older_dsft_count(session: Session, run_dir: Path) -> None:
    marks = run_dir / "checkpoints" / "crashes"
    marks.mkdir()
    for attempt in (2, 3):
        (marks / f"step-00000006.attempt-{attempt}").touch()
    step, told = resumed(session, run_dir)
    assert step == 3
    assert "the last by step 7" in str(told.events[0][2]["reason"])


def test_a_checkpoint_that_goes_takes_its_marks_along(run_dir: Path) -> None:
    store = Store(run_dir)
    crash_twice(run_dir, step=3)
    store.trials._acquitted("step-00000003").touch()
    assert 3 in store.retain(keep=1, keep_every=0, exempt=[6])
    assert list((run_dir / "checkpoints" / "crashes").iterdir()) == []


def test_a_save_since_clears_it(run_dir: Path) -> None:
    store = Store(run_dir)
    crash_twice(run_dir)
    store.forget_crashes(6)
    assert store.trials.reason(run_dir / "checkpoints" / "step-00000006") is None


def test_a_mark_does_not_bring_a_removed_run_back(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Store(tmp_path / "gone").mark_crash(6, attempt=2, at=AT)
    assert not (tmp_path / "gone").exists()


def plain(run_dir: Path) -> Path:
    """A run whose checkpoints are folders with one file."""
    for step in (3, 6):
        (run_dir / "checkpoints" / manifest.folder_name(step)).mkdir(parents=True)
        (run_dir / "checkpoints" / manifest.folder_name(step) / "data").write_text(str(step))
    for name in RECORDS:
        (run_dir / name).write_text("as before")
    return run_dir


def crashed(run_dir: Path) -> None:
    crash_twice(run_dir)


def followed(run_dir: Path) -> None:
    crash_twice(run_dir)
    assert start(run_dir) == 3
    Store(run_dir).mark_crash(3, attempt=4, at=AT)


def passed(run_dir: Path) -> None:
    crash_twice(run_dir)
    assert start(run_dir) == 3
    (run_dir / "checkpoints" / manifest.folder_name(9)).mkdir()


def passed_and_crashed(run_dir: Path) -> None:
    crash_twice(run_dir)
    assert start(run_dir) == 3
    Store(run_dir).mark_crash(3, attempt=4, at=AT + 1)


SCENES = [
    (crashed, "start", 3, "quarantine"), (followed, "settle", 6, "checkpoints"), (followed, "start", 6, "checkpoints"),
    (passed, "settle", 9, "quarantine"), (passed_and_crashed, "settle", 3, "quarantine"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "what", "step", "place"), SCENES)
def test_a_kill_between_any_two_changes_leaves_a_picture_that_the_next_start_completes(
    before: Callable[[Path], None], what: str, step: int, place: str, tmp_path: Path
) -> None:
    for nth in count(1):
        run_dir = plain(tmp_path / str(nth))
        before(run_dir)
        command = [sys.executable, "-m", "tests.unit.checkpoint.dying", str(run_dir), what, str(nth)]
        if before is followed:
            (run_dir / METRICS).write_text("cut short")
        code = subprocess.run(command, check=False).returncode
        assert code in (0, DIED)
        assert start(run_dir) == step
        found = list(run_dir.glob("*/step-00000006*/data"))
        assert [(path.parents[1].name, path.read_text()) for path in found] == [(place, "6")]
        assert start(run_dir) == step
        if place == "checkpoints":
            assert (run_dir / METRICS).read_text() == "as before"
            for attempt in (7, 8):
                Store(run_dir).mark_crash(6, attempt, AT)
            assert start(run_dir) == 6, "it was acquitted"
        if code == 0:
            break
    assert nth > 2, "there was something to interrupt"
