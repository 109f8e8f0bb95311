"""The page that a run of the checks ends with: what passed, what did not and why, what was not run, every number."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu.runner import Outcome, State

BAD = (State.FAILED, State.DIED, State.KILLED, State.GARBLED)


def page(outcomes: Sequence[Outcome], head: Sequence[str]) -> str:
    """Markdown. head: lines on where and how it ran."""
    return "\n".join([*head, "", *_table(outcomes), "", *_absent(outcomes), *_numbers(outcomes)]) + "\n"


def planted(outcome: Outcome) -> bool:
    """Whether this is the kill of a check, which must not pass."""
    return outcome.title.startswith("planted: ")


def as_it_must(outcome: Outcome) -> bool:
    """False where something is wrong: of a planted fault, that it was not seen as what it is."""
    if planted(outcome):
        return outcome.state in (State.NOT_RUN, State.KILLED if "hang" in outcome.check else State.DIED)
    return outcome.state not in BAD


def _table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield "| check | what | state | seconds | limit | facts | why |"
    yield "|---|---|---|---:|---:|---:|---|"
    for one in outcomes:
        ran = one.state != State.NOT_RUN
        held, told = (sum(fact["ok"] is wanted for fact in one.facts) for wanted in (True, None))
        facts = f"{held} held, {told} told" if one.facts else ""
        times = (f"{one.seconds:.1f}", f"{one.limit_s:.0f}") if ran else ("", "")
        state = one.state if as_it_must(one) else f"**{one.state}**"
        yield f"| {one.check} | {one.title} | {state} | {' | '.join(times)} | {facts} | {_cell(one.why)} |"


def _absent(outcomes: Sequence[Outcome]) -> Iterator[str]:
    absent = [f"{one.check} ({one.why})" for one in outcomes if one.state == State.NOT_RUN]
    yield f"Not run: {_cell('; '.join(absent))}." if absent else "Every check that was asked for was run."


def _numbers(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for one in outcomes:
        if one.facts:
            yield from ["", f"## {one.check}: {one.title}", "", "| fact | value | must be |", "|---|---|---|"]
            yield from (_row(fact) for fact in one.facts)


def _row(fact: dict[str, Any]) -> str:
    value = f"{_said(fact['value'])} {fact['unit'] or ''}".strip()
    if fact["ok"] is False:
        value = f"**{value}**"
    must = {None: "", True: "held", False: "**not held**"}[fact["ok"]]
    return f"| {_cell(str(fact['what']))} | {_cell(value)} | {_cell(': '.join(filter(None, (must, fact['why']))))} |"


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_said, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(each)}" for key, each in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    """Text that stays in its cell, and ASCII: libraries say what they like."""
    plain = " ".join(text.split()).replace("|", "/")
    return plain.encode("ascii", "replace").decode()
