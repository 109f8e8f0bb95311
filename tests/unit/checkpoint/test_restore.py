"""No damaged checkpoint is loaded: the older one is taken, the bad one set aside, the bad file named."""

import errno
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dsft_launchers.verdict import CannotBeginError, RefusedError

from dsft import folder
from dsft.checkpoint import manifest
from dsft.checkpoint.lease import LeaseLostError, acquire
from dsft.checkpoint.store import Store
from dsft.compose import load_yaml
from dsft.engine.assemble import Session
from dsft.engine.resume import resume
from tests.unit.checkpoint.resuming import STEPS, Told, resumed

FILES = ["manifest.json", "__0_0.distcp", "__1_0.distcp"]


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


def put_a_link_loop_there(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def put_a_folder_there(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [
    flip_a_bit, truncate, zero_a_block, Path.unlink, put_an_older_one_there, put_a_link_loop_there, put_a_folder_there,
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
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


def put_a_dangling_link_in_its_place(checkpoint: Path) -> None:
    checkpoint.symlink_to("nowhere")


def put_a_file_in_its_place(checkpoint: Path) -> None:
    checkpoint.write_text("not a folder")


@pytest.mark.parametrize("put", [put_a_dangling_link_in_its_place, put_a_file_in_its_place])
def test_a_checkpoint_that_is_no_folder_is_named_and_set_aside(
    put: Callable[[Path], None], session: Session, run_dir: Path
) -> None:
    newest = run_dir / "checkpoints" / manifest.folder_name(6)
    shutil.rmtree(newest)
    put(newest)
    step, told = resumed(session, run_dir)
    assert step == 3
    assert told.events[0][:2] == ("quarantine", 6)
    assert told.events[0][2]["file"] == newest.name
    assert not os.path.lexists(newest)
    assert os.path.lexists(run_dir / "quarantine" / newest.name)
    assert (run_dir / "quarantine" / f"{newest.name}.reason.json").is_file()


def edit(manifest_of: Path, **changes: Any) -> None:
    """Change a manifest, with the digest of what it says then. None: take the key away."""
    content = {**json.loads((manifest_of / "manifest.json").read_text()), **changes}
    content = {key: value for key, value in content.items() if value is not None and key != "digest"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (manifest_of / "manifest.json").write_text(json.dumps({**content, "digest": digest}))


@pytest.mark.parametrize("changes", [{"format": 3}, {"seal": "of a later time"}], ids=str)
def test_a_later_dsfts_checkpoint_is_refused_and_stays(
    changes: dict[str, Any], session: Session, run_dir: Path
) -> None:
    newest = run_dir / "checkpoints" / manifest.folder_name(6)
    edit(newest, **changes)
    with pytest.raises(manifest.NewerError, match="step-00000006 was made by a later dsft"):
        manifest.read(newest)
    before = tree(run_dir)
    with pytest.raises(RefusedError, match="step-00000006 was made by a later dsft"):
        resumed(session, run_dir)
    assert tree(run_dir) == before


@pytest.mark.parametrize("changes", [
    {"files": {"__0_0.distcp": {"size": 1}}}, {"progress": None}, {"progress": 3}, {"step": "6"}, {"format": 0},
    {"identity": []}, {"files": ["__0_0.distcp"]},
], ids=str)  # fmt: skip
def test_an_odd_manifest_with_a_right_digest_is_a_damaged_one(
    changes: dict[str, Any], session: Session, run_dir: Path
) -> None:
    edit(run_dir / "checkpoints" / manifest.folder_name(6), **changes)
    step, told = resumed(session, run_dir)
    assert step == 3
    assert told.events[0][2]["file"] == "manifest.json"


def tree(run_dir: Path) -> dict[str, bytes]:
    """All files of a run, without its leases."""
    files = {path for path in run_dir.rglob("*") if path.is_file() and not path.name.startswith("lease-")}
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


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


def test_nothing_that_verifies_is_refused_and_all_stay(session: Session, run_dir: Path) -> None:
    for path in (run_dir / "checkpoints").glob("step-*/__0_0.distcp"):
        flip_a_bit(path)
    before = tree(run_dir)
    with pytest.raises(RefusedError, match=r"step-00000006: __0_0.distcp: .*resume\.anew=true") as refused:
        resumed(session, run_dir)
    assert "\n" not in str(refused.value)
    assert tree(run_dir) == before


def test_damaged_ones_older_than_the_one_taken_are_left_alone(session: Session, run_dir: Path) -> None:
    flip_a_bit(run_dir / "checkpoints" / manifest.folder_name(1) / "__0_0.distcp")
    before = tree(run_dir)
    assert resumed(session, run_dir)[0] == 6
    assert tree(run_dir) == before


def failing(monkeypatch: pytest.MonkeyPatch, number: int, *, times: float) -> None:
    """So many times __0_0.distcp cannot be opened."""
    opened, failed = Path.open, list[Path]()

    def fails(path: Path, *args: Any, **keys: Any) -> Any:
        if path.name == "__0_0.distcp" and len(failed) < times:
            failed.append(path)
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *args, **keys)

    monkeypatch.setattr(Path, "open", fails)


def test_a_file_that_reads_wrong_once_and_right_again_condemns_nothing(
    session: Session, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(run_dir)
    failing(monkeypatch, errno.EIO, times=1)
    with pytest.raises(CannotBeginError, match=r"rank 0 on .* finds step-00000006 damaged \(__0_0.distcp: cannot be"):
        resumed(session, run_dir)
    assert tree(run_dir) == before


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
    before = tree(run_dir)
    with pytest.raises(RefusedError, match=r"manifest\.json: belongs to another run"):
        resumed(session, run_dir)
    assert tree(run_dir) == before


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
    failing(monkeypatch, errno.EACCES, times=math.inf)
    with pytest.raises(PermissionError):
        resumed(session, run_dir)
    assert (run_dir / "checkpoints" / manifest.folder_name(6)).is_dir()


def test_a_lost_provenance_keeps_the_runs_own_name(run_dir: Path) -> None:
    before = folder.provenance(run_dir)
    resolved = load_yaml(run_dir / "config.yaml")
    (run_dir / "provenance.json").unlink()
    assert folder.known(run_dir)["run"] == before["run"]
    names = ("base_fingerprint", "base_digest", "data_digest", "tokens_digest")
    same = {key: before[key] for key in names if key in before}
    folder.check_digests(run_dir, same, resolved)
    folder.check_digests(run_dir, {**same, "data_digest": "of another machine"}, resolved)
    with pytest.raises(ValueError, match=r"data was .* by its content"):
        folder.check_digests(run_dir, {**same, "tokens_digest": "other rows"}, resolved)


def test_retention_keeps_the_newest_and_the_milestones(run_dir: Path) -> None:
    store = Store(run_dir)
    assert store.retain(keep=1, keep_every=3, exempt=[6]) == [1]
    assert store.retain(keep=1, keep_every=0, exempt=[3]) == []  # 3 was just written, 6 is the newest
    assert store.retain(keep=1, keep_every=0, exempt=[6]) == [3]
    assert [path.name for path in store.newest_first()] == [manifest.folder_name(6)]


def test_a_milestone_that_was_saved_late_is_kept(tmp_path: Path) -> None:
    """A disk that is slower than `every` steps: saves fall between the multiples of keep_every."""
    store, newest = Store(tmp_path), 0
    for newest in (1, 5, 7, 13, 14, 24, 34, 38, 40):
        (store.folder / manifest.folder_name(newest)).mkdir(parents=True)
        store.retain(keep=1, keep_every=4, exempt=[newest])
    assert [int(path.name[5:]) for path in store.newest_first()] == [40, 38, 34, 24, 13, 5]


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
