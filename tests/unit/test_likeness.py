from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from dsft import folder
from dsft.compose import compose, dump_yaml
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


def test_a_home_directory_that_an_older_folder_names_by_its_sign_is_the_same(tmp_path: Path) -> None:
    tree = compose(["model=custom", "model.path='~/m'", f"run_dir={tmp_path}"]).resolved
    for path, same in (("~/m", True), ("~/n", False)):
        (tmp_path / "config.yaml").write_text(dump_yaml({**tree, "model": {**tree["model"], "path": path}}))
        with nullcontext() if same else pytest.raises(ValueError, match=r"model\.path was"):
            folder.check(tmp_path, tree)
