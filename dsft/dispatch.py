"""A run handed to SLURM: a snapshot of the code, the frozen configuration, the job; and what the user sees of it."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dsft_launchers import cluster, gpus, submit
from dsft_launchers.attempt import SUPERVISED
from dsft_launchers.codes import DONE
from dsft_launchers.files import replace_text
from dsft_launchers.follow import follow
from dsft_launchers.shown import in_a_line, say, shown

from dsft import owners, snapshot
from dsft.checkpoint import lease
from dsft.compose import Composed
from dsft.config import Slurm
from dsft.snapshot import Snapshot
from dsft.telemetry.record import Status, read_status, write_status

JOB = "slurm/job.json"


def check(composed: Composed) -> None:
    """Refuse what this cluster would. Raises ValueError; writes nothing."""
    submit.check(request(composed, None, _folder(composed)), _folder(composed))


def is_dry(composed: Composed) -> bool:
    """Whether the batch script is to be printed, and nothing submitted."""
    return composed.start.kind == "slurm" and _asked(composed).dry_run


def show(composed: Composed) -> None:
    """Print the batch script."""
    run_dir = _folder(composed)
    asked = request(composed, snapshot.of(run_dir), run_dir)
    print(shown(submit.script(asked, batch_step(composed, str(run_dir)), run_dir / "slurm")))


def dispatch(composed: Composed, create: Callable[[], None]) -> int:
    """Submit the run, and follow it if asked to; returns the exit code. create: makes the run folder.

    The job is held until its folder is whole. Raises ValueError where SLURM refuses it; nothing is written then.
    """
    launcher, run_dir = _asked(composed), _folder(composed)
    code = snapshot.of(run_dir)
    asked, command = request(composed, code, run_dir), batch_step(composed, str(run_dir))
    job_id = submit.submit(asked, command, run_dir / "slurm")
    try:
        if composed.run.resume.takeover:  # in the name of the job, whose ranks have it then
            lease.claim(run_dir / "checkpoints", {SUPERVISED: "1", "SLURM_JOB_ID": job_id}, takeover=True)
        create()
        snapshot.copy(code)
        queued(run_dir, job_id, code)
        cluster.ask("scontrol", "release", job_id)
    except cluster.ClusterError as error:
        raise ValueError(
            f"job {job_id} is held and could not be released: {error}; scontrol release {job_id} starts it, scancel "
            f"{job_id} ends it"
        ) from error
    except BaseException:
        cluster.ask("scancel", job_id)
        raise
    watch = in_a_line(f"tail -F {run_dir}/logs/rank-0.log")
    print(f"submitted    job {job_id}; watch: {watch}; cancel: scancel {job_id}", flush=True)
    if not launcher.wait:
        return DONE
    try:
        return follow(job_id, run_dir)
    except KeyboardInterrupt:
        say(f"dsft: job {job_id} goes on by itself; scancel {job_id} ends it")
        return DONE


def _asked(composed: Composed) -> Slurm:
    launcher = composed.run.launcher
    if not isinstance(launcher, Slurm):
        raise ValueError(f"launcher={launcher.name} must have the keys of launcher=slurm for a SLURM job; add them")
    return launcher


def _folder(composed: Composed) -> Path:
    return Path(composed.run.run_dir).absolute()


def batch_step(composed: Composed, what: str) -> list[str]:
    """What the batch script runs. what: the run folder, or SWEEP:FIRST for a task of an array."""
    launcher = _asked(composed)
    numbers = map(str, [launcher.nodes, composed.start.devices, launcher.notice_s, int(launcher.elastic)])
    command = [sys.executable, "-u", "-m", "dsft_launchers.supervise", what, *numbers]
    return command + shlex.split(launcher.prefix)


def request(composed: Composed, code: Snapshot | None, place: Path) -> submit.Request:
    """What is asked of SLURM for a run. place: the folder that names the job."""
    launcher = _asked(composed)
    devices = composed.start.devices
    own = any(gpus.asks_for_gpus(option, value) for option, value in launcher.extra.items())
    return submit.Request(
        name=submit.job_name(place), nodes=launcher.nodes, devices=devices,
        gpus=devices if composed.start.place.gpus and not own else 0, partition=_text(launcher.partition),
        account=_text(launcher.account), qos=_text(launcher.qos), time=_text(launcher.time),
        memory=_text(launcher.memory), cpus=launcher.cpus, constraint=launcher.constraint, exclude=launcher.exclude,
        reservation=_text(launcher.reservation), extra=launcher.extra,
        setup=[*launcher.setup, *snapshot.environment(code)], notice_s=launcher.notice_s, elastic=launcher.elastic,
        kind=None if launcher.gpus in gpus.UNTYPED else str(launcher.gpus), bound=launcher.bind_gpus,
    )  # fmt: skip


def _text(value: str | int | None) -> str | None:
    return None if value is None else str(value)


def refuse_second(run_dir: Path) -> None:
    """Refuse a folder that a job of SLURM still has or waits for; none is looked for where no SLURM answers."""
    job_id = job_of(run_dir)
    if job_id is None or not cluster.answers():
        return
    try:
        now = cluster.job(job_id)
    except cluster.ClusterError as error:
        raise ValueError(
            f"run_dir {run_dir} is job {job_id}'s, and SLURM does not answer: {error}; try again, or go on without its "
            "word by resume.takeover=true"
        ) from error
    if now is not None and not now.over:
        raise ValueError(
            f"run_dir {run_dir} is job {job_id}'s, which is {now.state}; wait for it, scancel {job_id}, or choose "
            "another run_dir"
        )


def job_of(run_dir: Path) -> str | None:
    """The job, or the task of an array, that was last given this run; None if none ever was.

    Raises ValueError for a file that holds anything but such a number: it would be handed to SLURM's commands.
    """
    path = run_dir / JOB
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))["job"]
    except (ValueError, KeyError, TypeError) as error:
        said = error
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", str(said)):
        raise ValueError(
            f"{path} of {owners.owner_of(path)} is damaged: it must hold the number of a job, as 123 or 123_4, got "
            f"{str(said)[:80]!r}; remove it if squeue shows no job of this run"
        )
    return str(said)


def queued(run_dir: Path, job_id: str, code: Snapshot | None) -> None:
    """Leave the state queued, and then the job's id: a folder that has it lacks nothing."""
    before = read_status(run_dir) or Status(
        state="queued", step=0, attempts=0, checkpoint=None, reason=None, wandb_id=None
    )
    write_status(run_dir, replace(before, state="queued", reason=f"SLURM job {job_id}"))
    (run_dir / JOB).parent.mkdir(exist_ok=True)
    copy = {"code": None} if code is None else {"code": code.place.name, "code_digest": code.digest}
    replace_text(run_dir / JOB, json.dumps({"job": job_id, **copy}) + "\n")
