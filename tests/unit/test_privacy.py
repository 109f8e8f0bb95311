"""Who may read what a run leaves, and where secrets stand: nowhere but in the batch script that needs them."""

import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dsft_launchers import submit
from dsft_launchers.files import readable_by_all, replace_text, write_for_nobody_else

from dsft import dispatch, folder, preflight
from dsft.again import command_of
from dsft.compose import compose, load_yaml
from dsft.data.open import open_data
from dsft.engine.result import mode_as_usual as of_a_result
from dsft.privacy import SecretError, for_trackers, not_secret, private_input
from dsft.sweeps import ledger
from dsft.sweeps.ledger import Entry
from dsft.telemetry.track_wandb import WandbTracker

DIGESTS = dict.fromkeys(("base_digest", "data_digest", "tokens_digest"), "d" * 64)
WORDS = ["model=tiny", "method=lora", "launcher=local", "strategy=single", "tracker=[none]", "data=local"]


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may read; pytest's own are for one user alone."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place)


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    write_for_nobody_else()
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("umask", "closed"),
    [*((umask, closed) for umask in (0o000, 0o002, 0o022, 0o077) for closed in ("", "file")), (0o022, "folder")],
    indirect=["umask"],
)
def test_the_modes_are_those_of_the_table(umask: int, closed: str, public: Path) -> None:
    rows, run_dir = public / "rows" / "rows.jsonl", public / "run"
    rows.parent.mkdir(mode=0o755)
    rows.write_text("".join(json.dumps({"question": f"{public} {n}", "answer": str(n)}) + "\n" for n in range(8)))
    rows.parent.chmod(0o711 if closed != "folder" else 0o700)
    rows.chmod(0o600 if closed == "file" else 0o644)
    composed = compose([*WORDS, f"data.path={rows}", f"run_dir={run_dir}", "data.eval_fraction=0.3"])
    files = composed.run.model.resolve()
    data = open_data(composed.run.data, files.tokenizer(), max_length=512, seed=0, cache_dir=public / "cache")
    prepared = {"plan": {}, "digests": DIGESTS, "tokens": data.train.folder.parent}
    notes = list(folder.notes(run_dir, composed.resolved))
    preflight.create(run_dir, composed, prepared)
    result = run_dir / "adapter"
    result.mkdir()
    (result / "adapter_model.safetensors").touch(0o600)
    of_a_result(result)
    usual = umask | 0o002
    assert mode(run_dir) == (0o700 if closed else 0o777 & ~usual)
    assert mode(data.train.folder.parent) == (0o700 if closed else 0o777 & ~usual)
    inside = [path for place in (run_dir, data.train.folder.parent) for path in place.rglob("*") if path.is_file()]
    assert {mode(path) for path in inside} == {0o666 & ~usual}
    assert len(inside) > 10
    assert [f"data.path={rows}" in note for note in notes] == [True] * bool(closed)


def test_a_folder_that_was_opened_stays_open_when_its_run_goes_on(public: Path) -> None:
    rows, run_dir = public / "rows.jsonl", public / "run"
    rows.write_text("{}")
    rows.chmod(0o600)
    composed = compose([*WORDS, f"data.path={rows}", f"run_dir={run_dir}"])
    folder.create(run_dir, composed, {}, DIGESTS)
    run_dir.chmod(0o750)
    folder.create(run_dir, composed, {}, DIGESTS)
    assert mode(run_dir) == 0o750


def test_a_file_is_read_by_all_if_its_folders_let_them(public: Path) -> None:
    (public / "model").mkdir(mode=0o755)
    (public / "model" / "config.json").write_text("{}")
    (public / "link").symlink_to(public / "model")
    assert readable_by_all(public / "link")
    assert private_input({"model": {"path": str(public / "link")}, "run_dir": "/root"}) is None
    (public / "model" / "config.json").chmod(0o640)
    mixture = {"data": {"sources": {"a": {"path": str(public / "link")}}}}
    assert private_input(mixture) == f"data.sources.a.path={public / 'link'}"
    (public / "model").chmod(0o750)
    assert not readable_by_all(public / "link" / "config.json")


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "my_password", "AWS_SECRET_ACCESS_KEY", "db.passwd", "APIKEY2", "X_CREDENTIALS",
     "GITHUB_PAT", "DB_PASS", "BASIC_AUTH", "passphrase", "AZURE_CREDS"],
)  # fmt: skip
def test_what_is_a_secret_by_its_name(name: str) -> None:
    with pytest.raises(SecretError, match=f"must hold no secret, got .*{name}"):
        not_secret(name)


@pytest.mark.parametrize(
    "name", ["PWD", "PATH", "COMPASS_DIR", "AUTHOR", "PATTERN", "KEYBOARD", "TOKENIZERS_PARALLELISM"]
)
def test_what_is_no_secret_by_its_name(name: str) -> None:
    assert not_secret(name) == name


@pytest.mark.parametrize("default", ["", ",none"])
def test_a_secret_of_the_environment_is_refused(default: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hush")
    with pytest.raises(ValueError, match=r"^data\.system must hold no secret, got \$\{oc\.env:HF_TOKEN\}, ") as refusal:
        compose([*WORDS, "data.path=rows.jsonl", f"data.system=${{oc.env:HF_TOKEN{default}}}"])
    assert "hush" not in str(refusal.value)


def test_a_secret_in_a_yaml_is_refused_and_other_variables_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZER_FOLDER", "here")
    monkeypatch.setenv("DSFT_CONFIG_DIR", str(tmp_path))
    words = [*WORDS, "data.path=rows.jsonl"]
    assert compose([*words, "data.system=${oc.env:TOKENIZER_FOLDER}"]).resolved["data"]["system"] == "here"
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nwhich: A\ndata: {system: '${oc.env:${which}_TOKEN}'}\n"
    )
    with pytest.raises(ValueError, match="must hold no secret, got"):
        compose([*words, "experiment=mine"])


def _sent(run_dir: Path) -> list[Path]:
    """The files that hold what a tracker was told."""
    return [path for path in (run_dir / "wandb").rglob("*.*") if path.suffix in (".wandb", ".yaml", ".json")]


def test_planted_secrets_stand_in_the_batch_script_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PLANTED_TOKEN", "hush-environment")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(sys, "argv", ["dsft", "launcher.setup=[hush-typed]"])
    rows, run_dir = tmp_path / "hushed-place" / "rows.jsonl", tmp_path / "run"
    rows.parent.mkdir()
    rows.write_text(json.dumps({"question": "q", "answer": "a"}))
    setup = "launcher.setup=['export X_KEY=hush-setup']"
    composed = compose([
        *WORDS[:2], "data=local", f"data.path={rows}", "launcher=slurm", "launcher.dry_run=true", setup,
        f"run_dir={run_dir}",
    ])  # fmt: skip
    asked = dispatch.request(composed, None, run_dir)
    submit.submit(asked, dispatch.batch_step(composed, str(run_dir)), run_dir / "slurm")
    folder.create(run_dir, composed, {}, DIGESTS)
    tracker = WandbTracker(mode="offline", project="p", entity=None, name=None, group=None)
    config = for_trackers(load_yaml(run_dir / "config.yaml"))
    tracker.open(run_dir, config, None)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    holders = [path for path in run_dir.rglob("*") if path.is_file() and b"hush-" in path.read_bytes()]
    assert {path.resolve() for path in holders} == {(run_dir / "slurm" / "7_submission.sh").resolve()}
    assert mode(holders[0].resolve()) == 0o700
    assert "export X_KEY=hush-setup" in holders[0].read_text()
    assert config["data"]["path"] == "rows.jsonl"
    assert "launcher" not in config
    until = time.monotonic() + 60  # its service writes in a process of its own, and on a busy machine after close
    while not (sent := _sent(run_dir)) or not any(b"rows.jsonl" in path.read_bytes() for path in sent):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert not [path for path in sent if b"hushed-place" in path.read_bytes()]
    assert "launcher.setup=???" in command_of(run_dir).replace("'", "")
    with pytest.raises(ValueError, match=r"launcher\.setup must be given"):
        compose(load_yaml(run_dir / "overrides.yaml"))


def test_a_sweep_that_holds_lines_of_setup_is_for_its_user_alone(tmp_path: Path) -> None:
    for word, expected in (("a=1", 0o644), ("launcher.setup=[x]", 0o600), ("+launcher.setup=[x]", 0o600)):
        book = ledger.begin("loss")
        book.put(0, Entry([word], None), keep=False)
        before = os.umask(0o022)
        book.write(tmp_path)
        os.umask(before)
        assert mode(tmp_path / ledger.NAME) == expected


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """A link that somebody put where the new content is written first, before it gets its name."""
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / f".status.json.{os.getpid()}").symlink_to(tmp_path / "theirs")
    replace_text(tmp_path / "status.json", "ours")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "status.json").read_text() == "ours"
    assert not (tmp_path / "status.json").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2
