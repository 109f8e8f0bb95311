"""python -m dsft_launchers.supervise RUN|SWEEP:FIRST NODES DEVICES NOTICE_S ELASTIC [PREFIX]: the batch step.

A crash restarts them inside the allocation. A stop that SLURM asked for (time limit, preemption) puts the job back into
the queue. How an attempt ended stands in RUN/status.json, which rank 0 wrote, and in what the ranks logged.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

from dsft_launchers import cluster, copied, join
from dsft_launchers.attempt import attempt, tell
from dsft_launchers.cause import ENDS
from dsft_launchers.codes import CRASHED, DONE, HOPELESS, STOPPED, USER_ERROR
from dsft_launchers.files import replace_text, write_for_nobody_else

ROOT = Path(__file__).parents[2]
"""Where this process imports its code from."""
ATTEMPTS = 3
"""Crashes, or returns to the queue, without a new checkpoint between them after which the job gives up."""
PATIENCE_S = 300.0
"""How long SLURM may take for what it was asked."""
FAILURES, LEFT_OUT = 2, 3
"""After how many a node is left out, and of how many nodes at most: then it is not the nodes."""
LONGEST_PAUSE_S, GUARD_PAUSE_S = 60.0, 15.0
"""Between starts of the ranks; until a guard that ended, as its node was lost, has a successor."""
TASK = "SLURM_ARRAY_TASK_ID"


@dataclass(frozen=True)
class Tally:
    """supervisor.json: what job had crashed, returned to the queue, or lost otherwise, since that checkpoint.

    nodes: how often ranks failed on each, since the job began.
    """

    job: str
    checkpoint: str | None = None
    crashes: int = 0
    returns: int = 0
    restarts: int = 0
    nodes: Mapping[str, int] = field(default_factory=dict)


def main() -> int:
    """Supervise the run that the command line names."""
    write_for_nobody_else()
    run_dir, prefix = _run_dir(sys.argv[1]), sys.argv[6:]
    nodes, devices, notice_s, elastic = map(int, sys.argv[2:6])
    python = [*prefix, "python"] if prefix else [sys.executable]  # a container has its own
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, lambda *_: None)  # the ranks get them too, and srun ends with the ranks
    tell(f"job {_job()} on {os.environ['SLURM_JOB_NODELIST']}")
    try:
        blind = _blind_nodes(run_dir, nodes)
    except cluster.ClusterError as error:
        return _put_back(run_dir, f"the nodes could not be asked: {error}")
    if blind:
        _amend(run_dir, state="failed", reason=f"{', '.join(blind)} cannot see {run_dir}; choose a shared folder")
        return USER_ERROR
    if elastic:
        Thread(target=_guarded, args=(run_dir,), daemon=True).start()
    try:
        return _attend(run_dir, nodes, devices, python, notice_s)
    except OSError as error:
        tell(f"the run folder does not take what the job has to write: {error}")
        return CRASHED


def _attend(run_dir: Path, nodes: int, devices: int, python: list[str], notice_s: int) -> int:
    """Start the ranks until the run ends or SLURM takes the nodes; the job's exit code."""
    code, asked = None, nodes
    while code is None:
        if wrong := copied.imports_another(run_dir, ROOT):  # nothing of it is started, and never again
            tell(wrong)
            _amend(run_dir, state="failed", reason=wrong)
            return CRASHED
        now = _now()
        if late := _late(now, notice_s):
            return _put_back(run_dir, late)
        if now is not None and 0 < now.num_nodes < nodes:  # launcher.elastic: SLURM has taken the lost ones out
            nodes = now.num_nodes
            tell(f"a node was lost; going on with {now.nodes}")
        code = _once(run_dir, nodes, devices, python, fewer=nodes < asked)
    return code


def _once(run_dir: Path, nodes: int, devices: int, python: list[str], *, fewer: bool) -> int | None:
    """One attempt; the job's exit code, None to make another. fewer: nodes than the run was made for."""
    before = _read(run_dir / "status.json")
    ended = attempt(run_dir, nodes, devices, python, fewer=fewer)
    status = _read(run_dir / "status.json")
    began = status["attempts"] > before["attempts"]  # else it tells of an attempt before
    if began and status["state"] == "done":
        return DONE
    if began and status["state"] == "stopped":
        return _stopped(run_dir, status["reason"])
    cause = ended.cause
    if cause and cause.kind == "gave up":  # the folder is another's, or gone
        return CRASHED
    if cause and cause.kind in ENDS:
        state, code, said = ENDS[cause.kind]
        tell(f"{said}{cause.reason}")
        if began:  # else another start works on the run, whose status it is
            _amend(run_dir, state=state, reason=cause.reason)
        return code
    reason = cause.reason if cause else "the ranks ended without a word; the logs may say why"
    if not _ours():
        return _taken(run_dir, reason, CRASHED)
    counts = cause is not None and cause.counts
    if not (began or counts or (cause and cause.kind == "node lost")):
        counts, reason = True, f"the ranks could not begin: {reason}"
    if counts and _count(run_dir, status, "crashes").crashes >= ATTEMPTS:
        return _give_up(run_dir, reason, nodes if fewer else None)
    tally = _count(run_dir, status, "restarts", ended.node)
    if ended.node and (others := _without(ended.node, tally)):
        return _put_back(run_dir, f"ranks failed twice on {ended.node}, which is left out from now on", others)
    _amend(run_dir, state="restarting", reason=reason)
    pause = min(LONGEST_PAUSE_S, 2.0 ** (tally.restarts - 1) - 1)
    tell(f"starting the ranks again inside the allocation{f' in {pause:g} s' if pause else ''}")
    time.sleep(pause)
    return None


def _give_up(run_dir: Path, reason: str, nodes: int | None) -> int:
    """The end after too many errors. nodes: how many were left of those that the run was made for, None for all."""
    if nodes is not None:
        return _put_back(run_dir, f"not on {nodes} nodes: {reason}")
    tell(f"giving up after {ATTEMPTS} attempts without a new checkpoint; the error is in status.json and above")
    _amend(run_dir, state="failed", reason=f"{ATTEMPTS} attempts without a new checkpoint; {reason}")
    return HOPELESS


def _taken(run_dir: Path, reason: str, code: int) -> int:
    """SLURM has taken the nodes: say what the run is now, if SLURM says it; else the state stays as it was."""
    now = _now()
    if now is not None and now.restarts > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        _amend(run_dir, state="queued", reason=f"SLURM job {_job()}: {reason}")
    elif now is not None and now.state == "CANCELLED" and code == CRASHED:
        _amend(run_dir, state="stopped", reason=f"SLURM job {_job()} was cancelled before it had saved: {reason}")
    return code


def _without(node: str, tally: Tally) -> str | None:
    """The nodes that the job shall not have any more, if this one failed often enough and SLURM has others for it."""
    often = [name for name, failures in tally.nodes.items() if failures >= FAILURES]
    now = _now()
    if node not in often or len(often) > LEFT_OUT or now is None:
        return None
    nodes = ",".join(filter(None, [now.excluded, node]))
    try:
        cluster.check_without(_job(), nodes)
    except cluster.ClusterError as error:
        tell(f"ranks failed {tally.nodes[node]} times on {node}, but it cannot be left out: {error}")
        return None
    return nodes


def _guarded(run_dir: Path) -> None:
    """Keep a guard on another node as long as there is one; it outlives this process."""
    mine, logs = os.environ["SLURMD_NODENAME"], run_dir / "logs"
    logs.mkdir(exist_ok=True)  # before the ranks have made it, as no guard can be started without it
    while True:
        now = _now()
        others = [node for node in join.expand_hosts(now.nodes) if node != mine] if now else []
        if others:
            command = [
                "srun", "--overlap", "--no-kill", "--mem=0", "--nodes=1", "--ntasks=1", f"--nodelist={others[-1]}",
                "--open-mode=append", f"--output={logs / 'guard-%N.log'}",
                sys.executable, "-m", "dsft_launchers.guard", _job(), mine,
            ]  # fmt: skip
            subprocess.run(command, check=False)
        time.sleep(GUARD_PAUSE_S)


def _stopped(run_dir: Path, reason: str) -> int:
    """The ranks saved and left: back into the queue if SLURM wants the nodes, else this is the end."""
    tell(f"stopped: {reason}")
    if reason.startswith("train.max_minutes"):
        return STOPPED
    return _put_back(run_dir, reason) if _ours() else _taken(run_dir, reason, STOPPED)


def _late(now: cluster.Job | None, notice_s: int) -> str | None:
    """Why the ranks should not be started any more: SLURM gave its notice between two attempts. None if they may."""
    if now is not None and now.preempted:
        return "SLURM takes the nodes away"
    if now is None or now.left_s is None or now.left_s >= notice_s:
        return None
    return f"{now.left_s:.0f} s are left of the time limit"


def _put_back(run_dir: Path, reason: str, without: str = "") -> int:
    """Have SLURM queue the job again; if it does not, or it was for nothing too often, the run is stopped.

    without: nodes that the job shall not have any more.
    """
    status = _read(run_dir / "status.json")
    if _count(run_dir, status, "returns").returns > ATTEMPTS:
        _amend(run_dir, state="stopped", reason=f"{reason}; queued {ATTEMPTS} times again without a new checkpoint")
        return STOPPED
    _amend(run_dir, state="queued", reason=f"SLURM job {_job()}: {reason}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM now ends what the job has; not what is still to be asked
    try:
        cluster.ask("scontrol", "requeue", _job(), patience_s=PATIENCE_S)
    except cluster.ClusterError as error:
        _amend(run_dir, state="stopped", reason=f"{reason}; SLURM did not take the job back into the queue: {error}")
        return STOPPED
    tell(f"back into the queue: {reason}")
    if without:  # SLURM takes this for a job that waits, and sends it nowhere for some seconds
        try:
            cluster.ask("scontrol", "update", f"JobId={_job()}", f"ExcNodeList={without}")
        except cluster.ClusterError as error:
            tell(f"{without} could not be left out: {error}")
    time.sleep(PATIENCE_S)  # until SLURM ends this
    return STOPPED


def _ours() -> bool:
    """Whether the allocation is still this job's, and neither cancelled nor taken away."""
    now = _now()
    return now is not None and now.state == "RUNNING"


def _now() -> cluster.Job | None:
    """The job as SLURM sees it; waits for a controller that is busy or restarts.

    At first not for long: a signal to the whole job ends the command that asks, and SIGKILL follows within seconds.
    """
    until, pause = time.monotonic() + PATIENCE_S, 0.5
    while True:
        try:
            return cluster.job(_job())
        except cluster.ClusterError as error:
            tell(f"SLURM does not answer: {error}")
            if time.monotonic() > until:
                return None
            time.sleep(pause)
            pause = min(5.0, 2 * pause)


def _count(run_dir: Path, status: Mapping[str, Any], what: str, node: str | None = None) -> Tally:
    """The tally with one more of what, on node; a later checkpoint since, or another job, begins it anew."""
    path = run_dir / "supervisor.json"
    fresh = Tally(_job(), status["checkpoint"])
    before = Tally(**_read(path)) if path.is_file() else fresh
    if before.job != fresh.job:
        before = fresh
    elif (fresh.checkpoint or "") > (before.checkpoint or ""):
        before = replace(fresh, nodes=before.nodes)
    nodes = {**before.nodes, node: before.nodes.get(node, 0) + 1} if node else before.nodes
    tally = replace(before, nodes=nodes, **{what: getattr(before, what) + 1})
    replace_text(path, json.dumps(asdict(tally)) + "\n")
    return tally


def _blind_nodes(run_dir: Path, nodes: int) -> list[str]:
    """Nodes of the allocation that do not see the run folder, or where the run was typed."""
    probe = 'for p in "$@"; do [ -e "$p" ] || echo "dsft-blind $SLURMD_NODENAME"; done'
    where = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--chdir=/"]
    paths = [str(run_dir / "config.yaml"), os.environ["SLURM_SUBMIT_DIR"]]
    said = cluster.ask(*where, "sh", "-c", probe, "probe", *paths, patience_s=PATIENCE_S)
    return sorted({line.split()[1] for line in said.splitlines() if line.startswith("dsft-blind ")})


def _run_dir(word: str) -> Path:
    """RUN, or the point of SWEEP that this task of an array is: its number behind FIRST."""
    sweep, _, first = word.partition(":")
    if first:
        return Path(sweep) / str(int(first) + int(os.environ[TASK]))
    os.environ.pop(TASK, None)  # another array's, if this job was submitted from inside it
    return Path(word)


def _job() -> str:
    """This job for SLURM's commands. They would take the plain id of an array's last task for the whole array."""
    if task := os.environ.get(TASK):
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    return os.environ["SLURM_JOB_ID"]


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _amend(run_dir: Path, **values: str) -> None:
    replace_text(run_dir / "status.json", json.dumps({**_read(run_dir / "status.json"), **values}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
