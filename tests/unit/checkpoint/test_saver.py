"""A background save holds what the state was when it began."""

import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor

from dsft.checkpoint import files, manifest, saver
from dsft.checkpoint.lease import LeaseLostError, acquire
from dsft.checkpoint.manifest import Identity, folder_name
from dsft.checkpoint.reading import Reading, index_of
from dsft.checkpoint.saver import Retention, Saver
from dsft.checkpoint.store import Store
from dsft.comm.world import World


def saver_for(run_dir: Path) -> Saver:
    store = Store(run_dir)
    lease, _ = acquire(store.folder)
    return Saver(store, lease, Identity("r", "c", "b", "d"), World(0, 1, 0, torch.device("cpu")), Retention(9, 0))


@pytest.mark.parametrize("background", [True, False])
def test_a_save_says_since_when_it_is_in_flight(background: bool, tmp_path: Path) -> None:
    saver = saver_for(tmp_path)
    seen = []

    def export() -> Mapping[str, Tensor]:
        seen.append(saver.in_flight_since)
        return {"param/a": torch.ones(8)}

    assert saver.in_flight_since is None
    assert saver.longest_s == 0.0
    begun = time.monotonic()
    saver.start(3, export, {}, background=background)
    outcome = saver.take()
    assert outcome is not None
    assert outcome.error is None
    assert seen[0] is not None
    step, since = seen[0]
    assert step == 3
    assert begun <= since <= time.monotonic()
    assert saver.in_flight_since is None
    longest = saver.longest_s
    assert 0 < longest <= time.monotonic() - begun
    shutil.rmtree(saver.store.folder)
    saver.store.folder.write_text("no folder any more")
    saver.start(4, export, {}, background=background)
    outcome = saver.take()
    assert outcome is not None
    assert outcome.error is not None
    assert saver.in_flight_since is None
    assert saver.longest_s >= longest


def test_a_save_in_flight_is_seen_from_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, go_on, write = saver_for(tmp_path), Event(), files._Writer.write_data

    def slow(*args: object) -> object:
        go_on.wait()
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(files._Writer, "write_data", slow)
    saver.start(3, lambda: {"param/a": torch.ones(8)}, {}, background=True)
    saver.settle()
    assert saver.busy
    assert saver.in_flight_since is not None
    assert saver.in_flight_since[0] == 3
    go_on.set()
    assert saver.take() is not None
    assert saver.in_flight_since is None


def test_a_save_whose_folder_a_newer_writer_removed_does_not_bring_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, write, there = saver_for(tmp_path), files.write, list[bool]()

    def robbed(state: Mapping[str, Tensor], place: Path, *args: object) -> object:
        acquire(saver.store.folder)
        saver.store.clear()
        try:
            return write(state, place, *args)  # type: ignore[arg-type]
        finally:
            there.append(place.exists())

    monkeypatch.setattr(files, "write", robbed)
    saver.start(3, lambda: {"param/a": torch.ones(8)}, {}, background=False)
    with pytest.raises(LeaseLostError, match="was taken over"):
        saver.take()
    assert there == [False]
    assert list(saver.store.folder.glob("step-*")) == []


def test_a_run_whose_folder_is_removed_ends_at_its_next_save(tmp_path: Path) -> None:
    saver = saver_for(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    saver.start(3, lambda: {"param/a": torch.ones(8)}, {}, background=False)
    with pytest.raises(LeaseLostError, match="is gone"):
        saver.take()
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_are_removed_cost_nothing_but_themselves(tmp_path: Path) -> None:
    saver = saver_for(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    saver.start(3, lambda: {"param/a": torch.ones(8)}, {}, background=False)
    outcome = saver.take()
    assert outcome is not None
    assert outcome.error is None
    assert (tmp_path / "run" / "checkpoints" / folder_name(3) / "manifest.json").is_file()


def test_a_state_that_moves_once_settled_is_saved_as_it_was(tmp_path: Path) -> None:
    saver = saver_for(tmp_path)
    live = {f"param/{name}": torch.ones(2_000_000) for name in "abcdefgh"}
    for step in (1, 2, 3):  # the first makes the copies that the others fill again
        saver.start(step, lambda: live, {}, background=True)
        saver.settle()
        for tensor in live.values():
            tensor.add_(1)
        outcome = saver.take()
        assert outcome is not None
        assert outcome.error is None
        assert 0 < outcome.stall_s < outcome.seconds
        saved = {name: torch.empty_like(tensor) for name, tensor in live.items()}
        folder = saver.store.folder / folder_name(step)
        content = manifest.read(folder)
        Reading(saved, index_of(folder, content)).fill(folder, content)
        assert all(bool((tensor == step).all()) for tensor in saved.values())


def test_a_thread_that_copies_from_a_gpu_takes_that_gpu_first(monkeypatch: pytest.MonkeyPatch) -> None:
    device, calls = torch.device("cuda", 3), list[tuple[str, str]]()

    class Stream:
        def __init__(self, of: torch.device) -> None:
            self.device = of

        def wait_stream(self, other: object) -> None:
            assert other == device

        def __enter__(self) -> None:
            calls.append((threading.current_thread().name, "stream"))

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: of)
    monkeypatch.setattr(torch.cuda, "set_device", lambda of: calls.append((threading.current_thread().name, str(of))))
    beside = saver._beside(device)

    def work() -> None:
        with beside:
            pass

    thread = threading.Thread(target=work, name="save-1")
    thread.start()
    thread.join()
    assert calls == [("save-1", "cuda:3"), ("save-1", "stream")]
