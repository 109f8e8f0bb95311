"""The runner of the GPU checks: whatever a check does costs its own limit, and the table says of each what it did."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from dsft_launchers import orphans

from benchmarks.gpu.__main__ import arguments, main
from benchmarks.gpu.able import LEAST_GIB, Found, refusal
from benchmarks.gpu.listed import CHECKS, PLANTED_S, wanted
from benchmarks.gpu.runner import FACTS, RESERVE_S, Check, Outcome, State, Stop, run
from benchmarks.gpu.table import as_it_must, page

GOOD = """echo '{"what": "sum", "value": 1, "unit": "nats", "ok": true, "why": ""}' >>"$FACTS"; """
BAD = """echo '{"what": "product", "value": 2, "ok": false, "why": "at most 1"}' >>"$FACTS"; """
SHELLS = {
    "good": ("read seconds; " + GOOD, State.PASSED, ""),
    "hangs": ("read seconds; " + GOOD + "sleep 600", State.KILLED, "no end within"),
    "hangs apart": ("read seconds; " + GOOD + "setsid sleep 600; sleep 600", State.KILLED, "no end within"),
    "never listens": ("sleep 600", State.KILLED, "no end within"),
    "dies": ("read seconds; " + GOOD + "kill -9 $$", State.DIED, "SIGKILL"),
    "leaves": ("read seconds; echo no memory >&2; exit 3", State.DIED, "exit code 3: no memory"),
    "garbles": ("read seconds; " + GOOD + """echo '{"wha' >>"$FACTS"; """ + GOOD, State.GARBLED, "is no fact"),
    "another shape": ("""read seconds; echo '["what"]' >>"$FACTS" """, State.GARBLED, "is no fact"),
    "is silent": ("read seconds", State.GARBLED, "without a fact"),
    "is wrong": ("read seconds; " + GOOD + BAD + "exit 1", State.FAILED, "1 of 2 facts: product"),
    "leaves a child": ("read seconds; " + GOOD + "setsid sleep 600 </dev/null &", State.FAILED, "processes behind"),
    "good again": ("read seconds; " + GOOD, State.PASSED, ""),
}  # fmt: skip
"""What a check does -> its shell, how it must be seen, and what the table must say of it."""


def shell(name: str, text: str, *, takes_s: float = 0.0, limit_s: float = 30.0, unable: str = "") -> Check:
    return Check(name, f"it {name}", ("sh", "-c", text.replace("$FACTS", f"${FACTS}")), takes_s, limit_s, unable)


def ran(checks: Sequence[Check], folder: Path, *, budget_s: float = 60.0, stop: Stop | None = None) -> list[Outcome]:
    env = {key: value for key, value in os.environ.items() if key != orphans.MARK}
    return list(run(checks, until=time.monotonic() + budget_s, folder=folder, env=env, stop=stop or Stop()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    """One run of all of them, one after the other."""
    checks = [
        shell(name, text, limit_s=1.0 if state == State.KILLED else 30.0) for name, (text, state, _) in SHELLS.items()
    ]
    unable = shell("large", "", unable="memory: 2 GiB of the card are free, it needs 60")
    late = shell("late", "", takes_s=500.0)
    return {outcome.check: outcome for outcome in ran([*checks[:6], unable, late, *checks[6:]], folder)}


@pytest.mark.parametrize("name", SHELLS)
def test_a_check_is_seen_as_what_it_is_and_costs_no_other_its_result(name: str, outcomes: dict[str, Outcome]) -> None:
    _, state, why = SHELLS[name]
    assert (outcomes[name].state, why in outcomes[name].why) == (state, True), outcomes[name]
    assert f"| {name} | it {name} |" in page(list(outcomes.values()), ["# Table"])


def test_facts_that_were_written_before_a_hang_or_a_death_are_kept(outcomes: dict[str, Outcome]) -> None:
    for name in ("hangs", "dies", "hangs apart", "is wrong"):
        assert outcomes[name].facts[0] == {"what": "sum", "value": 1, "unit": "nats", "ok": True, "why": ""}


def test_what_is_not_run_is_named_with_its_reason(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["large"].state == outcomes["late"].state == State.NOT_RUN
    assert "it takes about 500" in outcomes["late"].why
    text = page(list(outcomes.values()), ["# Table"])
    assert "Not run: large (memory: 2 GiB of the card are free, it needs 60); late (budget: " in text


def test_each_line_is_written_before_the_next_check_begins(tmp_path: Path) -> None:
    look = shell("looks", f"read seconds; grep -q first {tmp_path}/checks.jsonl && {GOOD}")
    assert [outcome.state for outcome in ran([shell("first", GOOD), look], tmp_path)] == [State.PASSED] * 2
    assert [json.loads(line)["check"] for line in (tmp_path / "checks.jsonl").read_text().splitlines()] == [
        "first", "looks"
    ]  # fmt: skip


def test_no_process_of_a_check_is_left(outcomes: dict[str, Outcome], folder: Path) -> None:
    assert outcomes
    entry = f"{FACTS}={folder}".encode()
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            left += [process.name] * (entry in (process / "environ").read_bytes())
        except OSError:
            continue
    assert left == []


def test_what_the_budget_leaves_is_the_limit_of_the_last(tmp_path: Path) -> None:
    first, second = ran([shell("hangs", "sleep 600", limit_s=300.0), shell("late", GOOD, takes_s=1.0)], tmp_path,
                        budget_s=RESERVE_S + 0.5)  # fmt: skip
    assert (first.state, second.state) == (State.KILLED, State.NOT_RUN)
    assert first.limit_s <= 0.5
    assert first.why.endswith("which the budget left of its 300")


def test_a_request_to_stop_ends_the_check_and_names_what_was_not_run(tmp_path: Path) -> None:
    asks = shell("asks", f"read seconds; {GOOD} kill -TERM {os.getpid()}; sleep 600", limit_s=3600.0)
    with Stop().bound() as stop:
        first, second = ran([asks, shell("late", GOOD)], tmp_path, stop=stop)
    assert (first.state, first.why, len(first.facts)) == (State.KILLED, "stopped by SIGTERM", 1)
    assert (second.state, second.why) == (State.NOT_RUN, "stopped by SIGTERM")


@pytest.mark.parametrize(
    ("found", "cpu", "says"),
    [
        (Found(("hydra", "pyarrow")), True, "python must have hydra, pyarrow"),
        (Found((), "2.13.0+cpu"), False, "torch must be built for CUDA, got 2.13.0+cpu"),
        (Found((), "2.11.0", "13.0", "The NVIDIA driver is too old (found version 12010)"), False, "too old"),
        (Found((), "2.11.0", "13.0", "", "H200", LEAST_GIB - 1), False, "H200 must have 4 GiB of free memory, got 3.0"),
    ],
)  # fmt: skip
def test_a_machine_that_cannot_run_them_is_refused_in_one_line(found: Found, cpu: bool, says: str) -> None:
    why = refusal(found, cpu=cpu)
    assert why is not None
    assert says in why
    assert "\n" not in why


def test_a_machine_that_can_is_not_refused() -> None:
    assert refusal(Found((), "2.13.0+cpu"), cpu=True) is None
    assert refusal(Found((), "2.11.0", "13.0", "", "H200", 139.0), cpu=False) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--budget", "5"], "--budget must be 30 s or more, got 5"),
        (["--budget", "inf"], "--budget must be 30 s or more, got inf"),
        (["--only", "A2,Z"], "--only must be of 0, A2,"),
        (["--only", ""], "got nothing"),
        (["--plant", "A2=hang"], "--plant must go with --cpu"),
        (["--cpu", "--plant", "A2=explode"], "'explode'"),
        (["--cpu", "--plant", "A2"], "--plant must be NAME=FAULT"),
        (["--cpu", "--only", "A2", "--plant", "Z=die"], "got Z"),
    ],
)
def test_a_wrong_option_is_refused_before_any_check(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.startswith("dsft: ")
    assert err.count("\n") == 1


def test_a_large_shape_is_left_out_on_a_small_card_and_a_kill_stands_beside_its_check() -> None:
    small = {check.name: check.unable for check in wanted(list(CHECKS), cpu=False, free_gib=24.0)}
    assert [name for name, why in small.items() if why] == ["C1", "C2", "C3", "D"]
    planted = wanted(["A2", "E"], cpu=True, plants=arguments(["--cpu", "--plant", "all=hang+die"]).plant)
    assert [check.name for check in planted[:3]] == ["0 hang", "0 die", "A2"]
    assert {check.limit_s for check in planted if check.title.startswith("planted")} == {PLANTED_S}


@pytest.mark.parametrize("state", State)
def test_a_planted_fault_must_be_seen_as_what_it_is(state: State) -> None:
    hang = Outcome("A2 hang", "planted: hang", state)
    assert as_it_must(hang) == (state in (State.KILLED, State.NOT_RUN))
    assert as_it_must(Outcome("A2", "packed bases", state)) == (state in (State.PASSED, State.NOT_RUN))
