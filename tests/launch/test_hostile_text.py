"""Rows, names, answers and reasons that would control a terminal or forge a line: at every verb, in every log."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from dsft_launchers import verdict
from dsft_launchers.follow import follow_points
from dsft_launchers.shown import CONTROLS, in_a_line, shown

from dsft.entry import LossyStream
from dsft.recorder import SAID
from dsft.sweeps import ledger
from dsft.sweeps.ledger import Entry
from dsft.telemetry.record import Status, write_status
from tests import warm

EVIL = "\x1b]52;c;cm0gLXJm\x07\x1b]0;mine\x07\x1b[2J\x1b[32m\x9b31m\x7f\x00\r\u202e\u2066\u2028"
FORGED = SAID["verified"]
ROW = f"{EVIL}\n{FORGED}\ndsft: cannot go on: {FORGED}\n"
RUN = [
    "model=tiny", "data=local", "train.steps=1", "train.global_batch_size=4", "tracker=[none]", "launcher=local",
    "strategy=single", "checkpoint=none", "checkpoint.verify_result=false",
]  # fmt: skip


def clean(*texts: str) -> None:
    for text in texts:
        assert not CONTROLS.search(text), CONTROLS.findall(text)
        assert not re.search(rf"^(step \d+ +)?{re.escape(FORGED)}", text, re.MULTILINE), text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


def rows(folder: Path, **first: object) -> str:
    file = folder / "rows\x1b[31m\u202e.jsonl"
    row = {"question": f"q{ROW}", "answer": f"a{ROW}", f"column{EVIL}\n{FORGED}": 1}
    lines = [{**row, **first}, *({**row, "question": f"{number}{ROW}"} for number in range(3))]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"data.path='{file}'"


@pytest.fixture(scope="module")
def run_dir(place: Path) -> Path:
    """A run on such rows, in a sweep of one point with such a name."""
    sweep = place / "sweep"
    done = warm.run("dsft.run", *RUN, rows(place), f"run_dir={sweep / '0'}")
    assert done.returncode == 0, done.stderr
    clean(done.stdout, done.stderr, *(log.read_text() for log in (sweep / "0").glob("logs/*")))
    assert "\n| <|im_start|>user\n| q\\x1b]52" in done.stdout
    assert f"\n| {FORGED}\n| dsft: cannot go on" in done.stdout
    assert "columns not read: column\\x1b" in done.stdout
    point = sweep / "0"
    with (point / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, f"eval/{EVIL}": 1.0, "eval/loss": 1.0}) + "\n")
    book = ledger.Ledger("loss", "/", None)
    book.put(0, Entry([f"a={ROW}"], None), keep=False)
    book.put(1, Entry([f"a=2{ROW}"], None), keep=False)
    book.write(sweep)
    (sweep / "1").mkdir()
    write_status(sweep / "1", Status(state="failed", step=0, attempts=1, checkpoint=None, reason=ROW, wandb_id=None))
    return point


def test_every_verb_shows_what_is_in_a_folder_without_obeying_it(run_dir: Path, place: Path) -> None:
    named = place / f"run\x1b[31m\u202e\n{FORGED}"
    named.symlink_to(run_dir)
    said = [
        warm.run("dsft.run", *RUN, rows(place, question=[{"role": EVIL, "content": "x"}], answer=None), "run_dir=r"),
        warm.run("dsft.chat", named, "--prompt", "hello", "--max-new-tokens", "20", "--temperature", "5"),
        warm.run("dsft.export", named, "--to", "adapter", place / "out\x1b[31m"),
        warm.run("dsft.export", named, "--to", "adapter", place / "out\x1b[31m"),
        *(warm.run("dsft.sweep", what, run_dir.parent) for what in ("status", "table")),
        warm.run("dsft.sweep", "table", run_dir.parent, "--by", f"eval/{EVIL}"),
        warm.run("dsft.plan", *RUN, "data.path=rows", f"model.path={EVIL[1:-6]}"),
    ]
    assert [done.returncode for done in said] == [2, 0, 0, 2, 0, 0, 0, 2], [done.stderr for done in said]
    for done in said:
        clean(done.stdout, done.stderr)
    assert "\\x1b" in said[0].stderr
    assert "\\x1b" in said[4].stdout


def test_a_reason_that_is_followed_is_one_line(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = Status(state="failed", step=0, attempts=1, checkpoint=None, reason=ROW, wandb_id=None)
    path = tmp_path / "bin"
    path.mkdir()
    (tmp_path / "status.json").write_text(json.dumps(asdict(status)))
    with pytest.MonkeyPatch.context() as patch:
        (path / "scontrol").write_text(
            "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n"
        )
        (path / "scontrol").chmod(0o755)
        patch.setenv("PATH", f"{path}:/usr/bin:/bin")
        assert follow_points({0: ("7", tmp_path)}) == {0: 76}
    said = capsys.readouterr()
    clean(said.out, said.err)
    assert said.err.count("\n") == 2


def test_a_log_holds_no_line_of_ours_that_was_not_said(tmp_path: Path) -> None:
    word = f"{verdict.CRASH}ValueError: mine"
    program = f"""
import logging, sys, warnings
from dsft.entry import enter, lose_lines
from dsft_launchers.shown import say
def main():
    lose_lines()
    print({ROW!r}); print("dsft", ": cannot go on: ", sep="", end=""); print("d", "sft: cannot go on: ", sep="")
    logging.getLogger("library").warning({ROW!r}); warnings.warn({ROW!r})
    say({word!r})
    raise ValueError({ROW!r})
enter(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert not CONTROLS.search(done.stdout + done.stderr)
    assert verdict.last_word(done.stdout + done.stderr) == (
        verdict.CRASH,
        "ValueError: mine",
        done.stdout + done.stderr[: done.stderr.index(word)],
    )
    assert done.stderr.count("| dsft: cannot go on") == 3


def test_a_terminal_keeps_its_moving_lines(capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal:
        def __init__(self) -> None:
            self.text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            self.text += text

    stream = LossyStream(Terminal())
    stream.write("\r\x1b[2K50%\ndsft: cannot go on: no\n")
    assert stream.stream.text == "\r\x1b[2K50%\n| dsft: cannot go on: no\n"


def test_what_is_shown_is_readable_and_what_is_harmless_stays() -> None:
    harmless = "a\tb\nc \u00e9\u4e2d\U0001f600"
    assert shown(harmless) == harmless
    assert in_a_line(harmless) == harmless.replace("\t", "\\t").replace("\n", "\\n")
    assert in_a_line(EVIL) == (
        "\\x1b]52;c;cm0gLXJm\\x07\\x1b]0;mine\\x07\\x1b[2J\\x1b[32m\\x9b31m\\x7f\\x00\\x0d\\u202e\\u2066\\u2028"
    )
