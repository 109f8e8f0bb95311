"""Runs checks one after the other, each in processes of its own and with a limit of its own, all inside a budget.

Needs the standard library alone, so that it lives whatever happens to torch or to a driver in a check's process.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from dsft_launchers import orphans

FACTS = "DSFT_GPU_FACTS"
"""Variable of a check's process: the file to which it appends a line of JSON for each fact, as soon as it knows it."""

RESERVE_S = 12.0
"""Of the budget: to kill what does not die (5 s at most, see orphans.end) twice, and to write the table."""

POLL_S = 0.02
TAIL = 300
"""Characters of a log's end that say why a check died."""


class State(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    DIED = "died"
    KILLED = "killed"
    GARBLED = "garbled"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Check:
    """One check. takes_s: about how long, it is not begun with less left; limit_s: then it is killed; unable: why it
    cannot be run here, empty if it can. The process of command reads one line from its standard input before it works,
    the seconds that it has.
    """

    name: str
    title: str
    command: tuple[str, ...]
    takes_s: float
    limit_s: float
    unable: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of a check. facts: as it wrote them, also where it was killed later."""

    check: str
    title: str
    state: State
    why: str = ""
    seconds: float = 0.0
    limit_s: float = 0.0
    facts: list[dict[str, Any]] = field(default_factory=list)


class Stop:
    """by: the signal that asked to stop, empty while none has."""

    by = ""

    @contextmanager
    def bound(self) -> Iterator["Stop"]:
        """Within, SIGTERM, SIGINT and SIGHUP set by and do nothing else."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = [signal.signal(number, self._ask) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.by = self.by or signal.Signals(number).name


def run(
    checks: Sequence[Check], *, until: float, folder: Path, env: Mapping[str, str], stop: Stop
) -> Iterator[Outcome]:
    """Run checks in order until the clock (time.monotonic) says until; every one has an outcome, its line in
    folder/checks.jsonl before the next begins. While one works the next one's process is started, and imports.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "checks.jsonl"
    lines.write_text("")
    ahead: dict[str, _Started] = {}
    try:
        for index, check in enumerate(checks):
            left = until - RESERVE_S - time.monotonic()
            if why := _not_run(check, left, stop):
                outcome = Outcome(check.name, check.title, State.NOT_RUN, why)
            else:
                started = ahead.pop(check.name, None) or _Started(check, folder, env)
                if following := next((each for each in checks[index + 1 :] if not each.unable), None):
                    if following.name not in ahead:
                        ahead[following.name] = _Started(following, folder, env)
                outcome = started.attend(min(check.limit_s, left), stop)
            with lines.open("a") as out:
                out.write(json.dumps(asdict(outcome)) + "\n")
            yield outcome
    finally:
        for started in ahead.values():
            started.end()


def _not_run(check: Check, left: float, stop: Stop) -> str:
    if stop.by:
        return f"stopped by {stop.by}"
    if check.unable:
        return check.unable
    if left < check.takes_s:
        return f"budget: {max(0.0, left):.0f} s are left for it, it takes about {check.takes_s:g}"
    return ""


class _Started:
    """A check's process, which waits for its line. Whatever it starts itself carries its mark, and ends with it."""

    def __init__(self, check: Check, folder: Path, env: Mapping[str, str]) -> None:
        self.check, self.mark = check, orphans.new_mark(env)
        stem = "".join(letter if letter.isalnum() else "-" for letter in check.name)
        self.log, self.facts = folder / f"{stem}.log", folder / f"{stem}.facts.jsonl"
        self.facts.write_text("")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                check.command, env={**env, orphans.MARK: self.mark, FACTS: str(self.facts)}, stdin=subprocess.PIPE,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def attend(self, limit_s: float, stop: Stop) -> Outcome:
        """Let it work for limit_s at most, end all its processes, and say what came of it."""
        begun = time.monotonic()
        with suppress(BrokenPipeError):  # it died before: its code and its log say of what
            assert self.process.stdin is not None
            self.process.stdin.write(f"{limit_s}\n".encode())
            self.process.stdin.close()
        while self.process.poll() is None and not stop.by and time.monotonic() - begun < limit_s:
            time.sleep(POLL_S)
        seconds, code = time.monotonic() - begun, self.process.poll()
        left_behind = self.end()
        facts, garbled = _read(self.facts)
        state, why = _judged(code, facts, garbled, self.log)
        if code is None:
            state, why = State.KILLED, f"stopped by {stop.by}" if stop.by else f"no end within {limit_s:.0f} s"
            if limit_s < self.check.limit_s and not stop.by:
                why += f", which the budget left of its {self.check.limit_s:.0f}"
        elif left_behind and state is State.PASSED:
            state, why = State.FAILED, f"left {len(left_behind)} processes behind"
        return Outcome(self.check.name, self.check.title, state, why, round(seconds, 1), round(limit_s, 1), facts)

    def end(self) -> list[int]:
        """Kill its group, and what carries its mark in whatever group; the ids of the latter."""
        alive = self.process.poll() is None
        if alive:
            os.killpg(self.process.pid, signal.SIGKILL)  # not reaped yet, so that the number is still its own
        killed = orphans.end(self.mark, patience_s=0.0 if alive else 1.0)
        with suppress(subprocess.TimeoutExpired):  # in uninterruptible sleep, where no signal reaches it
            self.process.wait(timeout=1.0)
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        return killed


def _read(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Facts, and the first line that is none; a last line that a kill has torn is left out."""
    facts: list[dict[str, Any]] = []
    text = path.read_text(errors="replace") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    for line in whole.splitlines():
        try:
            fact = json.loads(line)
            facts.append({"what": fact["what"], **{key: fact.get(key) for key in ("value", "unit", "ok", "why")}})
        except (ValueError, KeyError, TypeError, AttributeError):
            return facts, line
    return facts, ""


def _judged(code: int | None, facts: list[dict[str, Any]], garbled: str, log: Path) -> tuple[State, str]:
    wrong = [str(fact["what"]) for fact in facts if fact["ok"] is False]
    if garbled:
        return State.GARBLED, f"wrote {garbled[:80]!r}, which is no fact"
    if code and not wrong:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        tail = " ".join(log.read_text(errors="replace").split()[-40:])[-TAIL:]
        return State.DIED, f"{how}: {tail or 'without a word'}"
    if wrong:
        return State.FAILED, f"{len(wrong)} of {len(facts)} facts: {', '.join(wrong)}"
    if not facts:
        return State.GARBLED, "ended without a fact"
    return State.PASSED, ""


def environment(scratch: Path, root: Path, *, cpu: bool) -> dict[str, str]:
    """Variables of the checks: the checkout first on the path, no network, and scratch, this user's alone, for what is
    temporary and for a cache of their own unless one is named.
    """
    own = {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "launchers"), os.environ.get("PYTHONPATH", "")]),
        "TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip
    unsaid = {"DSFT_CACHE": str(scratch / "cache"), "OMP_NUM_THREADS": "1" if cpu else "4"}
    unsaid = {name: value for name, value in unsaid.items() if name not in os.environ}
    return {**os.environ, **unsaid, **own, **({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})}
