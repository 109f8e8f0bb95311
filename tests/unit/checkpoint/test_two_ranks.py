"""What one rank finds reaches all of them as data: one launch of two ranks, in which all of this happens."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dsft_launchers.local import launch

from dsft.checkpoint import manifest
from dsft.comm.world import World, lost_peer

STEPS = ["step-00000001", "step-00000003", "step-00000006"]


@pytest.fixture(scope="module")
def seen(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two ranks saw."""
    place = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.unit.checkpoint.two_ranks", str(finished), str(place)]
    launch(command, num_processes=2, log_dir=place / "logs", env={})
    logs = [(place / "logs" / f"rank-{rank}.log").read_text() for rank in range(2)]
    files = [place / f"rank-{rank}.json" for rank in range(2)]
    assert all(file.is_file() for file in files), logs
    return [json.loads(file.read_text()) for file in files]


def test_a_damaged_file_is_set_aside_by_all(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        found = rank["a bit flipped"]
        assert found["step"] == 3
        assert found["events"] == [["quarantine", 6], ["resume", 3]]
        assert found["there"] == STEPS[:2]


def test_code_in_an_index_runs_on_no_rank(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        found = rank["code in the index"]
        assert (found["step"], found["ran"], found["there"]) == (3, False, STEPS[:2])
        assert found["reasons"] == [".metadata: cannot be read (builtins.exec does not belong in an index)"]


def test_nothing_that_verifies_is_refused_by_all(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        found = rank["a bit flipped in all"]
        assert found["error"] == "RefusedError", found
        assert "step-00000006: __1_0.distcp: " in found["says"]
        assert found["there"] == STEPS


@pytest.mark.parametrize(("scene", "why"), [
    ("missing for rank 1", "is missing"), ("unreadable for rank 1", "cannot be read (Input/output error)"),
])  # fmt: skip
def test_one_nodes_trouble_condemns_no_checkpoint(scene: str, why: str, seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        found = rank[scene]
        assert found["error"] == "CannotBeginError", found
        assert found["says"].startswith("rank 1 on ")
        assert f"finds step-00000006 damaged (__1_0.distcp: {why}), and rank 0 on " in found["says"]
        assert found["events"] == []
        assert found["there"] == STEPS


def test_what_is_no_data_is_refused_at_the_sender(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        said = rank["refused"]["said"]
        assert len(said) == 4
        assert said[0].startswith("gather sends data between ranks, got ValueError: ")
        assert rank["refused"]["then"] == ["of 0: why", "of 1: why"]


def test_the_end_of_a_trial_is_told_on_every_rank(seen: list[dict[str, Any]]) -> None:
    assert [rank["settled"] for rank in seen] == [{"event": "condemned", "step": 6}] * 2


def test_who_lost_a_peer_knows_it(seen: list[dict[str, Any]]) -> None:
    found = seen[0]["left alone"]
    assert found["lost"] == [True, True], found


@pytest.mark.parametrize("value", [ValueError("x"), [KeyError("x")], torch.ones(1), object(), {"a": {"b": print}}])
def test_one_process_refuses_what_two_would(value: object) -> None:
    with pytest.raises(TypeError, match="gather sends data between ranks"):
        World(0, 1, 0, torch.device("cpu")).gather(value)


@pytest.mark.parametrize("value", [
    None, True, 1, 1.5, "a", b"a", Path("a"), [1, (2, {3})], {"a": frozenset({1})}, manifest.Damage("a", "b"),
    {"a": manifest.Written(1, "b")},
])  # fmt: skip
def test_data_are_sent(value: object) -> None:
    assert World(0, 1, 0, torch.device("cpu")).gather(value) == [value]


LOST = [
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4242"),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"),
    dist.DistNetworkError("failed to recv, got 0 bytes"),
    dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//cpu//0"),
    dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited or there was a network error"),
]
OWN = [
    RuntimeError("ReadTimeout: HTTPSConnectionPool: Read timed out."), TimeoutError("the verifier timed out"),
    BrokenPipeError("Broken pipe"), ConnectionResetError("Connection reset by peer"), RuntimeError("Connection closed"),
    RuntimeError("[enforce fail at ../third_party/gloo/gloo/transport/tcp/pair.cc:446] op.preamble.length. 8 vs 4"),
    dist.DistBackendError("NCCL error in: x.cpp:1, unhandled cuda error\nncclUnhandledCudaError: Call to CUDA failed."),
    ValueError("[/a/gloo/pair.cc:1] quoted"),
]  # fmt: skip


@pytest.mark.parametrize("error", LOST, ids=repr)
def test_an_error_of_the_backend_is_a_lost_peer(error: Exception) -> None:
    assert lost_peer(error)
    other = ValueError("made of it")
    other.__context__ = error
    assert lost_peer(other)


@pytest.mark.parametrize("error", OWN, ids=repr)
def test_an_error_of_the_program_is_none(error: Exception) -> None:
    assert not lost_peer(error)


def test_errors_that_lead_to_each_other_are_looked_at_once() -> None:
    one, other = ValueError("a"), KeyError("b")
    one.__context__, other.__context__ = other, one
    assert not lost_peer(one)
