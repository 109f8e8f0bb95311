"""What SLURM prints, read."""

import pytest
from dsft_launchers.cluster import Job, minutes, numbers, spell
from dsft_launchers.gpus import count


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("5:30", 5.5), ("1:30:00", 90), ("2-12", 3600), ("2-12:30", 3630), ("1-00:00:30", 1440.5),
     ("infinite", None)],
)  # fmt: skip
def test_time_limits(text: str, expected: float | None) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5"])
def test_what_is_no_time_limit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="reads like"):
        minutes(text)


@pytest.mark.parametrize(
    ("gres", "expected"),
    [("(null)", 0), ("gpu:2", 2), ("gpu:3090:4", 4), ("gpu:a100:4(S:0-1)", 4), ("gpu:h100_80gb:8,tmp:1", 8),
     ("gpu:a:1,gpu:b:2", 3)],
)  # fmt: skip
def test_gpus_of_generic_resources(gres: str, expected: int) -> None:
    assert count(gres) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", [3]), ("0-2,5", [0, 1, 2, 5]), ("0-10:5", [0, 5, 10]), ("1,3,7-9", [1, 3, 7, 8, 9])],
)
def test_tasks_of_an_array(text: str, expected: list[int]) -> None:
    assert numbers(text) == expected
    assert numbers(spell(expected)) == expected


def test_tasks_are_spelt_as_ranges() -> None:
    assert spell([*range(100), 200, 300, 301]) == "0-99,200,300-301"


def test_a_job_that_waits_is_not_over() -> None:
    assert not Job("PENDING", "Resources").over
    assert Job("NODE_FAIL", "None").over
