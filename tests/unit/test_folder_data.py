"""A run folder knows its data by their tokens, or by their inputs where an older dsft made it; and the day told."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsft import folder
from dsft.checkpoint import manifest
from dsft.checkpoint.manifest import Identity, Manifest
from dsft.compose import compose
from dsft.preflight import preflight

DIGESTS = dict(base_fingerprint="f" * 64, base_digest="b" * 64, data_digest="d" * 64, tokens_digest="t" * 64)
PLAN = {"parameters": {"trainable": 7}}
WORDS = ("method=lora", "launcher=local", "strategy=single", "tracker=[]", "train.steps=2", "train.max_length=64")


@pytest.fixture
def composed(tmp_path: Path) -> Any:
    return compose([*WORDS, "model=tiny", "data=local", "data.path=rows.jsonl", f"run_dir={tmp_path / 'run'}"])


@pytest.fixture
def run_dir(tmp_path: Path, composed: Any) -> Path:
    folder.create(tmp_path / "run", composed, PLAN, DIGESTS)
    return tmp_path / "run"


def edit(run_dir: Path, **changes: str | None) -> None:
    kept = {**folder.provenance(run_dir), **changes}
    there = {key: value for key, value in kept.items() if value is not None}
    (run_dir / "provenance.json").write_text(json.dumps(there))


def test_tokens_decide_where_they_are_known(run_dir: Path, composed: Any) -> None:
    tree = composed.resolved
    assert folder.identity(run_dir, tree).data == "t" * 64
    folder.check_digests(run_dir, {**DIGESTS, "data_digest": "of the same tokens"}, tree)
    with pytest.raises(ValueError, match=r"data was t{12}, is uuu by its tokens, though .*jinja or transformers is"):
        folder.check_digests(run_dir, {**DIGESTS, "tokens_digest": "uuu"}, tree)
    with pytest.raises(ValueError, match=r"\(data was t{12}, is uuu by its tokens\); choose .*resume.allow=\[data\]"):
        folder.check_digests(run_dir, {**DIGESTS, "data_digest": "e", "tokens_digest": "uuu"}, tree)
    allowed = {**tree, "resume": {**tree["resume"], "allow": ["data"]}}
    folder.check_digests(run_dir, {**DIGESTS, "data_digest": "e", "tokens_digest": "uuu"}, allowed)


def test_a_run_of_an_older_dsft_goes_on_by_its_inputs(run_dir: Path, composed: Any) -> None:
    edit(run_dir, tokens_digest=None)
    folder.check_digests(run_dir, DIGESTS, composed.resolved)
    with pytest.raises(ValueError, match=r"data was d{12}, is e by its content"):
        folder.check_digests(run_dir, {**DIGESTS, "data_digest": "e"}, composed.resolved)
    folder.create(run_dir, composed, PLAN, DIGESTS)
    assert "tokens_digest" not in folder.provenance(run_dir)
    assert folder.identity(run_dir, composed.resolved).data == "d" * 64, "as its checkpoints have it"


def test_a_run_of_an_older_dsft_goes_on_by_the_fingerprint_of_its_base(run_dir: Path, composed: Any) -> None:
    edit(run_dir, base_fingerprint=None, base_digest="f" * 64)  # as commit 8cfa692 called it
    folder.check_digests(run_dir, DIGESTS, composed.resolved)
    with pytest.raises(ValueError, match=r"model was f{12}, is eee by its content"):
        folder.check_digests(run_dir, {**DIGESTS, "base_fingerprint": "eee"}, composed.resolved)
    folder.create(run_dir, composed, PLAN, DIGESTS)
    kept = folder.provenance(run_dir)
    assert (kept["base_fingerprint"], kept["base_digest"]) == ("f" * 64, "b" * 64)
    who = folder.identity(run_dir, composed.resolved)
    assert (who.base, who.base_digest) == ("f" * 64, "b" * 64)


def test_all_bytes_of_the_base_decide_where_they_were_read(run_dir: Path, composed: Any) -> None:
    with pytest.raises(ValueError, match=r"model was b{12}, is eee by its content"):
        folder.check_digests(run_dir, {**DIGESTS, "base_digest": "eee"}, composed.resolved)
    edit(run_dir, base_digest=None)  # stopped before it was known
    folder.check_digests(run_dir, {**DIGESTS, "base_digest": "eee"}, composed.resolved)
    folder.note_base(run_dir, "b" * 64)
    assert folder.provenance(run_dir)["base_digest"] == "b" * 64


@pytest.mark.parametrize("kind", ["tokens_digest", "data_digest"])
def test_without_provenance_the_checkpoint_tells_by_what_its_data_are_known(
    kind: str, run_dir: Path, composed: Any
) -> None:
    (run_dir / "provenance.json").unlink()
    place = run_dir / "checkpoints" / manifest.folder_name(3)
    place.mkdir(parents=True)
    who = Identity("run", "config", "f" * 64, DIGESTS[kind], "b" * 64)
    manifest.write(place, Manifest(step=3, identity=who, world_size=1, lease=1, progress={}, files={}, index={}))
    folder.check_digests(run_dir, DIGESTS, composed.resolved)
    folder.create(run_dir, composed, PLAN, DIGESTS)
    assert folder.identity(run_dir, composed.resolved).data == DIGESTS[kind]
    with pytest.raises(ValueError, match="data was "):
        folder.check_digests(run_dir, {**DIGESTS, kind: "other"}, composed.resolved)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Preflight of a run on a model folder, whose tokenizer a function may change before."""

    def prepare(change: Any) -> Any:
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"question": "q", "answer": "a <new>"}\n')
        monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))
        files = compose(["model=tiny"]).run.model.resolve()
        place = tmp_path / "model"
        if not place.is_dir():
            assert files.folder is not None
            place.mkdir()
            for file in files.folder.iterdir():
                os.link(file, place / file.name) if file.suffix == ".safetensors" else (
                    (place / file.name).write_bytes(file.read_bytes())
                )
        tokenizer = files.tokenizer()
        change(tokenizer)
        tokenizer.save_pretrained(place)
        words = ["model=tiny", f"model.path={place}", "data=local", f"data.path={rows}", f"run_dir={tmp_path / 'out'}"]
        composed = compose([*WORDS, *words])
        return composed, preflight(composed)

    return prepare


def test_evaluations_of_no_rows_are_named(tmp_path: Path, prepared: Any) -> None:
    composed, found = prepared(lambda tokenizer: None)
    assert found["notes"] == []
    asked = replace(composed, run=replace(composed.run, train=replace(composed.run.train, eval_every=1)))
    again = preflight(asked)
    assert again is not None
    assert again["notes"] == ["train.eval_every=1 evaluates nothing: no rows are held out"]


def test_the_day_of_the_first_start_is_kept(prepared: Any, tmp_path: Path) -> None:
    def dated(tokenizer: Any) -> None:
        tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template

    composed, found = prepared(dated)
    day = found["digests"]["template_date"]
    assert found["notes"] == [f"the chat template reads the date; it is fixed to {day} for this run"]
    folder.create(tmp_path / "out", composed, found["plan"], found["digests"])
    assert folder.provenance(tmp_path / "out")["template_date"] == day
    edit(tmp_path / "out", template_date="2020-02-03")
    with pytest.raises(ValueError, match=r"data was .* by its tokens"):
        prepared(dated)


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(prepared: Any, tmp_path: Path) -> None:
    def grown(tokenizer: Any) -> None:
        rows = compose(["model=tiny"]).run.model.resolve().config.vocab_size
        tokenizer.add_tokens([f"<unused {number}>" for number in range(rows - len(tokenizer))] + ["<new>"])

    with pytest.raises(
        ValueError, match=r"model must have an embedding row for each token .* got token '<new>' \(number"
    ):
        prepared(grown)
    assert not (tmp_path / "out").exists()
