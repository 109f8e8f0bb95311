"""A real SLURM job through what SLURM and its machines do: it must end bit-equal to one that nothing happened to.

python -m benchmarks.slurm_faults [--only requeue,kill,...]   writes benchmarks/results/slurm-faults.md
On a testbed of its own (slurm/testbed; root). 2 nodes x 1 process, LoRA on the tiny model under ddp.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults import differences, events, lines
from benchmarks.machine import here
from benchmarks.matrix_rows import write_rows
from benchmarks.testbed import Testbed, slurm_here

STEPS, EVERY, MOMENT = 400, 25, 60
"""Steps of a run, between checkpoints, and after which the fault comes."""
PATIENCE_S, BOUND = 300.0, 1e-5
USER_SIGNAL = "preempt_send_user_signal"
"""SLURM's setting that a preempted job gets the signal it asked for, and not SIGTERM alone."""


@dataclass(frozen=True)
class Job:
    """A submitted run."""

    run_dir: Path
    number: str
    cluster: Testbed

    def rank(self, rank: int) -> str:
        """Its process's number on its node."""
        return str(next(each["pid"] for each in events(self.run_dir, "start")[-1]["ranks"] if each["rank"] == rank))

    def signal(self, rank: int, name: str) -> None:
        """A signal to one rank, from inside its node."""
        where = ["srun", "--overlap", f"--jobid={self.number}", f"--nodelist=n{rank + 1}", "--nodes=1", "--ntasks=1"]
        subprocess.run([*where, "kill", name, self.rank(rank)], check=True)


def preempt(job: Job) -> None:
    """A job that may take all nodes, for a moment."""
    urgent = ["sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"]
    subprocess.run(urgent, check=True, stdout=subprocess.DEVNULL)


def preempt_by_term(job: Job) -> None:
    """The same where SLURM sends SIGTERM alone."""
    job.cluster.configure(USER_SIGNAL)
    preempt(job)


FAULTS: dict[str, tuple[str, Callable[[Job], None], Sequence[str]]] = {
    "requeue": ("`scontrol requeue`", lambda job: _slurm("scontrol", "requeue", job.number), ()),
    "preempt": ("preemption, with the user signal", preempt, ()),
    "preempt-term": ("preemption, SIGTERM only", preempt_by_term, ()),
    "limit": ("a time limit of one minute", lambda job: None, ("launcher.time=1", "launcher.notice_s=5")),
    "first-node": ("the first node loses power", lambda job: job.cluster("kill-node", "n1"), ()),
    "other-node": ("another node loses power", lambda job: job.cluster("kill-node", "n2"), ()),
    "kill": ("kill -9 of a rank", lambda job: job.signal(1, "-KILL"), ()),
    "stop": ("SIGSTOP of a rank", lambda job: job.signal(1, "-STOP"), ()),
    "elastic": ("another node loses power, elastic", lambda job: job.cluster("kill-node", "n2"),
                ("launcher.elastic=true",)),
}  # fmt: skip
"""Name -> what it is, how it is done to a job, and what the run is told."""


def words(rows: Path, run_dir: Path, *more: str) -> list[str]:
    """Overrides of the run."""
    return [
        "model=tiny", "method=lora", "strategy=ddp", "data=local", f"data.path={rows}", "tracker=[]",
        "train.precision=fp32", f"train.steps={STEPS}", "train.global_batch_size=8", "train.compile=false",
        "train.log_samples=true", f"checkpoint.every={EVERY}", "checkpoint.verify_result=false", "optim.lr=1e-3",
        "launcher=slurm", "launcher.nodes=2", "launcher.devices=1", "launcher.wait=false", f"run_dir={run_dir}", *more,
    ]  # fmt: skip


def suffer(name: str, rows: Path, folder: Path, cluster: Testbed, reference: Path) -> str:
    """Submit a run, do it, let it end; a row of the table."""
    what, fault, more = FAULTS[name]
    job = submit(rows, folder / name, cluster, *more)
    _until(lambda: _steps(job.run_dir) >= MOMENT)
    begun = time.monotonic()
    fault(job)
    seen = _steps(job.run_dir)
    _until(lambda: name != "elastic" or _shown(job, "NumNodes") == 1)
    word = time.monotonic()
    _until(lambda: len(events(job.run_dir, "resume")) == 1)
    resumed = events(job.run_dir, "resume")[0]["step"]
    _until(lambda: _steps(job.run_dir) > resumed)
    ended = time.monotonic()
    for node in ("n1", "n2"):
        cluster("start-node", node)
    cluster.configure(USER_SIGNAL, f"SlurmctldParameters={USER_SIGNAL}")
    _until(lambda: json.loads((job.run_dir / "status.json").read_text())["state"] in ("done", "failed"))
    noticed = [line["step"] for line in events(job.run_dir, "stopped")]
    lost = 0 if noticed else max(0, seen - resumed)
    place = "through the queue" if _shown(job, "Restarts") else "inside the allocation"
    since = {"limit": f" after step {MOMENT}", "elastic": f", {ended - word:.1f} after SLURM's word"}.get(name, "")
    said = "; ".join(differences(reference, job.run_dir)[:3]) or "nothing"
    if name == "elastic":  # other ranks: other rounding
        off = largest_difference(reference, job.run_dir, range(resumed + 1, resumed + 11))
        said = f"{'nothing' if off <= BOUND else 'too much'}: losses of 10 steps by {off:.0e}"
    return f"| {what} | {place} | {ended - begun:.1f}{since} | {resumed} | {lost} | {said} |"


def largest_difference(reference: Path, run_dir: Path, steps: range) -> float:
    """Of the losses at these steps, relative."""
    ours, theirs = (
        [line["loss"] for line in lines(run / "metrics.jsonl") if "loss" in line and line["step"] in steps]
        for run in (run_dir, reference)
    )
    return max(abs(one - other) / other for one, other in zip(ours, theirs, strict=True))


def submit(rows: Path, run_dir: Path, cluster: Testbed, *more: str) -> Job:
    """A run as a job. Raises subprocess.CalledProcessError."""
    subprocess.run([sys.executable, "-m", "dsft.run", *words(rows, run_dir, *more)], check=True, capture_output=True)
    return Job(run_dir, str(json.loads((run_dir / "slurm" / "job.json").read_text())["job"]), cluster)


def _shown(job: Job, name: str) -> int:
    """A number of what SLURM says of the job."""
    shown = subprocess.run(["scontrol", "-o", "show", "job", job.number], capture_output=True, text=True, check=True)
    return int(shown.stdout.partition(f"{name}=")[2].split()[0].partition("-")[0])


def _slurm(*command: str) -> None:
    subprocess.run(command, check=True)


def _steps(run_dir: Path) -> int:
    """The newest step that is on record."""
    path = run_dir / "metrics.jsonl"
    return max((line["step"] for line in lines(path) if "loss" in line), default=0) if path.is_file() else 0


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not come to pass")
        time.sleep(0.05)


def main() -> int:
    """All faults, one after the other; 1 if one left a trace in the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(FAULTS), help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/slurm-faults.md"))
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := [name for name in names if name not in FAULTS]:
        parser.error(f"--only must be of {', '.join(FAULTS)}, got {', '.join(unknown)}")
    table = [
        "| what happened | went on | seconds to the next step | from step | steps computed again | different |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(dir=Path.home()) as place, slurm_here(19000, accounting=False) as cluster:
        os.environ["SLURM_CONF"] = str(cluster.conf)
        folder, rows = Path(place), Path(place) / "rows.jsonl"
        write_rows(rows, 60)
        reference = submit(rows, folder / "reference", cluster)
        _until(lambda: json.loads((reference.run_dir / "status.json").read_text())["state"] == "done")
        for name in names:
            table.append(suffer(name, rows, folder, cluster, reference.run_dir))
            print(table[-1], flush=True)
    args.out.write_text(
        "# What SLURM and its machines do to a job\n\n"
        f"LoRA on the tiny model, ddp, 2 nodes x 1 process, {STEPS} steps, a checkpoint every {EVERY}. Compared with "
        "a run that nothing happened to:\nadapter, optimizer state, examples and losses of every step.\n"
        f"`{shlex.join(['python', '-m', 'benchmarks.slurm_faults', *sys.argv[1:]])}` on {here()};\n"
        "all nodes of SLURM are on this machine.\n\n" + "\n".join(table) + "\n"
    )
    return int(any("| nothing" not in row for row in table[2:]))


if __name__ == "__main__":
    sys.exit(main())
