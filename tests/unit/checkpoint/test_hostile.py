"""A checkpoint that somebody changed: it runs nothing, names nothing outside of it, and what is hashed is loaded."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.checkpoint import manifest, pickled
from dsft.checkpoint.trials import Trials
from dsft.engine.assemble import Session
from tests.unit.checkpoint.earlier import Payload, as_before, plant
from tests.unit.checkpoint.resuming import resumed
from tests.unit.checkpoint.test_restore import edit

NEWEST = manifest.folder_name(6)


def weights(session: Session) -> list[torch.Tensor]:
    return [value.clone() for _, value in sorted(session.run.strategy.export_state().items())]


@pytest.mark.parametrize("first", [True, False])
def test_a_payload_in_an_index_does_not_run_and_the_older_step_is_taken(
    first: bool, session: Session, run_dir: Path, tmp_path: Path
) -> None:
    newest, ran = run_dir / "checkpoints" / NEWEST, tmp_path / "ran"
    plant(newest, ran, first=first)
    pickle.loads((newest / pickled.FILE).read_bytes())
    assert ran.exists(), "the payload of this test works"
    ran.unlink()
    step, told = resumed(session, run_dir)
    assert step == 3
    assert told.events[0][2]["file"] == pickled.FILE
    assert told.events[0][2]["reason"] == ".metadata: cannot be read (builtins.exec does not belong in an index)"
    assert not ran.exists()
    assert (run_dir / "quarantine" / NEWEST / pickled.FILE).is_file()


def test_a_checkpoint_of_an_earlier_dsft_loads_to_the_same_bits(session: Session, run_dir: Path) -> None:
    assert resumed(session, run_dir)[0] == 6
    mine = weights(session)
    resumed(session, _only(run_dir, 3))
    as_before(run_dir / "checkpoints" / NEWEST)
    assert manifest.read(run_dir / "checkpoints" / NEWEST).index is None
    assert resumed(session, run_dir)[0] == 6
    assert all(torch.equal(one, other) for one, other in zip(mine, weights(session), strict=True))


def _only(run_dir: Path, step: int) -> Path:
    """A copy of a run with one of its checkpoints."""
    other = Path(shutil.copytree(run_dir, run_dir.with_name("other")))
    for folder in (other / "checkpoints").glob("step-*"):
        if folder.name != manifest.folder_name(step):
            shutil.rmtree(folder)
    return other


@pytest.mark.parametrize("content", [
    3, {}, [], Payload("x"), pickled._Note, torch.Size([1]), set(), torch.float32, print, {"state_dict_metadata": {}},
], ids=lambda content: type(content).__name__)  # fmt: skip
def test_a_pickle_that_is_no_index_is_named(content: object, session: Session, run_dir: Path) -> None:
    as_before(run_dir / "checkpoints" / NEWEST, content)
    step, told = resumed(session, run_dir)
    assert step == 3
    assert told.events[0][2]["file"] == pickled.FILE


def _outside(said: dict[str, Any]) -> None:
    said["files"]["../../../provenance.json"] = said["files"]["__0_0.distcp"]


def _absolute(said: dict[str, Any]) -> None:
    said["files"]["/etc/hostname"] = {"size": 0, "sha256": "0"}


def _parent(said: dict[str, Any]) -> None:
    said["files"][".."] = {"size": 0, "sha256": "0"}


def _unlisted(said: dict[str, Any]) -> None:
    _pieces(said)[0][0] = "../../../provenance.json"


def _far(said: dict[str, Any]) -> None:
    _pieces(said)[0][1] = 10**12


def _negative(said: dict[str, Any]) -> None:
    _pieces(said)[0][1] = -8


def _twice(said: dict[str, Any]) -> None:
    one, other, *_ = (held["pieces"][0] for held in said["index"].values() if held["pieces"][0][0] == "__0_0.distcp")
    other[1] = one[1]


def _uncovered(said: dict[str, Any]) -> None:
    _pieces(said)[0][3][0] -= 1


def _untyped(said: dict[str, Any]) -> None:
    next(iter(said["index"].values()))["dtype"] = "load"


def _odd(said: dict[str, Any]) -> None:
    said["index"] = [3]


def _pieces(said: dict[str, Any]) -> list[Any]:
    return next(held["pieces"] for held in said["index"].values() if held["size"])


@pytest.mark.parametrize("change", [
    _outside, _absolute, _parent, _unlisted, _far, _negative, _twice, _uncovered, _untyped, _odd,
])  # fmt: skip
def test_a_manifest_that_leads_elsewhere_is_a_damaged_one(
    change: Callable[[dict[str, Any]], None], session: Session, run_dir: Path
) -> None:
    newest = run_dir / "checkpoints" / NEWEST
    said = json.loads((newest / manifest.FILE).read_text())
    change(said)
    edit(newest, **said)
    step, told = resumed(session, run_dir)
    assert step == 3
    assert told.events[0][0] == "quarantine"


@pytest.mark.parametrize("name", [manifest.FILE, "__0_0.distcp"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name: str, session: Session, run_dir: Path) -> None:
    path = run_dir / "checkpoints" / NEWEST / name
    path.unlink()
    os.mkfifo(path)
    assert resumed(session, run_dir)[0] == 3


def test_files_that_are_swapped_once_they_are_verified_change_nothing(
    session: Session, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is opened again: what is in the state is what was hashed."""
    assert resumed(session, _only(run_dir, 6))[0] == 6
    right, reason = weights(session), Trials.reason

    def swapped(trials: Trials, checkpoint: Path) -> object:
        """Happens between the verdict on a checkpoint and its use."""
        for path in checkpoint.iterdir():
            path.write_bytes(bytes(path.stat().st_size))
        return reason(trials, checkpoint)

    monkeypatch.setattr(Trials, "reason", swapped)
    step, told = resumed(session, run_dir)
    assert (step, [event for event, _, _ in told.events]) == (6, ["resume"])
    assert all(torch.equal(one, other) for one, other in zip(right, weights(session), strict=True))
