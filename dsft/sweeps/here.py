"""Points of a sweep as runs of this machine: some at a time, each a process of its own."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsft_launchers import verdict
from dsft_launchers.codes import CRASHED, DIVERGED, DONE, STOPPED, USER_ERROR
from dsft_launchers.join import count_devices
from dsft_launchers.shown import in_a_line, say
from dsft_launchers.stop import stop_signals

from dsft.entry import BEGUN
from dsft.owners import TRUST
from dsft.searched import python

POLL_S = 0.1


@dataclass
class Point:
    """A point at work. slot: which share of the accelerators is its; log: None where the terminal has its output."""

    process: "subprocess.Popen[bytes]"
    slot: int
    log: Path | None


class Ended(NamedTuple):
    """Exit codes of points. left: the code to leave with where someone asked to stop, so that no more are begun."""

    codes: dict[int, int]
    left: int | None = None


def run_here(
    sweep: Path, points: Mapping[int, Sequence[str]], *, at_once: int, devices: int, trust: bool = False
) -> "Ended":
    """Run the points, each with its words. A request to stop is passed on, and starts no more.

    devices: accelerators of a point; trust: other users may write its folder. Several at once write to
    SWEEP/logs/<point>.log, and a line each to the terminal.
    """
    share = shares(at_once, devices)
    waiting, running, codes, told = list(points), dict[int, Point](), dict[int, int](), False
    with stop_signals() as stop:
        while waiting or running:
            if stop.number is not None and not told:
                told = True
                codes |= dict.fromkeys(waiting, STOPPED)
                waiting.clear()
                for each in running.values():
                    each.process.terminate()
            while waiting and len(running) < at_once:
                index = waiting.pop(0)
                slot = min(set(range(at_once)) - {each.slot for each in running.values()})
                log = sweep / "logs" / f"{index}.log" if at_once > 1 else None
                print(in_a_line(f"point {index} of {sweep} begins{f', its log: {log}' if log else ''}"), flush=True)
                words = [*points[index], *([TRUST] if trust else [])]
                running[index] = Point(_start(words, share[slot] if share else None, log), slot, log)
            time.sleep(POLL_S)
            for index in [index for index, each in running.items() if each.process.poll() is not None]:
                codes[index] = _ended(index, running.pop(index), stopped=told)
    return Ended(codes, STOPPED if told else None)


def shares(at_once: int, devices: int) -> list[str] | None:
    """CUDA_VISIBLE_DEVICES of each slot; None where all points may see what there is. devices: of a point, 0 on CPUs.

    Raises ValueError where the accelerators are too few.
    """
    count = count_devices(os.environ)
    if 0 in (count, devices) or at_once == 1:
        return None
    if at_once * devices > count:
        raise ValueError(
            f"launcher.max_parallel must be at most {count // devices} where each point takes {devices} of this "
            f"machine's {count} accelerators, got {at_once}; lower it or launcher.devices"
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    each = names.split(",")
    return [",".join(each[slot * devices : (slot + 1) * devices]) for slot in range(at_once)]


def _start(words: Sequence[str], share: str | None, log: Path | None) -> "subprocess.Popen[bytes]":
    """The run, in a session of its own: a Ctrl-C reaches it once, through us."""
    command = [*python("dsft.run"), *words]
    env = {**os.environ, BEGUN: "1", **({"CUDA_VISIBLE_DEVICES": share} if share else {})}
    if log is None:
        return subprocess.Popen(command, env=env, start_new_session=True)
    log.parent.mkdir(mode=0o700, exist_ok=True)  # the points' own folders may be for their owner alone
    with log.open("ab") as out:
        return subprocess.Popen(command, env=env, start_new_session=True, stdout=out, stderr=subprocess.STDOUT)


def _ended(index: int, point: Point, *, stopped: bool) -> int:
    """A point's exit code; how it ended goes to the terminal, with its error if it has one."""
    code = point.process.returncode
    if code < 0:
        code = STOPPED if stopped else CRASHED
    print(f"point {index}: exit code {code}", flush=True)
    if point.log is not None and code not in (DONE, STOPPED):
        text = point.log.read_text(errors="replace") if point.log.is_file() else f"its log, {point.log}, is gone"
        lines = verdict.error_lines(text)
        for line in lines[-1:] if code in (USER_ERROR, DIVERGED) else lines:
            say(f"dsft: point {index}: {line.removeprefix('dsft: ')}")
    return code
