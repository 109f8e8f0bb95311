"""A background save holds what the state was when it began."""

from pathlib import Path

import torch

from dsft.checkpoint import files
from dsft.checkpoint.lease import acquire
from dsft.checkpoint.manifest import Identity, folder_name
from dsft.checkpoint.saver import Retention, Saver
from dsft.checkpoint.store import Store
from dsft.comm.world import World


def test_a_state_that_moves_once_settled_is_saved_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path)
    lease, _ = acquire(store.folder)
    saver = Saver(store, lease, Identity("r", "c", "b", "d"), World(0, 1, 0, torch.device("cpu")), Retention(9, 0))
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
        files.read(saved, store.folder / folder_name(step), None)
        assert all(bool((tensor == step).all()) for tensor in saved.values())
