"""What a crash is counted against, what status.json says of an end, and what a rank may print without danger."""

import errno
import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dsft_launchers.codes import CRASHED, STOPPED
from dsft_launchers.local import Ending

from dsft.ending import Attempt, settle
from dsft.entry import LossyStream
from dsft.telemetry.record import Saved, State, Status, read_status, write_status


def attempt(*, saved: int = 6, started: int = 6, training: bool = True) -> Attempt:
    keeper = SimpleNamespace(saved=saved)
    return Attempt(number=2, started=started, keeper=keeper, training=training)  # type: ignore[arg-type]


def test_an_exception_while_training_is_counted_against_the_checkpoint_until_the_run_has_saved_again() -> None:
    error = RuntimeError("train.on_nonfinite")
    assert (attempt().counts(error), attempt().blamed) == (True, 6)
    assert (attempt(saved=9).counts(error), attempt(saved=9).blamed) == (True, 0)
    assert (attempt(started=0, saved=0).counts(error), attempt(started=0, saved=0).blamed) == (True, 0)
    assert not attempt(training=False).counts(RuntimeError("the result could not be written"))


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:42"),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"),
], ids=repr)  # fmt: skip
def test_what_is_not_the_checkpoints_doing_is_not_counted(error: Exception) -> None:
    assert not attempt().counts(error)


@pytest.mark.parametrize("error", [TimeoutError("the verifier timed out"), RuntimeError("Read timed out."),
                                   RuntimeError("the connection was reset by the judge")], ids=repr)  # fmt: skip
def test_the_words_of_a_library_make_no_lost_peer(error: Exception) -> None:
    assert attempt().counts(error) is not isinstance(error, OSError)


@pytest.mark.parametrize(("state", "ending", "expected"), [
    ("running", Ending(CRASHED, "rank 1: ValueError: x"), ("failed", "rank 1: ValueError: x")),
    ("failed", Ending(CRASHED, "rank 1: ValueError: x"), ("failed", "rank 1: ValueError: x")),
    ("stopping", Ending(STOPPED, None), ("stopped", "what rank 0 said")),
    ("done", Ending(CRASHED, "rank 1: late"), ("done", "what rank 0 said")),
    ("stopped", Ending(CRASHED, "rank 1: late"), ("stopped", "what rank 0 said")),
])  # fmt: skip
def test_the_launchers_cause_is_written_over_rank_0s(
    state: State, ending: Ending, expected: tuple[str, str], tmp_path: Path
) -> None:
    left = Status(
        state=state, step=4, attempts=2, checkpoint="step-00000003", reason="what rank 0 said", wandb_id=None,
        saved=Saved(step=3, time="2026-01-01T00:00:00.000+00:00"),
    )  # fmt: skip
    write_status(tmp_path, left)
    settle(tmp_path, ending, attempt=2)
    after = read_status(tmp_path)
    assert after is not None
    assert (after.state, after.reason) == expected
    assert after.saved == left.saved


def test_the_status_of_another_start_is_left_alone(tmp_path: Path) -> None:
    theirs = Status(state="running", step=4, attempts=3, checkpoint=None, reason=None, wandb_id=None)
    write_status(tmp_path, theirs)
    settle(tmp_path, Ending(CRASHED, "was taken over"), attempt=2)
    assert read_status(tmp_path) == theirs


class Broken(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.EIO])
def test_a_log_that_takes_nothing_more_ends_nothing(number: int) -> None:
    print("step 1", file=LossyStream(Broken(number)), flush=True)


def test_other_trouble_of_a_log_is_told() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        print("step 1", file=LossyStream(Broken(errno.EBADF)))
