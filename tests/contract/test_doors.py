"""A folder that is read names no code: whatever is in it, nothing is imported but dsft and installed plugins."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsft import adapters, chat, export, verify
from dsft.compose import compose, dump_yaml, load_yaml, read
from dsft.engine.assemble import skeleton
from dsft.learned import GROUPS, learned
from dsft.locate import PLUGINS, Allowed, ForeignNameError, locate
from dsft.methods import native
from dsft.results import find
from tests.contract.sessions import left_by

EVIL = """
from dataclasses import dataclass
from pathlib import Path
from dsft.methods.full import Full
from dsft.methods.native import Native

Path(__file__).with_name("ran").touch()

@dataclass(frozen=True)
class Evil:
    pass

@dataclass(frozen=True, kw_only=True)
class Adapter(Native):
    def add(self, model, anatomy): pass
    def merge(self, model): return model
"""
NAMES = (
    "evil.Evil", "evil.Adapter", "nice-adapter.evil.Adapter", "evil", "this.Zen", "this", "os.path.Path",
    "dsft..evil.Evil", ".evil.Evil", "dsft.methods.evil-1.Evil", "dsft.methods.native.Native ", "dsft.verify.Path",
    "d\u017fft.evil.Evil", "hydra_plugins.evil.Evil", "",
)  # fmt: skip


class Watch:
    """Stands before all finders, finds nothing, and knows what was asked for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def find_spec(self, name: str, *rest: object) -> None:
        self.asked.add(name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in dsft's own format and one in PEFT's."""
    root = tmp_path_factory.mktemp("made")
    for method in ("bitfit", "lora"):
        left_by(root / method, method)
        (root / method / "status.json").write_text('{"state": "done", "step": 2}')
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The runs in a working folder that holds hostile modules, first on the path. Nothing of them may run."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    shutil.copytree(made / "bitfit" / "adapter", tmp_path / "nice-adapter")
    for folder in (tmp_path, tmp_path / "nice-adapter", tmp_path / "hydra_plugins"):
        folder.mkdir(exist_ok=True)
        (folder / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(PLUGINS, raising=False)
    watch = Watch()
    monkeypatch.setattr(sys, "meta_path", [watch, *sys.meta_path])
    yield tmp_path
    assert not {name for name in watch.asked if name.split(".")[0] in ("evil", "this", "nice-adapter")}
    assert not {"evil", "this"} & sys.modules.keys()
    assert not list(tmp_path.rglob("ran"))


def _change(file: Path, change: Callable[[Any], object]) -> None:
    text = file.read_text()
    tree = load_yaml(file) if file.suffix == ".yaml" else json.loads(text)
    change(tree)
    file.write_text(dump_yaml(tree) if file.suffix == ".yaml" else json.dumps(tree))


def _refused(capsys: pytest.CaptureFixture[str], *said: str) -> None:
    """One line on stderr, with all of that in it."""
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), out + err
    for each in (*said, "of root" if not sys.platform.startswith("win") and Path.home() == Path("/root") else ""):
        assert each in err


def _read_by_all(run_dir: Path, capsys: pytest.CaptureFixture[str], *said: str) -> None:
    assert chat.main([str(run_dir), "--prompt", "hi"]) == 2
    _refused(capsys, *said)
    for what in ("adapter", "merged"):
        assert export.main([str(run_dir), "--to", what, "out"]) == 2
        _refused(capsys, *said)
    for reader in (adapters.load, find):
        with pytest.raises(ValueError, match="must") as caught:
            reader(*([run_dir] if reader is adapters.load else [[run_dir]]))  # type: ignore[operator]
        assert all(each in str(caught.value) for each in said)
    with pytest.raises(ValueError, match="must"):
        learned(run_dir, trust_remote_code=False)
    assert not Path("out").exists()


@pytest.mark.parametrize("group", ["model", "method", "quantization", "method.roles", "train"])
def test_no_group_that_a_reader_builds_names_a_module_of_the_folder(
    group: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _, inner = group.partition(".")
    named = {"_target_": "evil.Evil"}
    _change(
        place / "bitfit" / "config.yaml", lambda tree: tree[name].update({inner: [{"a": named}]} if inner else named)
    )
    _read_by_all(place / "bitfit", capsys, "bitfit/config.yaml", "evil.Evil")


def test_what_a_reader_does_not_need_is_not_built(place: Path) -> None:
    expected = adapters.load(place / "bitfit").compare("hi", max_new_tokens=3)
    (place / "bitfit" / "conf").mkdir()
    (place / "bitfit" / "conf" / "config.yaml").write_text("model: {_target_: evil.Evil}\n")
    file = place / "bitfit" / "config.yaml"
    honest = file.read_text()
    for group in ("data", "objective", "strategy", "tracker", "hydra"):
        named = {"_target_": "evil.Evil", "none": {"_target_": "this.Zen"}, "searchpath": ["pkg://evil"]}
        _change(file, lambda tree, group=group, named=named: tree.update({group: named}))  # type: ignore[misc]
        with pytest.raises(ValueError, match=r"must name an importable class|is not a key"):
            read(place / "bitfit")  # what a job builds whole
        assert adapters.load(place / "bitfit").compare("hi", max_new_tokens=3) == expected
        if group != "hydra":
            file.write_text(honest)


def test_an_adapter_names_no_module_beside_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "nice-adapter"
    for name in NAMES:
        _change(folder / "dsft_adapter.json", lambda said, name=name: said["method"].update({"_target_": name}))
        if name != "dsft.verify.Path":  # of dsft, which is imported before what is there is looked at
            assert chat.main([str(folder), "--prompt", "hi"]) == 2
            _refused(capsys, f"got {name}", str(folder / "dsft_adapter.json"))
        with pytest.raises(ValueError, match="must name a class"):
            native.read(folder)
    words = ["model=tiny", "method=bitfit", f"method.init_from={folder}", "launcher=local", "strategy=single"]
    _change(folder / "dsft_adapter.json", lambda said: said["method"].update({"_target_": "evil.Adapter"}))
    run = compose(words).run
    with pytest.raises(ValueError, match=r"method\.init_from: an adapter must name a class"):
        skeleton(run, run.model.resolve())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dsft.verify.Path"])
def test_a_name_that_is_read_is_refused_before_it_is_imported(name: str, place: Path) -> None:
    with pytest.raises(ForeignNameError):
        locate(name, Allowed(place / "bitfit" / "config.yaml"))


@pytest.mark.parametrize("name", ["dsft.verify.Path", "dsft.compose.Mapping"])
def test_a_class_that_a_module_of_ours_only_imports_is_not_ours(name: str) -> None:
    with pytest.raises(
        ForeignNameError,
        match=r"of no package that a folder may name|Python.s own library, of which a folder may name nothing",
    ):
        locate(name, Allowed())


def test_the_type_of_a_peft_method_is_pefts_own(place: Path) -> None:
    run = compose(["model=tiny", "method=peft", "method.type=peft.LoHaConfig", "launcher=local", "strategy=single"]).run
    for name in ("evil.Evil", "this.Zen", "peft-x.LoHaConfig"):
        object.__setattr__(run.method, "type", name)
        with pytest.raises(ValueError, match=r"method\.type must name a configuration class, as peft\.LoHaConfig"):
            run.method.config(["q_proj"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("megatron_config", {"a": 1}), ("adapters", {"a": "evil/repo"}), ("shadow_model", "evil/repo"),
        ("tokenizer_kwargs", {"trust_remote_code": True}), ("arrow_config", {"router_temperature": 1.0}),
    ],
)  # fmt: skip
def test_an_adapter_of_peft_brings_all_that_it_needs(
    key: str, value: object, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "lora" / "adapter" / "adapter_config.json"
    _change(file, lambda said: said.update({key: value}))
    assert chat.main([str(place / "lora"), "--prompt", "hi"]) == 2
    _refused(capsys, f"{file} of ", f"with {key}=")


@pytest.mark.parametrize(("key", "value"), [("r", "text"), ("r", 1e308), ("r", 10**40), ("target_modules", [["x"]])])
def test_a_description_that_no_class_can_be_made_of_is_one_line(
    key: str, value: object, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(place / "lora" / "adapter", alone)
    _change(alone / "adapter_config.json", lambda said: said.update({key: value}))
    assert chat.main([str(alone), "--prompt", "hi"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), "frame #" in err) == ("", 1, False), out + err
    assert err.startswith(f"dsft: {alone} must fit the base ")


def test_what_peft_says_of_its_base_class_imports_nothing(place: Path) -> None:
    expected = adapters.load(place / "lora").compare("hi", max_new_tokens=3)
    mapped = {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}
    _change(place / "lora" / "adapter" / "adapter_config.json", lambda said: said.update(mapped))
    assert adapters.load(place / "lora").compare("hi", max_new_tokens=3) == expected


def test_one_names_ones_own_package_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours_alone.py").write_text(EVIL.replace("Evil", "Mine"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PLUGINS, raising=False)
    with pytest.raises(ForeignNameError, match=f"set {PLUGINS}=ours_alone"):
        locate("ours_alone.Mine", Allowed())
    monkeypatch.setenv(PLUGINS, "other, ours_alone")
    assert locate("ours_alone.Mine", Allowed()).__name__ == "Mine"
    assert str(tmp_path) not in sys.path
    monkeypatch.setenv(PLUGINS, "other;ours_alone")
    with pytest.raises(ValueError, match=f"{PLUGINS} must be names of packages"):
        locate("ours_alone.Mine", Allowed())


def test_the_verifier_builds_no_more_than_other_readers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "bitfit" / "adapter" / "probe.safetensors").touch()
    _change(place / "bitfit" / "config.yaml", lambda tree: tree["method"].update({"_target_": "evil.Evil"}))
    monkeypatch.setattr(sys, "argv", ["verify", str(place / "bitfit"), str(place / "bitfit" / "adapter")])
    with pytest.raises(ForeignNameError, match=r"method\._target_ must name an importable class, got evil\.Evil"):
        verify.main()
    assert set(GROUPS) == {"model", "method", "quantization", "train"}
