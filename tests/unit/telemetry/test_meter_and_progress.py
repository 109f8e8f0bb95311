"""Speed, memory, and what a person sees."""

import io
import time

import pytest
import torch

from dsft.telemetry.meter import Meter, peak_memory_bytes
from dsft.telemetry.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def values(loss: float = 1.5) -> dict[str, float]:
    return {"loss": loss, "tokens_per_s": 1234.4, "step_s": 2.0}


def test_meter_measures_one_step() -> None:
    meter = Meter()
    meter.start()
    time.sleep(0.05)
    measured = meter.stop(tokens=100)
    assert 0.05 <= measured["step_s"] < 1.0
    assert measured["tokens_per_s"] == pytest.approx(100 / measured["step_s"])


def test_peak_memory_grows_with_what_is_held_and_never_falls() -> None:
    cpu = torch.device("cpu")
    before = peak_memory_bytes(cpu)
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    peak = peak_memory_bytes(cpu)
    assert before > 50 * 2**20
    assert peak >= before
    del held
    assert peak_memory_bytes(cpu) >= 0.99 * peak  # the kernel sums counters of threads, a little late


def test_a_log_file_gets_first_last_and_spaced_lines() -> None:
    stream = io.StringIO()
    progress = ProgressLine(100, stream=stream, interval_s=1e6)
    progress.begin(40)
    for step in range(41, 101):
        progress.step(step, values())
    progress.say("eval loss 0.5 [bold]not markup[/bold]")
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 41/100  loss 1.5000  1,234 tokens/s  ETA 0:01:58",
        "step 100/100  loss 1.5000  1,234 tokens/s  ETA 0:00:00",
        "eval loss 0.5 [bold]not markup[/bold]",
    ]


def test_a_terminal_gets_one_moving_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = ProgressLine(3, stream=stream)
    for step in (1, 2, 3):
        progress.step(step, values(float("nan") if step == 2 else 1.0))
    progress.say("saved step 3")
    progress.close()
    text = stream.getvalue()
    assert "step 3/3" in text
    assert "loss nan" in text
    assert "saved step 3" in text
    assert text.count("\n") < 6
