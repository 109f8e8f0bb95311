"""A rank of a real SLURM job that stops in each phase of a run: its job must go on by itself, to the same bits.

python -m benchmarks.slurm_stops [--only loading,result,...]   writes benchmarks/results/slurm-stops.md
On a testbed of its own (slurm/testbed; root). 2 nodes x 1 process, LoRA on the tiny model under ddp.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.fault_rows import STOPS
from benchmarks.fault_starts import write_eval
from benchmarks.machine import here
from benchmarks.matrix_rows import write_rows
from benchmarks.plants import FIRED, PLANTS, Plant, environment, happened
from benchmarks.run_folders import differences, events
from benchmarks.slurm_faults import Job, submit
from benchmarks.testbed import Testbed, slurm_here

STOPPED = 1
"""The rank that stops, once."""
PATIENCE_S = 600.0


def once(place: str, nth: int, mark: Path) -> Plant:
    """Stop the rank at this call, in the first attempt that comes to it."""
    return Plant(place, "run", f"test -e {mark} || {{ touch {mark}; kill -STOP $PLANT_PID; }}", nth=nth, rank=STOPPED)


def ended(job: Job) -> str:
    """The state in which a job came to its end. Raises TimeoutError."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        path = job.run_dir / "status.json"
        state = json.loads(path.read_text())["state"] if path.is_file() else ""
        if state in ("done", "failed"):
            return str(state)
        time.sleep(0.2)
    raise TimeoutError(f"{job.run_dir} did not end within {PATIENCE_S:g} s")


def suffer(phase: str, rows: Path, folder: Path, cluster: Testbed, reference: Path) -> str:
    """Submit a run, of which a rank stops in this phase; a row of the table."""
    place, nth = STOPS[phase]
    name = phase.replace(" ", "-")
    mark, fired = folder / f"{name}.stopped", folder / f"{name}.fired"
    os.environ.update(environment([once(place, nth, mark)], fired))
    try:
        job = submit(rows, folder / name, cluster, *words(folder))
        state = ended(job)
    finally:
        for variable in (PLANTS, FIRED):
            os.environ.pop(variable)
    over = time.time()
    first = min((line["time"] for line in happened(fired)), default=over)
    starts = len(events(job.run_dir, "start"))
    wrong = [*([] if mark.exists() else ["no rank stopped"]), *([] if state == "done" else [f"it is {state}"])]
    said = "; ".join([*wrong, *differences(reference, job.run_dir)][:3]) or "nothing"
    return f"| {phase} | {starts} | {over - first:.0f} | {said} |"


def words(folder: Path) -> list[str]:
    """Besides those of benchmarks.slurm_faults."""
    evaluates = ["data.verify=exact", f"data.eval_path={folder / 'eval.jsonl'}"]
    return ["train.steps=60", "checkpoint.verify_result=true", *evaluates]


def main() -> int:
    """All phases, one after the other; 1 if one left a trace in the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(STOPS), help=f"of {', '.join(STOPS)}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/slurm-stops.md"))
    args = parser.parse_args()
    if unknown := [name for name in args.only.split(",") if name not in STOPS]:
        parser.error(f"--only must be of {', '.join(STOPS)}, got {', '.join(unknown)}")
    table = [
        "| SIGSTOP of a rank in | attempts | seconds from it to the end of the run | different |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(dir=Path.home()) as place, slurm_here(19200, accounting=False) as cluster:
        os.environ["SLURM_CONF"] = str(cluster.conf)
        folder, rows = Path(place), Path(place) / "rows.jsonl"
        write_rows(rows, 60)
        write_eval(folder / "eval.jsonl")
        reference = submit(rows, folder / "reference", cluster, *words(folder))
        ended(reference)
        for phase in args.only.split(","):
            table.append(suffer(phase, rows, folder, cluster, reference.run_dir))
            print(table[-1], flush=True)
    args.out.write_text(
        "# A rank of a SLURM job that stops, in each phase of a run\n\n"
        "LoRA on the tiny model, ddp, 2 nodes x 1 process, 60 steps. The job goes on by itself; compared with a run "
        "that nothing happened to:\nadapter, optimizer state, examples and losses of every step.\n"
        f"`{shlex.join(['python', '-m', 'benchmarks.slurm_stops', *sys.argv[1:]])}` on {here()};\n"
        "all nodes of SLURM are on this machine.\n\n" + "\n".join(table) + "\n"
    )
    return int(any("| nothing" not in row for row in table[2:]))


if __name__ == "__main__":
    sys.exit(main())
