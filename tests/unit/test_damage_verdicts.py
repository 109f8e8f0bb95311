"""The matrix of faults turns red when a start makes something else of a damage than it must."""

from dataclasses import replace

import pytest

from benchmarks.damage_verdicts import Seen, wrong
from benchmarks.damages import NEWEST, damages

DAMAGES = {damage.name: damage for damage in damages(2, 2)}
BIT = DAMAGES["__1_0.distcp: one bit"]
STALE = DAMAGES["EIO on the last rank only"]
FILE = ("file", "content")
TREE = {"checkpoints": ("folder",), f"checkpoints/{NEWEST}": ("folder",), f"checkpoints/{NEWEST}/a": FILE, "b": FILE}
ASIDE = {"checkpoints": ("folder",), "b": FILE, "quarantine": ("folder",)}
ASIDE |= {f"quarantine/{NEWEST}": ("folder",), f"quarantine/{NEWEST}/a": FILE}
TOLD = [("quarantine", 6, {"file": "__1_0.distcp"})]
RIGHT = Seen(3, ["", ""], ["three", "3"], TOLD, TREE, ASIDE, 0)
REFUSED = "CannotBeginError: rank 1 on host cannot read it"
HELD = Seen(0, [REFUSED, REFUSED], ["three", "3"], [], TREE, TREE, 1)


def test_what_is_as_it_must_be_is_right() -> None:
    assert wrong(BIT, RIGHT, ["three", "3"]) == []
    assert wrong(STALE, HELD, ["three", "3"]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 6}, "loads step 6, should load 3"),
        ({"digests": ["three", "other"]}, "the state on rank 1 is another"),
        ({"said": ["", "TypeError: no"]}, "rank 1 raises TypeError: no"),
        ({"events": []}, "sets aside steps []"),
        ({"events": [("quarantine", 6, {"file": "manifest.json"})]}, "names manifest.json of step 6"),
        ({"after": {**ASIDE, f"quarantine/{NEWEST}/a": ("file", "other")}}, "what lies in quarantine is not"),
        ({"after": {name: what for name, what in ASIDE.items() if name != "b"}}, "b is gone"),
        ({"after": {**ASIDE, "b": ("file", "other")}}, "b was changed"),
        ({"after": {**ASIDE, "c": FILE}}, "c was not there before"),
        ({"after": {**ASIDE, f"checkpoints/{NEWEST}": ("folder",)}}, "is still there"),
    ],
)
def test_each_thing_that_is_off_is_told(change: dict[str, object], said: str) -> None:
    assert said in "; ".join(wrong(BIT, replace(RIGHT, **change), ["three", "3"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fired": 0}, "the plant did not happen"),
        ({"said": ["", ""], "step": 3}, "should raise CannotBeginError"),
        ({"said": ["CannotBeginError: some rank"] * 2}, "rank 0 says CannotBeginError: some rank"),
        ({"after": ASIDE}, "is gone"),
    ],
)
def test_each_thing_that_is_off_about_a_refusal_is_told(change: dict[str, object], said: str) -> None:
    assert said in "; ".join(wrong(STALE, replace(HELD, **change), ["three", "3"]))


@pytest.mark.parametrize(("ranks", "files"), [(1, 2), (2, 2), (4, 4)])
def test_there_are_as_many_damages_under_every_layout(ranks: int, files: int) -> None:
    assert len({damage.name for damage in damages(ranks, files)}) == 50
