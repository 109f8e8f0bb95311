"""What a crash is counted against, and what a rank may print without danger."""

import errno
import io
import os
from types import SimpleNamespace

import pytest
import torch

from dsft.job import Attempt, Spoken


def attempt(*, saved: int = 6, started: int = 6, training: bool = True) -> Attempt:
    keeper = SimpleNamespace(saved=saved)
    return Attempt(number=2, started=started, keeper=keeper, training=training)  # type: ignore[arg-type]


def test_an_exception_while_training_is_counted_until_the_run_has_saved_again() -> None:
    assert attempt().blames(RuntimeError("train.on_nonfinite"))
    assert not attempt(saved=9).blames(RuntimeError("after another save"))
    assert not attempt(started=0, saved=0).blames(RuntimeError("there was no checkpoint"))
    assert not attempt(training=False).blames(RuntimeError("the result could not be written"))


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"),
    RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
], ids=repr)  # fmt: skip
def test_what_is_not_the_checkpoints_doing_is_not_counted(error: Exception) -> None:
    assert not attempt().blames(error)


class Broken(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.EIO])
def test_a_log_that_takes_nothing_more_ends_nothing(number: int) -> None:
    print("step 1", file=Spoken(Broken(number)), flush=True)


def test_other_trouble_of_a_log_is_told() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        print("step 1", file=Spoken(Broken(errno.EBADF)))
