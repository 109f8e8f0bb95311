"""One start of a job's ranks by srun: how it ended, and on which node."""

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsft_launchers import cluster, verdict

SUPERVISED = "DSFT_SUPERVISED"
"""Tells a rank that its leaving on request is no failure: srun would end the others for it."""
ENDED = re.compile(r"^srun: error: ([^\s:]+): tasks? ([\d,-]+): (.+)$", re.MULTILINE)
"""What srun says of tasks that ended wrongly: node, tasks, how."""
TERMINATING = "Terminating StepId"
"""What it says before it ends the others."""
SIGNALS = re.compile(r"Killed|Segmentation fault|Bus error|Illegal instruction|Aborted|Floating point exception")
"""How a rank ends that raised no error. Out of memory is not among them: that follows the job to any node."""
DEVICE = re.compile(
    r"ECC|unspecified launch failure|fallen off the bus|GPU is lost|CUDA-capable device|Input/output error"
)
"""What an error says of a broken accelerator or disk, whatever the program."""


@dataclass(frozen=True)
class Attempt:
    """How it ended: the error that a rank raised, whether another start took the folder, the node that it failed on.

    before: what ended a rank before it could say so, in the log's last lines.
    """

    error: str | None = None
    before: str | None = None
    overtaken: bool = False
    node: str | None = None


def attempt(run_dir: Path, nodes: int, devices: int, python: list[str], *, fewer: bool) -> Attempt:
    """Start the ranks, and wait for them."""
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    command = [
        "srun", f"--nodes={nodes}", f"--ntasks={nodes * devices}", f"--ntasks-per-node={devices}", "--unbuffered",
        "--kill-on-bad-exit=1", "--open-mode=append", f"--output={logs / 'rank-%t.log'}",
        *(["--overlap"] if fewer else []),  # for SLURM the step that lost a node never ends on the others
        *python, "-m", "dsft.job", str(run_dir),
    ]  # fmt: skip
    files = [logs / f"rank-{rank}.log" for rank in range(nodes * devices)]
    sizes = [file.stat().st_size if file.exists() else 0 for file in files]
    said = _run(command, _rank_env(devices))
    texts = [_tail(file, start) for file, start in zip(files, sizes, strict=True)]
    node = failed_on(said, texts, alone=nodes == 1)
    if raised := [rank for rank, text in enumerate(texts) if verdict.raised(text)]:
        return Attempt(f"rank {raised[0]}: " + _last(texts[raised[0]]), node=node)
    if why := verdict.cannot_begin(texts):
        tell(f"cannot begin: {why}")
        return Attempt(why, node=node)
    if verdict.OVERTAKEN in texts[0]:
        return Attempt(overtaken=True)
    if (silent := verdict.hung(texts)) is not None:
        if not silent:
            return Attempt("all ranks waited for each other; their stacks are in the logs")
        tell(f"rank {', '.join(map(str, silent))} hangs; the stacks of those that waited are in {logs}")
    return Attempt(node=node, before=next((_last(text) for text in texts if verdict.TRACEBACK in text), None))


def _run(command: Sequence[str], env: Mapping[str, str]) -> str:
    """What srun says while the ranks run; it is shown as well."""
    begun, said = time.monotonic(), list[str]()
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, errors="replace") as step:
        assert step.stderr is not None
        for line in step.stderr:
            said.append(line)
            print(line, end="", flush=True)
    tell(f"srun ended with {step.returncode} after {time.monotonic() - begun:.1f} s")
    return "".join(said)


def failed_on(said: str, texts: Sequence[str], *, alone: bool) -> str | None:
    """The one node whose ranks raised an error of their own, or hung, or died; None if they were on several or none.

    said: what srun wrote; texts: what each rank did. alone: there was no other node, so that an error that a rank
    raised speaks against the node only if its words are a device's.
    """
    places = {rank: node for node, ranks, _ in ENDED.findall(said) for rank in cluster.numbers(ranks)}
    first = ENDED.findall(said.partition(TERMINATING)[0])
    died = [rank for _, ranks, how in first if SIGNALS.match(how) for rank in cluster.numbers(ranks)]
    raised = [rank for rank, text in enumerate(texts) if verdict.raised(text)]
    if raised and alone and not any(DEVICE.search(texts[rank]) for rank in raised):
        return None
    found = {places.get(rank) for rank in raised or verdict.hung(texts) or verdict.missing(texts) or died}
    return found.pop() if len(found) == 1 else None


def _last(text: str) -> str:
    """The error; what the interpreter writes after the rank's own last word, if its end goes wrong too, is not."""
    return "\n".join(verdict.error_lines(text.partition(verdict.CRASH)[0]))


def _tail(file: Path, start: int) -> str:
    if not file.exists():
        return ""
    with file.open("rb") as content:
        content.seek(start)
        return content.read().decode(errors="replace")


def _rank_env(devices: int) -> dict[str, str]:
    """The ranks' environment: threads as the cores allow, live output, a stack after a crash in native code."""
    cores = int(os.environ.get("SLURM_CPUS_ON_NODE", os.cpu_count() or 1))
    env = {"OMP_NUM_THREADS": str(max(1, cores // devices)), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        env["SRUN_CPUS_PER_TASK"] = cpus  # srun no longer takes it over from sbatch
    return {**env, **os.environ, SUPERVISED: "1"}


def tell(text: str) -> None:
    """Add a line to the job's log."""
    print(f"dsft: {time.strftime('%FT%T')} {text}", flush=True)
