from typing import Any

from dsft.likeness import differences

OLD = {"data": {"_target_": "dsft.data.local.Local", "path": "a.jsonl"}, "train": {"steps": 2}}


def _new(**keys: Any) -> dict[str, Any]:
    return {**OLD, "data": {**OLD["data"], "ignore": [], "train_on": "all", "dedup": True, **keys}}


def test_a_key_that_a_folder_is_older_than_may_have_its_default() -> None:
    assert not list(differences(OLD, _new(), []))
    assert list(differences(OLD, _new(dedup=False), [])) == ["data.dedup was None, is False"]
    assert list(differences(_new(), _new(train_on="last"), [])) == ["data.train_on was all, is last"]
    assert list(differences(OLD, _new(shuffle=True), [])) == ["data.shuffle was None, is True"]
    assert list(differences(OLD, {**OLD, "optim": {"lr": 1.0}}, [])) == ["optim.lr was None, is 1.0"]
