"""One start of a job's ranks by srun: what it failed of, and on which node."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dsft_launchers import cause, cluster, verdict
from dsft_launchers.cause import Cause
from dsft_launchers.place import MEETING, private_folder
from dsft_launchers.shown import in_a_line, shown

SUPERVISED = "DSFT_SUPERVISED"
"""Tells a rank that its leaving on request is no failure: srun would end the others for it."""
ENDED = re.compile(r"^srun: error: ([^\s:]+): tasks? ([\d,-]+): (.+)$", re.MULTILINE)
"""What srun says of tasks that ended wrongly: node, tasks, how."""
TERMINATING = re.compile(r"Terminating StepId|Job step aborted")
"""What it says before it, or SLURM, ends the others."""
EXITED = re.compile(r"Exited with exit code (\d+)")
OUT_OF_MEMORY = "Out Of Memory"
"""How a rank ends that SLURM's own limit killed: that follows the job to any node."""
NODE_LOST = re.compile(r"Node failure on ([^\s:]+)")
SIGNALS = {str(signal.strsignal(number)): number for number in signal.valid_signals()}
"""Signals by what srun calls them."""
CRASHES = ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGILL", "SIGABRT", "SIGFPE")
"""How a rank ends that neither raised an error nor was asked to leave."""
DEVICE = re.compile(
    r"ECC|unspecified launch failure|fallen off the bus|GPU is lost|CUDA-capable device|Input/output error"
)
"""What an error says of a broken accelerator or disk, whatever the program."""


class Attempt(NamedTuple):
    """What it failed of, None if it did not or nobody can tell; node: the one on which it failed."""

    cause: Cause | None
    node: str | None


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
    with _meeting() as place:
        said = _run(command, {**_rank_env(devices), **place})
    texts = [_tail(file, start) for file, start in zip(files, sizes, strict=True)]
    found = cause_of(said, texts)
    if found is not None:
        tell(f"{found.reason}; the ranks' logs are in {logs}")
    return Attempt(found, failed_on(said, texts, alone=nodes == 1))


@contextmanager
def _meeting() -> Iterator[dict[str, str]]:
    """The variable that names the ranks' private folder, where this node is the job's only one; none else."""
    if os.environ.get("SLURM_JOB_NUM_NODES") != "1":
        yield {}
        return
    with private_folder() as place:
        yield {MEETING: str(place)}


def cause_of(said: str, texts: Sequence[str]) -> Cause | None:
    """Return what the ranks failed of. said: what srun wrote; texts: what each rank wrote.

    A node that was lost is the cause where no rank raised an error or hung: the others have only lost its ranks.
    """
    found = cause.find(texts, [*_failures(said, texts), *_unheard(said, texts)])
    lost = NODE_LOST.search(said)
    if lost and (found is None or found.kind in ("died", "lost")):
        return Cause("node lost", 0 if found is None else found.rank, f"node {lost[1]} was lost")
    return found


def _failures(said: str, texts: Sequence[str]) -> list[verdict.Failure]:
    """The ranks that ended wrongly by themselves, in the order in which srun saw them end."""
    return [
        verdict.Failure(rank, code, float(at), texts[rank])
        for at, (_, ranks, how) in enumerate(_ended_first(said))
        for rank in cluster.numbers(ranks)
        if (code := _code(how)) is not None and rank < len(texts)
    ]


def _ended_first(said: str) -> list[tuple[str, str, str]]:
    """Node, tasks and how they ended, of those that ended before srun began to end the others."""
    return ENDED.findall(TERMINATING.split(said, maxsplit=1)[0])


def _unheard(said: str, texts: Sequence[str]) -> list[verdict.Failure]:
    """The rank that a signal ended without a last word, if all others say that they lost a peer; else none.

    srun may report a rank that lost it first, as where both ended before their node looked, and the cause only then.
    """
    words = [verdict.last_word(text) for text in texts]
    silent = [rank for rank, word in enumerate(words) if word is None]
    if len(silent) != 1 or any(word.word != verdict.LOST_PEER for word in words if word is not None):
        return []
    return [
        verdict.Failure(silent[0], code, float(len(texts)), texts[silent[0]])
        for later in TERMINATING.split(said, maxsplit=1)[1:]
        for _, ranks, how in ENDED.findall(later)
        if silent[0] in cluster.numbers(ranks) and (code := _code(how) or 0) < 0
    ]


def _code(how: str) -> int | None:
    """The return code, as subprocess has it, of a task that ended as srun says; None for words that are not known."""
    if exited := EXITED.match(how):
        return int(exited[1])
    if how.startswith(OUT_OF_MEMORY):
        return -signal.SIGKILL
    number = SIGNALS.get(how.partition(" (core dumped)")[0])
    return None if number is None else -number


def _run(command: Sequence[str], env: Mapping[str, str]) -> str:
    """What srun says while the ranks run; it is shown as well."""
    begun, said = time.monotonic(), list[str]()
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, errors="replace") as step:
        assert step.stderr is not None
        for line in step.stderr:
            said.append(line)
            print(shown(line), end="", flush=True)
    tell(f"srun ended with {step.returncode} after {time.monotonic() - begun:.1f} s")
    return "".join(said)


def failed_on(said: str, texts: Sequence[str], *, alone: bool) -> str | None:
    """Return the one node whose ranks raised an error of their own, or hung, or died; None if several did or none.

    said: what srun wrote; texts: what each rank did. alone: there was no other node, so that an error that a rank
    raised speaks against the node only if its words are a device's.
    """
    places = {rank: node for node, ranks, _ in ENDED.findall(said) for rank in cluster.numbers(ranks)}
    raised = [rank for rank, text in enumerate(texts) if verdict.raised(text)]
    words = [verdict.last_word(texts[rank]) for rank in raised]
    if raised and alone and not any(word is not None and DEVICE.search(word.said) for word in words):
        return None
    left = [failure.rank for failure in _failures(said, texts)]
    died = _crashed(said, texts) or [failure.rank for failure in _unheard(said, texts)]
    blamed = raised or verdict.hung(texts, left) or verdict.missing(texts) or died
    found = {places.get(rank) for rank in blamed}
    return found.pop() if len(found) == 1 else None


def _crashed(said: str, texts: Sequence[str]) -> list[int]:
    """Ranks that a signal ended before they said a last word; one that comes after it is the interpreter's end."""
    return [
        rank
        for _, ranks, how in _ended_first(said)
        if not how.startswith(OUT_OF_MEMORY) and -(_code(how) or 0) in [signal.Signals[name] for name in CRASHES]
        for rank in cluster.numbers(ranks)
        if rank >= len(texts) or verdict.last_word(texts[rank]) is None
    ]


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
    print(in_a_line(f"dsft: {time.strftime('%FT%T')} {text}"), flush=True)
