"""A base model's own code runs where this command line says so, and as it was when the run was started."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dsft_launchers.verdict import RefusedError

from dsft import adapters, chat, export, plan, run
from dsft.basis import require_code_on_ranks
from dsft.comm.world import World
from dsft.compose import compose, load_yaml
from dsft.folder import provenance
from dsft.models.source import Pretrained
from tests import warm

CONFIG = "class Config(LlamaConfig):\n    model_type = 'odd'\n"
MODEL = "class Model(LlamaForCausalLM):\n    config_class = Config\n"
IMPORTS = "from transformers import LlamaConfig, LlamaForCausalLM\nfrom pathlib import Path\n"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a base whose own code was trusted; the code leaves a file where it runs."""
    root = tmp_path_factory.mktemp("odd")
    shutil.copytree(str(compose(["model=tiny"]).run.model.resolve().folder), root / "base")
    ran = f"Path({str(root / 'ran')!r}).touch()\n"
    (root / "base" / "odd.py").write_text(IMPORTS + ran + CONFIG + MODEL)
    shape = json.loads((root / "base" / "config.json").read_text())
    mapped = {"AutoConfig": "odd.Config", "AutoModelForCausalLM": "odd.Model"}
    (root / "base" / "config.json").write_text(json.dumps({**shape, "model_type": "odd", "auto_map": mapped}))
    words = ["model=custom", f"model.path={root / 'base'}", "method=bitfit", "data=reasoning_gym", "data.size=32"]
    more = ["train.steps=2", "launcher=local", "tracker=[]", f"run_dir={root / 'run'}"]
    refused = warm.run("dsft.run", *words, *more)
    assert (refused.returncode, (root / "ran").exists()) == (2, False)
    done = warm.run("dsft.run", *words, "model.trust_remote_code=true", *more)
    assert done.returncode == 0, done.stderr
    (root / "ran").unlink()
    return root


def _one_line(capsys: pytest.CaptureFixture[str], *said: str) -> None:
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), out + err
    assert all(each in err for each in said), err


def test_the_code_of_a_model_runs_where_the_reader_says_so(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = odd / "run"
    said = (f"dsft: {folder / 'config.yaml'} of ", "asks for the model's own code", "add --trust-remote-code")
    assert chat.main([str(folder), "--prompt", "hi"]) == 2
    _one_line(capsys, *said)
    assert export.main([str(folder), "--to", "merged", str(tmp_path / "out")]) == 2
    _one_line(capsys, *said)
    with pytest.raises(ValueError, match="asks for the model's own code"):
        adapters.load(folder)
    assert not (odd / "ran").exists()
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    assert "verified" in [event["event"] for event in events], "the reader of the result was told to trust the code"
    assert set(adapters.load(folder, trust_remote_code=True).compare("hi", max_new_tokens=3)) == {"base", "run"}
    assert (odd / "ran").exists()


def test_changed_code_is_refused_before_it_runs(odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = odd / "base" / "odd.py", odd / "run"
    was, world = code.read_text(), World(0, 1, 0, torch.device("cpu"))
    model = compose(["model=custom", f"model.path={odd / 'base'}", "model.trust_remote_code=true"]).run.model
    known = provenance(folder)
    require_code_on_ranks(model, known, world)
    (odd / "beside").mkdir()
    (odd / "base" / "linked").symlink_to(odd / "beside")
    (odd / "beside" / "more.py").touch()
    with pytest.raises(RefusedError, match="rank 0: "):
        require_code_on_ranks(model, known, world)
    (odd / "base" / "linked").unlink()
    code.write_text(was + f"Path({str(tmp_path / 'evil')!r}).touch()\n")
    try:
        words = load_yaml(folder / "overrides.yaml")
        for verb, argv in (
            (chat.main, [str(folder), "--prompt", "hi", "--trust-remote-code"]),
            (export.main, [str(folder), "--to", "merged", str(tmp_path / "out"), "--trust-remote-code"]),
            (run.main, [*words, "train.steps=3"]),
            (plan.main, words),
            (run.main, [*words, f"method.init_from={folder}", f"run_dir={tmp_path / 'new'}"]),
        ):
            assert verb(argv) == 2
            _one_line(capsys, "model.path must hold the code with which the run was made", str(odd / "base"))
        with pytest.raises(RefusedError, match=f"rank 0: .*{known['base_code'][:12]}"):
            require_code_on_ranks(model, known, world)
    finally:
        code.write_text(was)
    assert not (tmp_path / "evil").exists()
    (folder / "provenance.json").rename(tmp_path / "kept")
    (odd / "ran").unlink(missing_ok=True)
    assert chat.main([str(folder), "--prompt", "hi", "--trust-remote-code"]) == 2
    _one_line(capsys, f"{folder} must say in provenance.json which code of its base was trusted")
    (tmp_path / "kept").rename(folder / "provenance.json")
    assert not (odd / "ran").exists()


@pytest.mark.parametrize("revision", ["null", "main", "v1", "0123abc", "0" * 41])
def test_code_of_a_hub_is_of_a_whole_commit(
    revision: str, typed_alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=custom", "model.path=some/model", "model.trust_remote_code=true", f"model.revision='{revision}'"]
    assert (
        run.main([*words[:3], *words[3:], "data=reasoning_gym", "launcher=local", "tracker=none", "run_dir=run"]) == 2
    )
    _one_line(capsys, "dsft: model.revision must be a full commit, 40 hexadecimal digits")
    assert not Path("run").exists()


@pytest.mark.parametrize("trust", [False, True])
def test_code_is_fetched_where_it_is_trusted(trust: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def fetch(path: str, **more: Any) -> str:
        asked.update(more)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model = Pretrained(
        path="some/model", init="pretrained", revision="a" * 40, trust_remote_code=trust, config_of=None, config=None
    )
    with pytest.raises(ValueError, match="no network"):
        model.resolve()
    assert ("*.py" in asked["allow_patterns"]) is trust
    assert asked["revision"] == "a" * 40


def test_trusted_code_is_the_folders_own(odd: Path, tmp_path: Path) -> None:
    shutil.copytree(odd / "base", tmp_path / "base")
    shape = json.loads((tmp_path / "base" / "config.json").read_text())
    shape["auto_map"]["AutoConfig"] = "else/where--odd.Config"
    (tmp_path / "base" / "config.json").write_text(json.dumps(shape))
    model = compose(["model=custom", f"model.path={tmp_path / 'base'}", "model.trust_remote_code=true"]).run.model
    with pytest.raises(ValueError, match="whose auto_map names another repository"):
        model.resolve()
