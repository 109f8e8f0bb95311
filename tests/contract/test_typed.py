"""Words as users of other tools and of shells type them: each mistake is answered by its key, with what is meant."""

import os
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from dsft import __version__
from dsft.compose import compose
from dsft.flags import hydra_flags
from dsft.run import main
from dsft.synonyms import KEYS, OPTIONS, SENTENCES
from dsft.wording import OWN_CONF, own_keys

LOCAL = ("data=local", "data.path=rows.jsonl")
BY_ITSELF = "; a run resumes by itself: the same run_dir, the same command"
DRY = ("launcher=slurm", "launcher.dry_run=true")


def said(*words: str) -> str:
    """The one line that refuses these words."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is what is tested
        compose(words)
    line = str(caught.value)
    assert "\n" not in line
    assert "hydra.cc" not in line
    return line


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("resume=true", f"resume must be keys, got true{BY_ITSELF}"),
        ("resume=auto", f"resume must be keys, got auto{BY_ITSELF}"),
        ("checkpoint=5", "checkpoint must be an option, got 5; set a key: checkpoint.every=STEPS"),
        ("train=10", "train must be an option, got 10; set a key: train.steps=N"),
        ("launcher=4", "launcher must be an option, got 4; set a key: launcher.devices=N"),
        ("optim=1e-4", "optim must be an option, got 0.0001; set a key: optim.lr=RATE"),
        ("optim=adamw", "optim=adamw does not exist; did you mean optim.name=adamw?"),
        ("tracker=false", "tracker must be an option, got false; take tracker=none"),
        ("method=null", "method must be an option, got null; take one of its options: method=NAME"),
        ("data=chats.jsonl", "data=chats.jsonl is no option; for a file: data=local data.path=chats.jsonl"),
        ("~tracker", "~tracker must name a key, got what is none; a group is set to another option: tracker=OPTION"),
        ("=3", "a key must stand before =, got =3"),
        ("run_dir=", "run_dir must name a folder, got none"),
        ('run_dir="  "', "run_dir must name a folder, got none"),
        ("run_dir=s3://a/b", "run_dir must be a folder of a file system, got s3://a/b; "),
        (
            "method=[lora,qlora]",
            "method must be one option, got [lora,qlora]; to run one after another: -m method=lora,qlora",
        ),
        (
            "data={path: a b}",
            "data must be one option, got {path: a b}; set keys one by one: data=local 'data.path=\"a b\"'",
        ),
        ("train={steps: 2}", "train must be one option, got {steps: 2}; set keys one by one: train.steps=2"),
        ("++tracker.wandb.project=x", "tracker.wandb.project is not a key without tracker=wandb; add that"),
        ("+tracker.foo=1", "tracker.foo is not a key; there are: auto, none, tensorboard, wandb"),
    ],
)
def test_a_value_in_the_place_of_an_option_is_answered_with_what_is_meant(word: str, line: str) -> None:
    assert said(word).startswith(line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["steps=10"], "steps is not a key; did you mean train.steps?"),
        (["stps=10"], "stps is not a key; did you mean train.steps?"),
        (["train.lr=1e-4"], "train.lr is not a key; did you mean optim.lr?"),
        (["method.r=8"], "method.r is not a key; did you mean method.rank?"),
        (["data.train_split=0.9"], "data.train_split is not a key; set data.eval_fraction"),
        (["data.path=x"], "data.path is not a key of the chosen data: it needs data=hf or local; add one of them"),
        (["tracker.wandb.mode=offline"], "tracker.wandb.mode is not a key without tracker=wandb; add that"),
        (["tracker=wandb", "tracker.wandb.mod=online"], "did you mean tracker.wandb.mode?"),
        (["launcher=local", "launcher.time=3"], "is not a key of the chosen launcher: it needs launcher=slurm"),
        (["method=prefix", "method.rank=4"], "it needs method=adalora or dora or lora"),
        (["experiment=demo", "method=peft"], "experiment=demo sets it, leave that out"),
        (["model.name=x"], "model.name is not a key; there are: config,"),
        (["method=sft"], "method=sft does not exist; it is the objective, which is objective=sft as it is"),
        (["quantization=int4"], "quantization=int4 does not exist; did you mean nf4?"),
        (["method=lora+"], "did you mean lora_plus?"),
        (["strategy=deepspeed_zero3"], "did you mean zero3?"),
        (["method=LoRA"], "method=LoRA does not exist; did you mean lora?"),
        (["strategy=FSDP"], "did you mean fsdp?"),
        (["experiment=nope"], "there are: demo, none; one of your own is conf/experiment/NAME.yaml"),
        (["optim.lr==1e-4"], "must have one = before its value, got optim.lr==1e-4; type optim.lr=1e-4"),
        (["data=train set.jsonl"], "for a file: data=local 'data.path=\"train set.jsonl\"', for a hub id"),
        (["save_strategy=steps"], "did you mean checkpoint.every?"),
        (["method.use_dora=true"], "method.use_dora is not a key; take method=dora"),
        (["tracker=[wandb,none]"], "tracker must be none or others, got [wandb,none]; leave none out"),
        (["tracker=[wandb,wandb]"], "tracker must name each once, got [wandb,wandb]; leave one out"),
        (["optim.name=adam"], "got 'adam'; did you mean adamw?"),
        (["optim.schedule=cos"], "got 'cos'; did you mean cosine?"),
        (["train.steps=1e3"], "train.steps must be an integer, got 1000.0; type 1000"),
        (["launcher.devices=two"], "launcher.devices must be an integer or 'auto', got 'two'"),
        ([*DRY, "launcher.time=4h"], "launcher.time must be SLURM's: a time limit reads like 90, 1:30:00"),
    ],
)
def test_a_key_of_another_place_or_tool_is_answered_with_ours(words: list[str], line: str) -> None:
    assert line in said(*words)


@pytest.mark.parametrize("name", [*KEYS, *SENTENCES])
def test_what_other_tools_call_a_key_is_answered_with_a_key_that_is_there(name: str) -> None:
    keys = {
        f"{group.name}.{key}" for group in OWN_CONF.iterdir() if group.is_dir()
        for tree in own_keys(group.name).values() for key in tree
    }  # fmt: skip
    assert name not in SENTENCES or name not in KEYS
    if name in KEYS:
        assert KEYS[name] in keys | {"run_dir"}
    else:
        named = [word.partition("=")[0].strip(",;") for word in SENTENCES[name].split() if "." in word[:-1]]
        assert all(word in keys | {"resume.anew", "tracker.wandb.project"} for word in named if word[0].islower())


@pytest.mark.parametrize("value", ["my chats=1.jsonl", "a[1].jsonl", "a#b", "~/x", "a=b", "You're", '"a b', "${USER"])
@pytest.mark.parametrize("key", ["data.path", "run_dir"])
def test_a_value_that_needs_quotes_of_its_own_is_answered_with_them(key: str, value: str) -> None:
    line = said(*(LOCAL[:1] if key == "data.path" else ()), f"{key}={value}")
    assert line.startswith(f"{key} must have quotes of its own around such a value, inside the shell's, got {value}; ")
    typed = shell(line.rpartition("; type ")[2])
    read = OverridesParser.create().parse_override(typed)
    assert (read.key_or_group, str(read.value()).replace("\\$", "$")) == (key, os.path.expanduser(value.strip('"')))


@pytest.mark.parametrize("items", [["source ~/.bashrc"], ["module load cuda/12.8", "export X=1"]])
def test_the_texts_of_a_list_get_quotes_each(items: list[str]) -> None:
    line = said(*DRY, f"launcher.setup=[{','.join(items)}]")
    assert compose([*DRY, shell(line.rpartition("; type ")[2])]).run.launcher.setup == items


def test_a_home_directory_is_meant_where_a_path_is() -> None:
    home = os.path.expanduser("~")
    run = compose(['run_dir="~/xx"', "data=local", "data.path='~/a b'", 'data.eval_path="~/e"']).run
    assert (run.run_dir, run.data.path, run.data.eval_path) == (f"{home}/xx", f"{home}/a b", f"{home}/e")
    assert compose(["model=custom", 'model.path="~/m"']).run.model.path == f"{home}/m"


def shell(text: str) -> str:
    """The one word that a shell hands on."""
    (word,) = shlex.split(text)
    return word


def test_the_quotes_of_a_groups_path_stand_around_the_key_that_is_meant() -> None:
    assert said("model=/x=y").endswith("type model=custom 'model.path=\"/x=y\"'")
    assert said("data=x=y.jsonl").endswith("type data=local 'data.path=\"x=y.jsonl\"'")
    assert "or a text in quotes of its own: 'data.path=\"...\"'" in said(*LOCAL[:1], "data.path=a,b")


@pytest.mark.parametrize("value", ["${USER}", "${oc.env:DSFT_NO_SUCH}", "${foo:x}"])
def test_an_interpolation_that_leads_nowhere_is_answered_by_its_key(value: str) -> None:
    assert said(*LOCAL[:1], f"data.path={value}").startswith("data.path must hold no ${...} but keys of the conf")
    assert compose([*LOCAL[:1], f"data.path=\\{value}"]).run.data.path == value


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["launcher.partition=gpu"], "launcher.partition=gpu is asked of SLURM, and this run is no SLURM job (local)"),
        (["+launcher.extra.nice=1"], "launcher.extra.nice=1 is asked of SLURM"),
        (["train.early_stop_patience=4"], "train.early_stop_metric, which is null; set that, or leave it out"),
        (["train.max_nonfinite=4"], "train.on_nonfinite=skip drops, and it is stop"),
        (["optim.decay_steps=4"], "optim.schedule=wsd, and it is linear"),
        (["optim.schedule=constant", "optim.min_lr_ratio=0.1"], "optim.schedule is constant"),
        (["optim.name=sgd", "optim.betas=[0.9,0.99]"], "belongs to AdamW, and optim.name is sgd"),
        (["optim.name=adafactor", "optim.eps=1e-6"], "belongs to AdamW, and optim.name is adafactor"),
        (["checkpoint=none", "checkpoint.keep=3"], "checkpoint.every=0 saves none"),
    ],
)
def test_a_setting_without_effect_is_refused_where_it_is_typed(words: list[str], line: str) -> None:
    assert line in said(*words)


@pytest.mark.parametrize(
    "words",
    [
        [*DRY, "launcher.partition=gpu"],
        ["launcher.partition=null", "launcher.wait=false"],
        ["train.on_nonfinite=skip", "train.max_nonfinite=4"],
        ["optim.schedule=wsd", "optim.decay_steps=4"],
        ["checkpoint=none", "checkpoint.background=false"],
    ],
)
def test_a_setting_with_effect_or_that_asks_for_nothing_is_taken(words: list[str]) -> None:
    assert compose(words).overrides == tuple(words)


@pytest.mark.parametrize("flag", ["--resolve", "--experimental-rerun=x", "--package=train"])
def test_a_flag_without_effect_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=r"belong to --cfg|must be left out"):
        hydra_flags([flag, "train.steps=2"])
    assert hydra_flags(["--cfg", "job", "--resolve", "train.steps=2"])[1] == ["train.steps=2"]


@pytest.mark.parametrize("flag", ["--config-name=mine", "--config-path=/mine"])
def test_another_primary_configuration_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=r"must be left out, got /?mine; put your settings into conf/experiment/NAME"):
        hydra_flags([flag, "train.steps=2"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--config", "my.yaml"],
            "--config must be left out, got my.yaml; options are KEY=VALUE; a YAML of your own is",
        ),
        (["-c", "my.yaml"], "chosen by experiment=NAME"),
        (["--config-dir"], "--config-dir must have a value, got none"),
        (["--cfg"], "--cfg must have a value, got none"),
        (["--cfg", "foo"], "--cfg must be one of 'job', 'hydra', 'all', got 'foo'"),
        (["--info", "foo"], "--info must be one of 'all'"),
        (["--multirun=true"], "--multirun must be without a value, got 'true'"),
    ],
)
def test_a_flag_that_cannot_be_read_is_one_line(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert line in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_what_only_a_sweep_takes_is_refused_of_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launcher=local", "launcher.max_parallel=2"]) == 2
    assert "launcher.max_parallel=2 is of the points of a sweep, and this is one run" in capsys.readouterr().err


@pytest.mark.parametrize("typed", OPTIONS)
def test_what_others_call_an_option_is_answered_with_one_that_is_there(typed: str) -> None:
    group = typed.partition("=")[0]
    there = own_keys(group)
    assert typed.partition("=")[2] not in there
    assert set(OPTIONS[typed].strip("?").replace(",", "").replace(f"{group}=", "").split()) & set(there)


def test_the_version_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dsft {__version__}\n"


@pytest.mark.usefixtures("typed_alone")
def test_a_sweep_is_refused_a_folder_as_a_run_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "method.rank=4,8", "run_dir="]) == 2
    assert (
        capsys.readouterr().err
        == "dsft: run_dir must name a folder, got none; leave it out for a new one below runs/\n"
    )
    assert not os.listdir()


@pytest.mark.usefixtures("typed_alone")
def test_what_an_experiment_asks_of_slurm_is_named_by_it() -> None:
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/mine.yaml").write_text("# @package _global_\nlauncher:\n  partition: gpu\n")
    line = said("experiment=mine", "launcher=local")
    assert line.startswith("launcher.partition is not a key of launcher; ")
    assert line.endswith("experiment=mine sets it, leave that out")
    assert compose(["experiment=mine", *DRY]).run.launcher.partition == "gpu"


def test_a_batch_that_a_folder_was_made_with_is_named_where_it_is_too_small(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {global_batch_size: 1}\n")
    line = said("launcher=local", "launcher.devices=2", f"run_dir={tmp_path}")
    assert f"2, got 1, which {tmp_path} was made with; lower launcher.devices, or add" in line
    assert "'resume.allow=[train.global_batch_size]' train.global_batch_size=2" in line
