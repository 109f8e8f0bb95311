"""What is typed becomes a run, or one line that says why not."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dsft.compose import compose, dump_yaml, load_yaml, read
from dsft.plan import main

MOVING, UNCLIPPED = "optim.in_backward=true", "train.max_grad_norm=inf"
ELASTIC = ("launcher=slurm", "launcher.dry_run=true", "launcher.devices=2", "launcher.elastic=true")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["method=qlra"], "method=qlra does not exist; did you mean qlora?"),
        (["methd=lora"], "did you mean method?"),
        (["method.rnk=4"], "method.rnk is not a key; did you mean method.rank?"),
        (["train.stps=4"], "did you mean train.steps?"),
        (["launcher=slurm", "launcher.extra={nice: 1}"], "add what is in it one by one: +launcher.extra.NAME=VALUE"),
        (["method.options.use_rslora=true"], "is not a key yet; add it: +method.options.use_rslora=VALUE"),
        (["method.rank=0"], "method.rank must be 1 or more, got 0"),
        (["method.rank=-3"], "method.rank must be 1 or more, got -3"),
        (["method.rank=four"], "method.rank must be an integer, got 'four'"),
        (["method.rank=true"], "method.rank must be an integer, got True"),
        (["optim.name=adamm"], "optim.name must be 'adamw'"),
        (["train.steps=4", "train.epochs=1.0"], "not both"),
        (["train.steps=4", "train.profile=4"], "train.profile must be below train.steps, 4, got 4"),
        (["train.global_batch_size=1", "launcher.devices=2"], "at least the number of data ranks, 2"),
        (["strategy=single", "launcher.devices=2"], "strategy=single runs on one process"),
        (["launcher.devices=1000"], "launcher.devices must be at most"),
        (["launcher.nodes=2"], "launcher.nodes must be 1"),
        ([*ELASTIC, "launcher.nodes=1"], "launcher.elastic=true goes on with the nodes that are left"),
        ([*ELASTIC, "launcher.nodes=2", "strategy=hsdp", "strategy.shard_size=4"], "take strategy.shard_size=node"),
        (["method=full", "quantization=nf4"], "takes quantization=none or method=qlora".replace("takes", "take")),
        (["method=qlora", "quantization=none"], "method=qlora means a 4-bit base"),
        (["strategy=fsdp", "launcher.devices=2", "optim.name=adafactor"], "take optim.name=adamw or strategy=ddp"),
        ([MOVING], "take train.max_grad_norm=inf or optim.in_backward=false"),
        ([MOVING, UNCLIPPED, "train.on_nonfinite=skip"], "take train.on_nonfinite=stop"),
        ([MOVING, UNCLIPPED, "strategy=ddp", "launcher.devices=2"], "take strategy=fsdp"),
        (["data=local"], "data.path must be given"),
        (["optim.lr=fast"], "optim.lr must be a number, got 'fast'"),
        (["method.lr=1e-3"], "method.lr must stay the YAML's, got method.lr=1e-3; set optim.lr"),
        (["~method.lr"], "optim.lr must be given, as the YAML of dsft.methods.peft_lora.Lora names no rate"),
        (["method.rank"], "method.rank must read KEY=VALUE"),
        (["+method.extra=1"], "method.extra is not a key of method"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_way_out(words: list[str], line: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is what is tested
        compose(words)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_was_repaired_is_said() -> None:
    composed = compose(["launcher.devices=2"])
    assert "strategy=auto: fsdp, for 2 processes" in composed.repairs
    assert any(line.startswith("train.epochs=1") for line in composed.repairs)
    assert composed.run.train.epochs == 1.0


def test_the_rate_is_the_methods_own_unless_one_is_chosen() -> None:
    lora, full = compose(["method=lora"]), compose(["method=full"])
    assert (lora.run.optim.lr, full.run.optim.lr) == (2e-4, 1e-5)
    assert "optim.lr=auto: 1e-05, as the YAML of the method has it" in full.repairs
    assert "lr" not in full.resolved["method"]  # the run folder has one rate
    for words, rate in ((["method=full", "optim.lr=3e-4"], 3e-4), (["experiment=demo"], 1e-3)):
        chosen = compose(words)
        assert chosen.run.optim.lr == rate
        assert not [line for line in chosen.repairs if line.startswith("optim.lr")]


def test_qlora_is_lora_with_a_4_bit_base() -> None:
    lora, qlora = compose(["method=lora"]).run, compose(["method=qlora"]).run
    assert qlora.method == lora.method
    assert type(qlora.quantization).__name__ == "NF4"
    assert type(lora.quantization).__name__ == "Unquantized" or type(lora.quantization) is not type(qlora.quantization)


def test_inf_is_a_number_where_it_means_without_a_limit() -> None:
    train = compose(["train.hang_after=inf", "train.max_grad_norm=inf"]).run.train
    assert train.hang_after == train.max_grad_norm == math.inf
    with pytest.raises(ValueError, match=r"optim.lr must be a finite number, got inf"):
        compose(["optim.lr=inf"])


TEXTS = (
    "seed ${train.seed} end",
    "\\${x}",
    "a\\\\${x}",
    "${",
    "${a:${b}} ${c",
    "\\",
    "$x",
    'it\'s "a": 1',
    "1e-3",
    "null",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_resolved_tree_is_read_as_it_was_written(text: str, tmp_path: Path) -> None:
    tree = {"a": {"text": text, "several": [text, 1, None, math.inf]}, "b": 1e-3}
    (tmp_path / "config.yaml").write_text(dump_yaml(tree))
    assert load_yaml(tmp_path / "config.yaml") == tree
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml"), resolve=True) == tree


def test_the_ranks_read_what_was_typed(tmp_path: Path) -> None:
    words = ['data.system="seed \\${train.seed} end"', 'launcher.setup=["export PATH=\\${HOME}/bin"]']
    composed = compose([*words, "launcher=slurm", "launcher.dry_run=true", f"run_dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(dump_yaml(composed.resolved))
    run = read(tmp_path)
    assert (run.data, run.launcher, run.train) == (composed.run.data, composed.run.launcher, composed.run.train)
    assert run.data.system == "seed ${train.seed} end"
    assert run.launcher.setup == ["export PATH=${HOME}/bin"]


Planned = Callable[[Path, list[str]], str]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Planned:
    """What dsft.plan prints when it is started in a folder."""

    def plan(folder: Path, words: list[str]) -> str:
        monkeypatch.setenv("DSFT_CONFIG_DIR", "")  # --config-dir sets it, and would keep it
        monkeypatch.chdir(folder)
        assert main(["model=tiny", "tracker=[none]", "--json", *words]) == 0
        return capsys.readouterr().out

    return plan


def test_a_users_own_folder_shadows_ours_and_is_named(tmp_path: Path, planned: Planned) -> None:
    option = tmp_path / "mine" / "method" / "lora.yaml"
    option.parent.mkdir(parents=True)
    source = Path(__file__).parents[2] / "conf" / "method" / "lora.yaml"
    option.write_text(source.read_text().replace("rank: 16", "rank: 2"))
    said = planned(tmp_path, ["--config-dir", str(tmp_path / "mine"), "method=lora"])
    assert '"method": "--config-dir"' in said
    ours = planned(tmp_path, ["method=lora"])
    assert '"trainable": 11136' in said
    assert '"trainable": 89088' in ours
    (tmp_path / "mine").rename(tmp_path / "conf")
    assert '"method": "./conf"' in planned(tmp_path, ["method=lora"])


def test_an_installed_package_adds_a_method(tmp_path: Path, planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "theirs"
    (package / "conf" / "method").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "conf" / "__init__.py").write_text("")
    (package / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom dsft.methods.full import Full\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(Full):\n    strength: float\n"
    )
    (package / "conf" / "method" / "mine.yaml").write_text("_target_: theirs.mine.Mine\nlr: 1.0e-3\nstrength: 1.0\n")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dsft.configs]\ntheirs = theirs.conf\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = planned(Path(__file__).parents[2], ["method=mine"])
    assert '"method": "plugin theirs"' in said
