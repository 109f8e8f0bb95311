"""What a run folder refuses, and how resume.anew=true gets past it; nothing moves before the folder is written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsft import folder, published
from dsft.checkpoint import manifest
from dsft.checkpoint.manifest import Identity, Manifest
from dsft.compose import Composed, compose, load_yaml

WORDS = (
    "model=tiny", "method=lora", "data=reasoning_gym", "launcher=local", "strategy=single", "tracker=[]",
    "train.steps=6",
)  # fmt: skip
DIGESTS = dict(base_fingerprint="f" * 64, base_digest="b" * 64, data_digest="d" * 64, tokens_digest="t" * 64)
PLAN = {"parameters": {"trainable": 7}}


@pytest.fixture(scope="module")
def plain() -> Composed:
    return compose(WORDS)


@pytest.fixture(scope="module")
def anew() -> Composed:
    return compose([*WORDS, "resume.anew=true", "resume.takeover=true"])


def resolved(composed: Composed, **train: Any) -> dict[str, Any]:
    return {**composed.resolved, "train": {**composed.resolved["train"], **train}}


def checkpoint(run_dir: Path, step: int) -> Path:
    place = run_dir / "checkpoints" / manifest.folder_name(step)
    place.mkdir(parents=True)
    who = Identity("run", "config", "f" * 64, "d" * 64, "b" * 64)
    manifest.write(place, Manifest(step=step, identity=who, world_size=1, lease=1, progress={}, files={}, index={}))
    return place


def status(run_dir: Path, **values: Any) -> None:
    told = {"state": "done", "step": 6, "attempts": 1, "checkpoint": "step-00000006", "reason": None, "wandb_id": None}
    (run_dir / "status.json").write_text(json.dumps({**told, **values}))


def result(run_dir: Path) -> None:
    (run_dir / "adapter").mkdir()
    (run_dir / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    published.describe(run_dir / "adapter")


@pytest.fixture
def done(tmp_path: Path, plain: Composed) -> Path:
    """A run of six steps that is done, with two checkpoints, records and a result."""
    folder.create(tmp_path, plain, PLAN, DIGESTS)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "lease-000004").touch()
    checkpoint(tmp_path, 3)
    checkpoint(tmp_path, 6)
    (tmp_path / "metrics.jsonl").write_text('{"step": 6, "loss": 1.0}\n')
    status(tmp_path)
    result(tmp_path)
    return tmp_path


def preflight(run_dir: Path, tree: dict[str, Any]) -> bool:
    """What preflight asks of the folder, in its order; True if the run is done."""
    folder.check(run_dir, tree)
    is_anew = folder.anew(run_dir, tree)
    found = not is_anew and folder.check_length(run_dir, tree)
    folder.check_digests(run_dir, DIGESTS, tree)
    if found:
        published.check(run_dir)
    elif not is_anew:
        folder.check_parameters(run_dir, PLAN)
    return found


def _gone(run_dir: Path) -> None:
    (run_dir / "adapter" / "adapter_model.safetensors").unlink()


def _torn(run_dir: Path) -> None:
    (run_dir / "adapter" / "adapter_model.safetensors").write_bytes(b"wei")


def _flipped(run_dir: Path) -> None:
    (run_dir / "adapter" / "adapter_model.safetensors").write_bytes(b"weighst")


def _unlisted(run_dir: Path) -> None:
    status(run_dir, saved=None)  # as every dsft writes it that lists the files of a result
    (run_dir / "adapter" / "verified.json").unlink()


def _damaged_status(run_dir: Path) -> None:
    (run_dir / "status.json").write_text("{")


def _odd_status(run_dir: Path) -> None:
    (run_dir / "status.json").write_text('["done"]')


def _status_without_a_step(run_dir: Path) -> None:
    (run_dir / "status.json").write_text('{"state": "done"}')


def _more_steps_than_asked_for(run_dir: Path) -> None:
    status(run_dir, step=9)


def _no_checkpoints(run_dir: Path) -> None:
    for place in (run_dir / "checkpoints").glob("step-*"):
        place.rename(run_dir / "checkpoints" / f"lost-{place.name}")
    status(run_dir, state="failed")


def _edited_manifest(run_dir: Path, **more: Any) -> None:
    file = run_dir / "checkpoints" / "step-00000006" / manifest.FILE
    content = {**json.loads(file.read_text()), **more}
    content.pop("digest")
    file.write_text(json.dumps({**content, "digest": manifest._digest(content)}))
    status(run_dir, state="failed")


def _later_format(run_dir: Path) -> None:
    _edited_manifest(run_dir, format=manifest.FORMAT + 1)


def _unknown_key(run_dir: Path) -> None:
    _edited_manifest(run_dir, weather="fine")


def _unknown_key_without_a_status(run_dir: Path) -> None:
    _unknown_key(run_dir)
    (run_dir / "status.json").unlink()


def _other_configuration(run_dir: Path) -> None:
    file = run_dir / "config.yaml"
    file.write_text(file.read_text().replace("rank: 16", "rank: 4"))


def _damaged_configuration(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("{{")


def _other_base(run_dir: Path) -> None:
    file = run_dir / "provenance.json"
    file.write_text(file.read_text().replace("b" * 64, "c" * 64))


def _other_parameters(run_dir: Path) -> None:
    (run_dir / "plan.json").write_text(json.dumps({"parameters": {"trainable": 8}}))
    status(run_dir, state="failed")


REFUSED: dict[Callable[[Path], None], str] = {
    _gone: r"adapter_model\.safetensors missing; put it back, or remove .*status\.json and start again",
    _torn: "with 3 bytes, 7 were written; put it back",
    _flipped: "changed; put it back",
    _unlisted: r"adapter/verified\.json missing; put it back",
    _damaged_status: r"status\.json is damaged; re(store|move) it",
    _odd_status: r"status\.json is damaged; re(store|move) it",
    _status_without_a_step: r"status\.json is damaged; re(store|move) it",
    _more_steps_than_asked_for: "train.steps must be at least 9, .* or begin anew with resume.anew=true",
    _no_checkpoints: "holds no checkpoint to go on from; .* or begin anew with resume.anew=true",
    _later_format: "made by a later dsft .* or begin anew with resume.anew=true",
    _unknown_key: "made by a later dsft .* or begin anew with resume.anew=true",
    _unknown_key_without_a_status: "made by a later dsft",
    _other_configuration: "method.rank was 4, is 16",
    _damaged_configuration: r"config\.yaml is damaged; .* or begin anew with resume.anew=true",
    _other_base: "model was cccccccccccc, is bbbbbbbbbbbb by its content",
    _other_parameters: "trains 8 parameters, this one would train 7",
}


def test_a_run_that_is_done_is_done(done: Path, plain: Composed) -> None:
    assert preflight(done, plain.resolved)
    assert not preflight(done, resolved(plain, steps=9))


def test_a_run_without_a_checkpoint_begins_again_and_may_be_shorter(done: Path, plain: Composed) -> None:
    for step in (3, 6):
        shutil.rmtree(done / "checkpoints" / manifest.folder_name(step))
    status(done, state="failed", step=30, checkpoint=None)
    assert not preflight(done, resolved(plain, steps=20))


def test_epochs_that_give_fewer_steps_than_were_trained_are_refused_as_steps_are(done: Path) -> None:
    folder.check_steps(done, 6, "train.epochs")
    with pytest.raises(
        ValueError, match=r"train\.epochs must give at least 6 steps, the steps of .* so far, got 5; raise"
    ):
        folder.check_steps(done, 5, "train.epochs")
    for step in (3, 6):
        shutil.rmtree(done / "checkpoints" / manifest.folder_name(step))
    status(done, state="failed", step=6, checkpoint=None)
    folder.check_steps(done, 5, "train.epochs")  # it begins again at step 1


@pytest.mark.parametrize("damage", REFUSED, ids=lambda each: each.__name__)
def test_what_cannot_go_on_is_refused_in_one_line_and_resume_anew_begins_again(
    damage: Callable[[Path], None], done: Path, plain: Composed, anew: Composed
) -> None:
    damage(done)
    before = {path.relative_to(done): path.read_bytes() for path in done.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=REFUSED[damage]) as refused:
        preflight(done, plain.resolved)
    assert "\n" not in str(refused.value)
    assert not preflight(done, anew.resolved)
    list(folder.notes(done, anew.resolved))
    assert {path.relative_to(done): path.read_bytes() for path in done.rglob("*") if path.is_file()} == before
    folder.create(done, anew, PLAN, DIGESTS)
    assert [path.name for path in (done / "checkpoints").iterdir()] == ["lease-000004"]
    assert not any((done / name).exists() for name in ("status.json", "metrics.jsonl", "adapter"))
    assert (done / "before-1" / "metrics.jsonl").is_file()
    assert len(list((done / "before-1" / "checkpoints").iterdir())) == 2
    assert not preflight(done, plain.resolved)


def test_a_damaged_checkpoint_is_the_ranks_to_judge_and_the_one_before_it_decides(done: Path, plain: Composed) -> None:
    _unknown_key(done)
    newest = done / "checkpoints" / "step-00000006"
    checkpoint(done, 9)
    (done / "checkpoints" / "step-00000009" / manifest.FILE).write_text("{")
    with pytest.raises(ValueError, match="step-00000006 was made by a later dsft"):
        preflight(done, plain.resolved)
    (newest / manifest.FILE).unlink()
    assert not preflight(done, plain.resolved)


def test_what_acts_once_is_never_stored(tmp_path: Path, anew: Composed) -> None:
    assert anew.resolved["resume"]["anew"]
    folder.create(tmp_path, anew, PLAN, DIGESTS)
    stored = load_yaml(tmp_path / "config.yaml")
    assert (stored["resume"]["anew"], stored["resume"]["takeover"]) == (False, False)
    assert not any("resume." in word for word in load_yaml(tmp_path / "overrides.yaml"))
    assert "train.steps=6" in load_yaml(tmp_path / "overrides.yaml")
    assert not folder.anew(tmp_path, stored)


def test_a_configuration_of_before_these_keys_goes_on(done: Path, plain: Composed) -> None:
    tree = {**plain.resolved, "resume": {"allow": []}}
    assert preflight(done, tree)
    folder.create(done, replace(plain, resolved=tree), PLAN, DIGESTS)
    assert load_yaml(done / "config.yaml")["resume"] == {"allow": []}
    assert preflight(done, plain.resolved)


def test_the_notes_say_what_moves(done: Path, plain: Composed, anew: Composed) -> None:
    assert list(folder.notes(done, plain.resolved)) == []
    (note,) = folder.notes(done, anew.resolved)
    assert f"move to {done / 'before-1'}" in note
    for name in ("status.json", "metrics.jsonl", "adapter", "checkpoints/step-00000006"):
        assert name in note
    assert "lease" not in note


def test_a_move_that_was_killed_goes_on_without_the_word(done: Path, plain: Composed) -> None:
    (done / "before-1.anew").mkdir()
    (done / "status.json").rename(done / "before-1.anew" / "status.json")
    (done / "checkpoints" / "step-00000006").rename(done / "before-1.anew" / "step-00000006")
    assert not preflight(done, plain.resolved)
    folder.create(done, plain, PLAN, DIGESTS)
    assert sorted(path.name for path in done.glob("before-*")) == ["before-1"]
    assert not (done / "adapter").exists()


def test_a_begun_run_has_another_name_than_the_one_before(done: Path, anew: Composed) -> None:
    before = folder.provenance(done)["run"]
    folder.create(done, anew, PLAN, DIGESTS)
    assert folder.provenance(done)["run"] != before
    assert folder.provenance(done / "before-1")["run"] == before


@pytest.mark.parametrize("names", [(), ("lease-000001",), ("lease-000001", "lease-000002", ".clock-4711")])
def test_a_start_that_was_killed_when_it_had_claimed_the_folder_does_not_take_it(
    names: tuple[str, ...], tmp_path: Path, plain: Composed
) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in names:
        (tmp_path / "checkpoints" / name).touch()
    folder.check(tmp_path, plain.resolved)
    (tmp_path / "checkpoints" / "notes.txt").touch()
    with pytest.raises(ValueError, match="must be empty or a run's folder"):
        folder.check(tmp_path, plain.resolved)


def test_a_folder_that_is_no_runs_is_not_moved_either(tmp_path: Path, anew: Composed) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="must be empty or a run's folder"):
        folder.check(tmp_path, anew.resolved)
