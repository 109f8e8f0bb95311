"""How a process of ours begins and ends where its streams are closed, or nobody reads them any more."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dsft import __version__, verify
from dsft.__main__ import hand_over

SPEAKS = """
import subprocess, sys
from pathlib import Path

from dsft.entry import enter, lose_lines

def main():
    if "lossy" in sys.argv:
        lose_lines()
    with open(sys.argv[1], "w") as file:
        print("out", flush=True)
        print("err", file=sys.stderr, flush=True)
        subprocess.run(["sh", "-c", "echo child; echo child >&2"], check=True)
        file.write(f"{sys.stdin.read()!r} {file.fileno() > 2}")
    return 7

enter(main)
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_closed_stream_is_the_null_device_and_no_file_takes_its_number(closed: str, tmp_path: Path) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", SPEAKS, str(tmp_path / "file")]
    done = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert (tmp_path / "file").read_text() == "'' True"
    assert done.stdout == ("" if closed.startswith(">&-") else "out\nchild\n")
    assert done.stderr == ("" if "2>&-" in closed else "err\nchild\n")


@pytest.mark.parametrize(("words", "code", "ran"), [([], 128 + signal.SIGPIPE, False), (["lossy"], 7, True)])
def test_where_nobody_reads_it_ends_quietly_or_goes_on_once_it_works(
    words: list[str], code: int, ran: bool, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", SPEAKS.replace("echo child; ", ""), str(tmp_path / "file"), *words]
    done = subprocess.run(command, input=b"", stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode == code, done.stderr
    assert done.stderr == (b"err\nchild\n" if ran else b"")
    assert (tmp_path / "file").read_text() == ("'' True" if ran else "")


def test_an_output_without_space_is_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", SPEAKS, str(tmp_path / "file")]
        done = subprocess.run(command, input=b"", stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"dsft: the output must go where it can be written, got: No space left on device" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        (["--help"], 0, "usage: dsft VERB", ""),
        (["--version"], 0, f"dsft {__version__}", ""),
        ([], 2, "", "usage: dsft VERB"),
        (["trian"], 2, "", "usage: dsft VERB"),
        (["stage", "--help"], 0, "usage: python -m dsft.stage", ""),
    ],
)
def test_help_and_version_are_answers_and_no_verb_is_a_mistake(
    words: list[str], code: int, out: str, err: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dsft", *words])
    assert hand_over() == code
    said = capsys.readouterr()
    assert said.out.startswith(out)
    assert said.err.startswith(err)
    assert bool(said.out) is (code == 0)


def test_verify_answers_who_asks_what_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dsft.verify", "--help"])
    assert verify.main() == 0
    assert capsys.readouterr().out.startswith("python -m dsft.verify RUN RESULT")


WAITS = """
import atexit, sys, time, types
from dsft.entry import enter

sys.modules["torch.cuda"] = types.SimpleNamespace(is_initialized=lambda: "cuda" in sys.argv)
atexit.register(print, "the interpreter ended", flush=True)

def main():
    if "raises" in sys.argv:
        raise KeyError("of a bug")
    return 76

enter(main)
"""


@pytest.mark.parametrize(
    ("words", "code", "ends"),
    [(["cuda"], 76, False), (["cuda", "raises"], 76, False), ([], 76, True), (["raises"], 1, True)],
)
def test_a_process_with_a_gpu_keeps_its_code_and_waits_for_no_kernel(words: list[str], code: int, ends: bool) -> None:
    done = subprocess.run([sys.executable, "-c", WAITS, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, "the interpreter ended" in done.stdout) == (code, ends), done.stderr
    assert ("KeyError: 'of a bug'" in done.stderr) == ("raises" in words)
