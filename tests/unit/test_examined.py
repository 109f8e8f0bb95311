"""A verdict on a model is found once for a configuration, and a refusal each time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsft.compose import compose
from dsft.engine import trial
from dsft.examined import family_of
from dsft.models.files import ModelFiles


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFiles:
    files = compose(["model=tiny"]).run.model.resolve()
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path))
    return files


def notes(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "families").glob("*.json"))


def test_a_verdict_is_found_once_for_a_configuration(
    tiny: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = family_of(tiny)
    assert found.packs
    asked: list[ModelFiles] = []
    monkeypatch.setattr(trial, "examine", lambda files: asked.append(files) or found)
    assert family_of(tiny) == found
    assert family_of(replace(tiny, name_or_path="elsewhere", folder=None)) == found
    assert asked == []
    config = type(tiny.config).from_dict({**tiny.config.to_dict(), "rms_norm_eps": 1e-3})
    assert family_of(replace(tiny, config=config)) == found
    assert len(asked) == 1
    assert len(notes(tmp_path)) == 2


def test_a_damaged_note_is_made_anew(tiny: ModelFiles, tmp_path: Path) -> None:
    found = family_of(tiny)
    (note,) = notes(tmp_path)
    for text in ("", "[]", '{"packs": false', '{"packs": true}', '{"what": 1}'):
        note.write_text(text)
        assert family_of(tiny) == found


def test_a_note_that_others_may_write_is_not_believed(tiny: ModelFiles, tmp_path: Path) -> None:
    found = family_of(tiny)
    (note,) = notes(tmp_path)
    note.write_text(json.dumps({**found.as_dict(), "packs": False}))
    assert not family_of(tiny).packs
    (tmp_path / "families").chmod(0o777)
    assert family_of(tiny).packs


def test_a_refusal_is_not_remembered(tiny: ModelFiles, tmp_path: Path) -> None:
    config = type(tiny.config).from_dict({**tiny.config.to_dict(), "hidden_act": "nothing"})
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing"):
            family_of(replace(tiny, config=config))
    assert notes(tmp_path) == []
