"""Which rank is named when several died, and which lines of its log are shown."""

import signal

import pytest
from dsft_launchers.verdict import Failure, cause, error_lines

OWN = "Traceback (most recent call last):\n  File 'x', line 1\nValueError: rows must carry labels\n"
PEER = "Traceback (most recent call last):\n  File 'x', line 1\nRuntimeError: [gloo] Connection closed by peer [::1]\n"


@pytest.mark.parametrize(
    ("ends", "rank"),
    [
        ([(1, OWN), (-signal.SIGKILL, "step 3")], 1),
        ([(1, PEER), (1, OWN)], 1),
        ([(1, PEER), (3, "")], 1),
        ([(1, PEER), (-signal.SIGSEGV, "")], 1),
        ([(-signal.SIGABRT, "terminate called: Connection reset by peer"), (1, OWN)], 1),
        ([(1, OWN), (1, OWN)], 0),
        ([(1, PEER), (1, PEER)], 0),
    ],
)
def test_the_cause_is_told_from_its_consequences(ends: list[tuple[int, str]], rank: int) -> None:
    failures = [Failure(rank=index, code=code, at=float(index), text=text) for index, (code, text) in enumerate(ends)]
    assert cause(failures).rank == rank


def test_the_end_of_the_last_traceback_is_shown() -> None:
    frames = "".join(f"  File 'deep.py', line {number}\n    call()\n" for number in range(40))
    text = (
        f"{OWN}During handling:\n\nTraceback (most recent call last):\n{frames}KeyError: 'gone'\nnoise\n"
        + "later\n" * 9
    )
    lines = error_lines(text)
    assert lines[-5:] == ["KeyError: 'gone'", "noise", "later", "later", "later"]
    assert lines[-7] == "  File 'deep.py', line 39"
    assert len(lines) == 15


def test_torchs_rank_prefix_is_no_part_of_the_error() -> None:
    frames = "".join(f"  File 'deep.py', line {number}\n    call()\n" for number in range(40))
    text = f"Traceback (most recent call last):\n{frames}KeyError: 'gone'\n"
    prefixed = "".join(f"[rank1]: {line}\n" for line in text.splitlines())
    assert error_lines(prefixed) == error_lines(text)


def test_without_a_traceback_the_last_lines_are_shown() -> None:
    assert error_lines("\n".join(str(number) for number in range(30)))[-2:] == ["28", "29"]
    assert error_lines("") == []
