"""Plans and scripts of runs that will be on other machines; and a batch size that does not follow their number."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.family_models import make
from dsft import folder, plan, run, stage
from dsft.compose import compose, dump_yaml
from dsft.sweeps import points

FAR = ("method=qlora", "launcher.nodes=4", "launcher.devices=8")
DRY = "launcher.dry_run=true"
GIB = 2**30


pytestmark = pytest.mark.usefixtures("typed_alone")


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert plan.main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(("words", "number"), [([], 16), (["launcher.devices=16"], 16), ([*FAR], 32)])
def test_each_data_rank_gets_an_example_where_nobody_chose(words: list[str], number: int) -> None:
    composed = compose(words, planning=True)
    assert composed.run.train.global_batch_size == composed.resolved["train"]["global_batch_size"] == number
    why = "one example for each of 32 data ranks" if number == 32 else "for up to 16 data ranks"
    assert f"train.global_batch_size=auto: {number}, {why}" in composed.repairs
    chosen = compose([*words, "train.global_batch_size=40"], planning=True)
    assert chosen.run.train.global_batch_size == 40
    assert not any(line.startswith("train.global_batch_size") for line in chosen.repairs)


def test_a_run_keeps_the_number_of_its_first_start() -> None:
    first = compose([*FAR, "run_dir=first"], planning=True)
    Path("first").mkdir()
    Path("first/config.yaml").write_text(dump_yaml(folder.stored(first.resolved)))
    again = compose(["method=qlora", "launcher.devices=2", "run_dir=first"])
    assert "train.global_batch_size=auto: 32, which first was made with" in again.repairs
    folder.check(Path("first"), again.resolved)
    anew = compose(["method=qlora", "launcher.devices=2", "run_dir=first", "resume.anew=true"])
    assert anew.run.train.global_batch_size == 16
    typed = compose(["method=qlora", "launcher.devices=2", "run_dir=first", "train.global_batch_size=16"])
    with pytest.raises(ValueError, match=r"train.global_batch_size was 32, is 16"):
        folder.check(Path("first"), typed.resolved)
    with pytest.raises(ValueError, match=r"at least the number of data ranks, 64, got 32"):
        compose(["method=qlora", "launcher.nodes=8", "launcher.devices=8", "run_dir=first"], planning=True)
    Path("first/config.yaml").write_text("train: [")  # preflight refuses it, with the way out
    assert compose(["run_dir=first"]).run.train.global_batch_size == 16


def test_a_run_from_before_experts_were_packed_leaves_them_unpacked() -> None:
    words = ["method=qlora", "launcher=local", "run_dir=first", "train.global_batch_size=16"]
    first = folder.stored(compose(words).resolved)
    Path("first").mkdir()
    old = {key: value for key, value in first["quantization"].items() if key not in ("experts", "unpack_mib")}
    Path("first/config.yaml").write_text(dump_yaml({**first, "quantization": old}))
    again = compose(words)
    assert again.run.quantization.experts is False
    assert "quantization.experts=false, which first was made with" in again.repairs
    folder.check(Path("first"), again.resolved)
    Path("first/config.yaml").write_text(dump_yaml(folder.stored(again.resolved)))  # as the start does that goes on
    folder.check(Path("first"), compose(words).resolved)
    assert compose([*words, "resume.anew=true"]).run.quantization.experts is True
    with pytest.raises(ValueError, match=r"quantization.experts was False, is True"):
        folder.check(Path("first"), compose([*words, "quantization.experts=true"]).resolved)
    Path("first/config.yaml").write_text(dump_yaml(first))
    folder.check(Path("first"), compose([*words, "quantization.unpack_mib=1"]).resolved)
    with pytest.raises(ValueError, match=r"quantization.unpack_mib=1 is of packed experts, and quantization.experts"):
        compose([*words, "quantization.experts=false", "quantization.unpack_mib=1"])


@pytest.mark.parametrize("word", ["quantization.unpack_mib=4", "quantization.experts=true"])
def test_what_only_experts_take_is_refused_where_there_are_none(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["model=tiny", "method=qlora", word]) == 2
    assert f"{word} is of fused experts, and this model has none" in capsys.readouterr().err
    assert plan.main(["model=tiny_moe", "method=qlora", word]) == 0


def test_what_is_elsewhere_is_not_held_against_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([*FAR], ["launcher.devices=8"], ["launcher=slurm"], ["launcher=slurm", "launcher.nodes=2"]):
        found = as_json(capsys, "model=tiny", *words)
        assert found["memory"]["available"] is None, words
        assert any("--gpu" in note for note in found["notes"])
    assert " of " not in plan.as_text(found).split("memory ")[1].split(":")[0]
    one, two = (as_json(capsys, "model=tiny", "launcher=local", f"launcher.devices={n}") for n in (1, 2))
    assert two["memory"]["available"] == one["memory"]["available"] // 2
    assert one["notes"] == two["notes"] == []


def test_a_plan_for_gpus_says_what_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["model=llama8b", "method=lora", "launcher=slurm", "launcher.devices=8", "--gpu=14.5"]
    found = as_json(capsys, *words)
    assert found["memory"]["available"] == found["gpu_bytes"] == 14.5 * GIB
    assert any("bf16, as nodes with 8 GPUs compute" in line for line in found["repaired"])
    totals = found["total_by_gradient_checkpointing"]
    assert totals["none"] == found["memory"]["total"] > totals["selective"] > totals["full"]
    assert found["memory"]["slack"] == 0  # a CPU's heap has it, a GPU's allocator has not
    assert totals["none"] > 14.5 * GIB > totals["full"]
    assert any(note.startswith("a GPU of 14.5 GiB will not do") for note in found["notes"])
    lines = {line.split()[0].split("=")[1]: line for line in plan.as_text(found).splitlines() if "  train.gr" in line}
    assert lines["none"].endswith("GiB  does not fit")
    assert lines["full"].endswith("GiB  fits")
    make("dbrx", tmp_path / "dbrx")  # whose experts depend on data
    capsys.readouterr()  # of DeepSpeed, which is imported at a first save
    choice = ["model=custom", f"model.path={tmp_path / 'dbrx'}", "method.rank=4", "train.precision=fp32"]
    unknown = plan.as_text(as_json(capsys, *choice, "--gpu", "80"))
    assert "unknown whether it fits" in unknown


@pytest.mark.parametrize(
    ("words", "line"),
    [
        *((["--gpu", bad], f"--gpu must be the GiB of one GPU, a number above 0, got {bad};")
          for bad in ("0", "-1", "nan", "inf", "big")),
        (["--gpu"], "a number above 0, got none"),
        (["--gpu=8", "--gpu", "9"], "a number above 0, got two"),
        (["-m", "method.rank=4,8"], "dsft.plan plans one run and takes no -m; see python -m dsft.plan --help"),
        (["--config-dir", ".", "--cfg", "job"], "takes no --cfg"),
        (["--gpus=8"], "--gpus=8 is not an option"),
        (["launcher=local", "launcher.nodes=2"], "launcher.nodes must be 1"),
        (["launcher=local", "launcher.devices=1000"], "launcher.devices must be at most"),
    ],
)  # fmt: skip
def test_a_plan_that_is_asked_for_wrongly_is_refused(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert line in err


def test_the_verbs_help_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, options in ((plan, ("--gpu", "--json", "--config-dir")), (stage, ("--config-dir",))):
        assert verb.main(["method=none_such", "--help"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: python -m {verb.__name__} [KEY=VALUE ...]")
        assert all(f"{word} " in shown for word in (*options, "exit codes:"))


def test_a_job_without_slurm_is_refused_and_its_script_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    job = [*FAR, "model=llama70b", "data=local", "data.path=none.jsonl", "run_dir=run"]
    for words in (job, [*job, "launcher=slurm"]):
        assert run.main(words) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "on any machine python -m dsft.plan shows the plan, and launcher.dry_run=true prints" in err
    assert run.main([*job, DRY]) == 0
    out, err = capsys.readouterr()
    assert {"#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=8"} <= set(out.splitlines())
    assert err == (
        "dsft: not checked, as it is not on this machine: the data, the model's weights and tokenizer and the cluster "
        "(the script asks for no GPUs)\n"
    )
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["method.target_modules=none_such"], "none_such"),
        (["data.path=rows.jsonl"], "rows.jsonl"),
        (["data.path=rows.jsonl", "model=custom", "model.path=some/model"], "rows.jsonl"),
        (["run_dir=rows.jsonl"], "run_dir must be a folder"),
    ],
)
def test_what_is_here_is_checked_before_a_script_is_printed(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_text('{"quite": "other"}\n')
    assert run.main(["model=tiny", "data.path=none.jsonl", "data=local", "run_dir=run", DRY, *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert line in err


def test_a_sweeps_scripts_need_no_more_than_a_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=custom", "model.path=some/model", "launcher=slurm", DRY]
    checked = points.check(tmp_path, {0: [*words, "method.rank=4"], 1: [*words, "method.rank=8"], 2: ["method=x"]})
    assert (set(checked.ready), set(checked.refused)) == ({0, 1}, {2})
    assert capsys.readouterr().err.count("not checked") == 1
