"""dsft chat through its real command line: on what real runs have left."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.launch.processes import dsft

SMALL = [
    "model=tiny", "data=reasoning_gym", "data.size=64", "data.eval_size=0", "train.steps=3", "train.precision=bf16",
    "train.global_batch_size=4", "tracker=[none]", "launcher=local", "checkpoint=none", "optim.lr=1e-2",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    made = {"qlora": [], "houlsby": [], "freeze": []}
    for method in made:
        done = dsft(*SMALL, f"method={method}", f"run_dir={root / method}")
        assert done.returncode == 0, done.stderr
    return {method: root / method for method in made}


def _chat(*words: str | Path, typed: str = "") -> "subprocess.CompletedProcess[str]":
    return warm.run("dsft.chat", *words, "--max-new-tokens", "6", typed=typed)


def test_one_prompt_is_answered_by_the_base_and_by_each_run_under_its_name(runs: dict[str, Path]) -> None:
    done = _chat(runs["houlsby"], runs["freeze"] / "adapter", "--prompt", "What is 2 + 2?")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [line for line in done.stdout.splitlines() if line.endswith(":")][:3] == ["base:", "houlsby:", "freeze:"]
    again = _chat(runs["houlsby"], runs["freeze"], "--prompt", "What is 2 + 2?")
    assert again.stdout == done.stdout, "greedy by default"


def test_a_packed_base_and_a_plain_one_have_a_base_each(runs: dict[str, Path]) -> None:
    done = _chat(runs["qlora"], runs["houlsby"], "--prompt", "hello", "--temperature", "0.5")
    assert done.returncode == 0, done.stderr
    names = [line for line in done.stdout.splitlines() if line.endswith(":")]
    assert {"base of qlora:", "qlora:", "base of houlsby:", "houlsby:"} <= set(names)


def test_commands_say_who_answers_and_forget(runs: dict[str, Path]) -> None:
    typed = "/list\n/use houlsby\nhello\nhello\n/list\n/reset\nhello\n/use nobody\n/frobnicate\n\n/quit\nnever read\n"
    done = _chat(runs["houlsby"], typed=typed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("* base\n* houlsby\nhoulsby:\n")
    assert done.stdout.count("houlsby:\n") == 3
    assert "base:" not in done.stdout
    assert "  base\n* houlsby\n" in done.stdout
    answers = [part.partition("  base\n")[0].strip() for part in done.stdout.split("houlsby:\n")[1:]]
    assert answers[2] == answers[0], "after /reset the conversation begins anew"
    assert done.stderr.splitlines() == [
        "dsft: /use nobody: nobody is called so; there are: all, base, houlsby",
        "dsft: /frobnicate is no command; there are: /list  /use NAME|all|base  /reset  /quit",
    ]


def _damaged(folder: Path) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{")
    (folder / "config.yaml").write_text("run_dir: x\n")
    return folder


def _unfinished(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run_dir: x\n")
    (folder / "status.json").write_text('{"state": "stopped", "step": 1}')
    return folder


def _of_another_base(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/another/base"}')
    return folder


def _cut_short(folder: Path) -> Path:
    shutil.copytree(folder.parent / "whole", folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    return folder


def _file(path: Path) -> Path:
    path.touch()
    return path


def test_what_is_no_text_is_refused_and_the_next_line_answered(runs: dict[str, Path]) -> None:
    for encoding in ("utf-8", "utf-8:surrogateescape"):
        done = subprocess.run(
            [sys.executable, "-m", "dsft.chat", runs["houlsby"], "--max-new-tokens", "2"],
            input=b"\xff\xfe\nhello\n/quit\n", capture_output=True, check=False,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(b"\n") == 1
        assert done.stderr.startswith(b"dsft: a line must be text in UTF-8, got '\\udcff\\udcfe'; ")
        assert done.stdout.startswith(b"base:\n")


def test_who_hears_no_more_ends_it_without_a_word(runs: dict[str, Path]) -> None:
    for words, typed in ((("--prompt", "hi"), b""), ((), b"hi\nhi\n")):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "dsft.chat", runs["houlsby"], "--max-new-tokens", "2", *words],
            input=typed, stdout=writer, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
        os.close(writer)
        assert done.returncode == 128 + signal.SIGPIPE
        assert done.stderr == b""


def test_a_prompt_beyond_the_models_reach_is_refused_before_anyone_answers(runs: dict[str, Path]) -> None:
    done = _chat(runs["houlsby"], "--prompt", "What is 2 + 2? " * 2000)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "dsft: the conversation with base must have 1 to " in done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "the following arguments are required: runs; usage: dsft chat RUN"),
        (["/no/such/run"], "RUN must be a run's folder, got /no/such/run, which does not exist"),
        ([Path.cwd()], "without config.yaml, adapter_config.json or dsft_adapter.json; give the run_dir of a run"),
        ([_unfinished], "has none; finish it: python -m dsft.run ... run_dir="),
        ([_damaged], "missing or damaged; restore it"),
        ([_file], "bad, which is a file; give the run_dir of a run"),
        ([_cut_short], "adapter_model.safetensors damaged (Error while deserializing header: "),
        (["houlsby", _of_another_base], "RUN must be of the base of houlsby, "),
        ([_of_another_base], "model.path must be a model folder or a hub id, got /another/base, which does not exist"),
        (["houlsby", "houlsby"], "RUN must be given once"),
        (["houlsby", "--temperature=-1"], "--temperature must be 0 or more, got -1.0"),
        (["houlsby", "--max-new-tokens=0"], "--max-new-tokens must be 1 or more, got 0"),
        (["houlsby", "--prompt="], "--prompt must hold some text"),
        (["houlsby", "--prompt=\udcff"], "--prompt must be text in UTF-8, got '\\udcff'"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_bad_input_is_one_line(runs: dict[str, Path], tmp_path: Path, words: list[object], line: str) -> None:
    shutil.copytree(runs["houlsby"] / "adapter", tmp_path / "whole")
    given = [word(tmp_path / "bad") if callable(word) else runs.get(str(word), word) for word in words]
    done = warm.run("dsft.chat", *map(str, given))
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
