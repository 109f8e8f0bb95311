"""Check E: how ranks end that spin, die, stop, raise or are asked to stop: by which code, and in how many seconds."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from dsft_launchers.codes import CRASHED, STOPPED

from benchmarks.gpu.facts import Facts
from benchmarks.gpu.scene import Scene
from benchmarks.measure import LAUNCH

SPIN_S = 8.0
"""How long a kernel spins that nobody waits for."""
GONE_S = 5.0
"""At most, from the last line of a process to its end, whatever its GPU does."""
CLOCK_HZ = 1_980_000_000
"""Of an H200 at most; CUDA 13 does not tell it any more."""
WAYS = ("os._exit", "dsft in a group", "Python")
"""How a process leaves: as Patience ends one; as a crash of a rank ends; by Python's own end, which is only told."""
CASES = {
    "killed (-9)": ("", signal.SIGKILL, CRASHED, 12.0),
    "stopped (SIGSTOP)": ("stops", signal.SIGSTOP, CRASHED, 20.0),
    "raises in a step": ("raises", None, CRASHED, 12.0),
    "SIGTERM while one waits": ("sleeps", signal.SIGTERM, STOPPED, 12.0),
}
"""Name -> fault in rank 1, see loops.py; signal to rank 1, SIGTERM to the launcher; its exit code; seconds at most."""


def exits(scene: Scene, facts: Facts) -> None:
    """Groups of two ranks, all at once; then single processes, one after the other, which import meanwhile."""
    leaving = {way: _ready(scene, way) for way in (WAYS if scene.cuda else WAYS[:1])}
    with facts.part("groups of two ranks"):
        _groups(scene, facts)
    for way, process in leaving.items():
        with facts.part(f"leaving by {way} from under work"):
            _leaves(scene, way, process, facts)
    if scene.cuda:
        with facts.part("threads while the device works"):
            _ticks(facts)
    else:
        facts.note("threads while the device works", "not possible on a CPU")


def _seconds(facts: Facts, what: str, seconds: float, most: float, *, judged: bool) -> None:
    """Told alone on a CPU, where other work decides it."""
    facts.note(what, round(seconds, 2), "s", ok=seconds <= most if judged else None, why=f"at most {most:g}")


def _must(code: int, found: int | None, said: str) -> str:
    return f"must be {code}" + ("" if found == code else f": {said}")


@dataclass
class _Group:
    name: str
    folder: Path
    process: "subprocess.Popen[bytes]"
    acted: float = 0.0
    ended: float = 0.0


def _groups(scene: Scene, facts: Facts) -> None:
    groups = [_start(scene, name, fault) for name, (fault, *_) in CASES.items()]
    until = scene.until - 5.0
    while any(not group.ended for group in groups) and time.monotonic() < until:
        for group in groups:
            _look(group)
        time.sleep(0.02)
    for group in groups:
        code, most = CASES[group.name][2:]
        found = group.process.poll()
        if found is None:
            group.process.kill()
        said = " ".join((group.folder / "said").read_text(errors="replace").split())[-200:]
        facts.note(f"{group.name}: exit code", found, ok=found == code, why=_must(code, found, said))
        aborted = "SIGABRT" in said or "Aborted" in said
        facts.note(f"{group.name}: aborted", aborted, ok=not aborted)
        if group.ended and group.acted:
            _seconds(facts, f"{group.name}: ends after", group.ended - group.acted, most, judged=scene.cuda)


def _start(scene: Scene, name: str, fault: str) -> _Group:
    folder = scene.folder / "".join(filter(str.isalnum, name))
    folder.mkdir()
    loop = [sys.executable, "-m", "benchmarks.gpu.loops", str(folder), *([fault] if fault else [])]
    with (folder / "said").open("w") as said:
        command = [sys.executable, "-c", LAUNCH, "2", str(folder / "logs"), *loop]
        return _Group(name, folder, subprocess.Popen(command, stdout=said, stderr=said))


def _look(group: _Group) -> None:
    """Act once both ranks are in their steps; note when it has ended."""
    ready = [group.folder / f"rank-{rank}" for rank in range(2)]
    if not group.acted and all(path.is_file() for path in ready):
        number = CASES[group.name][1]
        if number == signal.SIGTERM:
            time.sleep(0.5)  # rank 0 waits for rank 1 by now
            group.process.send_signal(number)
        elif number is not None:
            os.kill(int(ready[1].read_text()), number)
        group.acted = time.time() if number is not None else ready[1].stat().st_mtime
    if not group.ended and group.process.poll() is not None:
        group.ended = time.time()


def _ready(scene: Scene, way: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "benchmarks.gpu.exits", way, scene.device.type]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _leaves(scene: Scene, way: str, process: "subprocess.Popen[bytes]", facts: Facts) -> None:
    """Seconds from a process's last line to its end, its exit code, and whether it gave the card's memory back."""
    free = torch.cuda.mem_get_info()[0] if scene.cuda else 0
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"go\n")
    process.stdin.flush()
    process.stdout.readline()
    begun = time.monotonic()
    try:
        code = process.wait(timeout=SPIN_S + 10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        code = None
    ours = way != "Python"
    facts.note(f"{way}: exit code", code, ok=code == CRASHED if ours else None, why=f"must be {CRASHED}")
    _seconds(facts, f"{way}: gone after", time.monotonic() - begun, GONE_S, judged=scene.cuda and ours)
    if scene.cuda:
        back = torch.cuda.mem_get_info()[0]
        facts.note(f"{way}: GiB not given back", round((free - back) / 2**30, 2), ok=free - back < 2**29)


def spins(way: str, device: str) -> int:
    """Wait for a line, put the device to work, say so, and leave while it works."""
    sys.stdin.readline()
    if device == "cuda":
        from dsft.comm.world import group_of_one

        torch.cuda.set_device(0)
        if way == "dsft in a group":
            group_of_one()
        torch.cuda._sleep(int(SPIN_S * CLOCK_HZ))
    else:
        threading.Thread(target=_computes, daemon=True).start()
    print("leaving", flush=True)
    if way == "os._exit":
        os._exit(CRASHED)
    return CRASHED


def _computes() -> None:
    value = torch.ones(512, 512)
    while True:
        value = torch.tanh(value @ value)


def _ticks(facts: Facts) -> None:
    """Whether Python's other threads run while this one waits for the device."""
    ticks, over = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not over.wait(0.01):
            ticks += 1

    thread = threading.Thread(target=tick)
    value = torch.ones(1, device="cuda")
    torch.cuda._sleep(2_000_000_000)  # about a second
    thread.start()
    begun = time.monotonic()
    (value + 1).item()
    waited = time.monotonic() - begun
    over.set()
    thread.join()
    facts.note("waiting for the device", round(waited, 2), "s")
    facts.note("ticks of 10 ms meanwhile", ticks, ok=ticks > 30 * waited, why="at least 30 a second")


if __name__ == "__main__":
    if sys.argv[1] == "Python":
        sys.exit(spins(*sys.argv[1:]))
    from dsft.entry import enter

    enter(lambda: spins(*sys.argv[1:]))
