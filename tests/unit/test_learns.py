"""The learning table: which methods are run again, what the page says of those that learned nothing, the chart."""

from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.learns import METHODS, missing, words
from benchmarks.learns_text import chart, page
from dsft.compose import compose


def line(method: str, after: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method, "steps": 60, "commit": "abc", "machine": "2 cores, no GPU, commit abc", "lr": 1e-3,
        "loss_before": 2.0, "loss_after": after, "accuracy_before": 0.0, "accuracy_after": 0.5, "trainable": 1000,
        "total": 100_000, "state_bytes": 2**20, "tokens_per_s": 300.0, "peak_memory_bytes": 2**30, "precision": "bf16",
        "losses": [], "seconds": 90.0, **more,
    }  # fmt: skip


LINES = [
    line("lora", 1.9), line("ia3", 2.5), line("full", 0.5), line("lora", 1.0, commit="def"),
    {"method": "adalora", "steps": 60, "commit": "abc", "machine": "2 cores, commit abc", "refused": "too short"},
]  # fmt: skip


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("| [")]


def test_a_method_is_run_again_for_other_code_or_another_length_only() -> None:
    wanted = ["adalora", "full", "lora", "vera"]
    assert missing(wanted, LINES, "abc", steps=60) == ["vera"]
    assert missing(wanted, LINES, "def", steps=60) == ["adalora", "full", "vera"]
    assert missing(wanted, LINES, None, steps=60) == ["vera"]
    assert missing(wanted, LINES, None, steps=30) == wanted


def test_the_page_has_the_newest_line_of_each_by_loss_and_says_which_learned_nothing() -> None:
    text = page(LINES, 60)
    assert [row[0].split("]")[0] for row in rows(text)] == ["[full", "[lora", "[ia3"]
    assert [row[6] for row in rows(text)] == ["75.0%", "50.0%", "**RED** -25.0%"]
    assert "Red, as it does not lower the loss: ia3." in text
    assert "adalora is refused: too short" in text
    assert "Every method below lowers the loss" in page(LINES[2:4], 60)
    assert "Nothing is measured yet" in page([], 60)


def test_other_settings_stand_apart_with_what_they_gain_and_out_of_the_chart() -> None:
    tried = [*LINES, line("lora", 0.6, changed="optim.lr=1e-2"), line("full", 0.7, changed="optim.lr=1e-4")]
    assert missing(["lora", "full"], tried, "abc", steps=60, changed="optim.lr=1e-2") == ["full"]
    text = page(tried, 60)
    assert rows(text) == rows(page(LINES, 60))
    others = [row.split(" | ") for row in text.partition("## Other settings")[2].splitlines() if "`" in row]
    assert [(row[0], row[-1]) for row in others] == [("| lora", "+20.0 points |"), ("| full", "-10.0 points |")]
    assert chart(tried) == chart(LINES)


def test_a_speed_that_was_timed_apart_takes_the_place_of_the_runs_own() -> None:
    timed = {"method": "full", "steps": 60, "commit": "abc", "timed": True, "tokens_per_s": 777.0}
    assert missing(["full"], [*LINES, timed], "def", steps=60, timed=True) == ["full"]
    assert missing(["full"], [*LINES, timed], "abc", steps=60, timed=True) == []
    assert [row[10] for row in rows(page([*LINES, timed], 60))] == ["777", "300", "300"]


def test_the_chart_has_a_bar_for_each_and_red_ones_for_those_that_learned_nothing() -> None:
    drawn = ElementTree.fromstring(chart(LINES))
    bars = [each for each in drawn.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert [bar.attrib["fill"] for bar in bars] == ["#2a6f97", "#2a6f97", "#c1121f"]
    assert [float(bar.attrib["width"]) for bar in bars] == pytest.approx([285.0, 190.0, 95.0])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_run_at_its_own_rate(method: str) -> None:
    composed = compose(words(method, 60))
    composed.run.method.check(60)
    assert [repair for repair in composed.repairs if repair.startswith("optim.lr=auto")]
