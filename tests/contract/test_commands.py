"""Every command of the pages works as it stands there: run where it is cheap, else composed, planned or dry-run."""

import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from dsft import plan, run
from dsft.__main__ import VERBS, hand_over

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

COMMAND = re.compile(r"(?:^|[ /])(python -m \S.*|make \S.*|dsft \S.*)", re.M)
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)

WORDS = {
    "[overrides]": "model=tiny", "...": "model=tiny", "[--json]": "--json", "[--gpu N]": "--gpu 80",
    "[RUN2 ...]": "RUN2",
    "[--by eval/loss] [--csv FILE]": "--by eval/loss --csv FILE", "adapter|merged": "merged",
    "your_folder": str(ROOT / "tests/plugin/dsft_loudness/conf"), "<name>": "loudness",
}  # fmt: skip
"""What stands for something of the reader's -> an example of it. RUN, SWEEP and OUT stay: they are refused by name."""

DRY = "launcher.dry_run=true"

ABSENT = {"export": "RUN must be a run folder", "chat": "RUN must be", "sweep": "SWEEP must be the run_dir"}
"""Verbs that want a run or a sweep -> how they refuse one that is not there, which is after their words are read."""


def commands(text: str) -> Iterator[str]:
    """The commands in a page's code, each on one line, without what explains it."""
    fenced = [line for block in FENCE.findall(text) for line in block.splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    verb = ""
    for code in [*fenced, *spans]:
        found = COMMAND.search(code.replace("`", ""))
        if found and (code in fenced or found.start() == 0 or "python" in found[1]):
            command = re.split(r" {2,}|\s+#", found[1])[0].strip()
            verb = " ".join(command.split()[:3])
            yield from _each(command)
        elif code in spans and code.startswith("... "):
            yield from _each(code.replace("...", verb))


def _each(command: str) -> Iterator[str]:
    """One command for each verb of several that are written as one word."""
    several = re.search(r"(?<=dsft\.sweep )\S+\|\S+", command)
    for verb in several[0].split("|") if several else [""]:
        yield command.replace(several[0], verb) if several else command


ALL = sorted({(page.name, command) for page in PAGES for command in commands(page.read_text())})


@pytest.fixture(autouse=True)
def with_a_method_of_another_folder(typed_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests/plugin"))


def in_words(command: str) -> tuple[str, list[str]]:
    """The module or tool of a command, and its words."""
    for written, meant in WORDS.items():
        command = re.sub(rf"(?<!\S){re.escape(written)}(?!\S)|(?<==){re.escape(written)}", meant, command)
    tool, *words = shlex.split(command.removeprefix("python -m "))
    return tool, words


@cache
def planned(*words: str) -> None:
    assert plan.main(list(words)) == 0


def do_run(words: list[str]) -> None:
    """Plan it, of a sweep the first point; print the script of a job, which makes the plan too."""
    if "--cfg" in words:
        assert run.main(words) == 0
        return
    if "-m" in words:
        words = [word for word in words if word != "-m" and not word.startswith("launcher.max_parallel=")]
        words = [word.split(",")[0] if "[" not in word else word for word in words]
    if any(word.startswith(("launcher.nodes=", "launcher=slurm")) for word in words):
        assert run.main([*words, *([] if DRY in words else [DRY])]) == 0
    else:
        planned(*words)


def do_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert [word for word in words if "=" not in word and word not in targets] == []


def do_console(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["dsft", *words])
        assert words[0] in VERBS or hand_over() == 0


DONE: dict[str, Callable[[list[str]], None]] = {
    "dsft.run": do_run,
    "dsft.plan": lambda words: planned(*words),
    "dsft.stage": lambda words: planned(*words),  # it would fetch the model: tests/launch/test_stage.py does
    "benchmarks.gpu": lambda words: gpu.arguments(words),  # without a GPU: tests/launch/test_gpu_rehearsal.py
    "make": do_make,  # what they start takes minutes
    "dsft": do_console,
}
NEEDS_MORE = {
    "dsft_launchers.supervise": "a SLURM job: tests/slurm",
    "benchmarks.slurm_faults": "a cluster: it is its own test",
    "benchmarks.gpu.methods": "a minute: what it writes is read by its check",
    "pytest": "this",
}
"""Modules that are only looked for -> what running them needs."""


@pytest.mark.parametrize(("page", "command"), ALL)
def test_a_command_of_the_pages_works(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    tool, words = in_words(command)
    verb = tool.removeprefix("dsft.")
    if tool in NEEDS_MORE:
        assert find_spec(tool) is not None
    elif verb in ABSENT and words:
        assert import_module(tool).main(words) == 2
        assert capsys.readouterr().err.startswith(f"dsft: {ABSENT[verb]}")
    elif verb in ABSENT:
        assert find_spec(tool) is not None  # it is named, with nothing behind it
    else:
        assert tool in DONE, f"{page}: nobody says how {tool} is tested: add it to DONE or NEEDS_MORE"
        DONE[tool](words)


def test_commands_are_found_in_blocks_and_in_sentences() -> None:
    page = (
        "Type `python -m dsft.run a=b`, or `srun python -m dsft.stage\nc=d`; `make sense`; make no mistake.\n"
        "```\npython -m dsft.plan e=f      # why\nX=1 python -m dsft.sweep status|table SWEEP   both\n```\n"
    )
    assert list(commands(page)) == [
        "python -m dsft.plan e=f", "python -m dsft.sweep status SWEEP", "python -m dsft.sweep table SWEEP",
        "python -m dsft.run a=b", "python -m dsft.stage c=d", "make sense",
    ]  # fmt: skip
    assert len(ALL) > 40


def test_a_command_that_does_not_work_fails(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("python -m dsft.run method=qlra", "python -m dsft.sweep states SWEEP", "make sense"):
        with pytest.raises(AssertionError):
            test_a_command_of_the_pages_works("page", command, capsys)
