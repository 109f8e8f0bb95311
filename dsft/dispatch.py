"""A run handed to SLURM: a snapshot of the code, the frozen configuration, the job; and what the user sees of it."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dsft_launchers import cluster, submit
from dsft_launchers.codes import DONE
from dsft_launchers.files import replace_text
from dsft_launchers.follow import follow

from dsft import offline
from dsft.compose import Composed
from dsft.config import Slurm
from dsft.telemetry.record import Status, read_status, write_status

JOB = "slurm/job.json"
ROOT = Path(__file__).parents[1]
PARTS = ("dsft", "conf", "launchers")
"""What of a checkout a run needs."""


def check(composed: Composed) -> None:
    """Refuse what this cluster would, or a folder that another job works on. Raises ValueError; writes nothing."""
    if not _asked(composed).dry_run:
        submit.check(_request(composed, None), _folder(composed))
        _refuse_second(_folder(composed))


def dispatch(composed: Composed, create: Callable[[], None]) -> int:
    """Submit the run, and follow it if asked to; returns the exit code. create: makes the run folder.

    The job is held until its folder is whole. Raises ValueError where SLURM refuses it; nothing is written then.
    """
    launcher, run_dir = _asked(composed), _folder(composed)
    code = _named_by_content(run_dir)
    request = _request(composed, code)
    numbers = [launcher.nodes, composed.start.devices, launcher.notice_s]
    command = [sys.executable, "-u", "-m", "dsft_launchers.supervise", str(run_dir), *map(str, numbers)]
    command += shlex.split(launcher.prefix)
    if launcher.dry_run:
        print(submit.script(request, command, run_dir / "slurm"))
        return DONE
    job_id = submit.submit(request, command, run_dir / "slurm")
    try:
        create()
        _copy(code)
        _queued(run_dir, job_id, code)
        cluster.ask("scontrol", "release", job_id)
    except cluster.ClusterError as error:
        raise ValueError(
            f"job {job_id} is held and could not be released: {error}; scontrol release {job_id}"
        ) from error
    except BaseException:
        cluster.ask("scancel", job_id)
        raise
    print(f"submitted    job {job_id}; watch: tail -F {run_dir}/logs/rank-0.log; cancel: scancel {job_id}", flush=True)
    if not launcher.wait:
        return DONE
    try:
        return follow(job_id, run_dir)
    except KeyboardInterrupt:
        print(f"dsft: job {job_id} goes on by itself; scancel {job_id} ends it", file=sys.stderr)
        return DONE


def _asked(composed: Composed) -> Slurm:
    launcher = composed.run.launcher
    if not isinstance(launcher, Slurm):
        raise ValueError(f"launcher={launcher.name} must have the keys of launcher=slurm for a SLURM job; add them")
    return launcher


def _folder(composed: Composed) -> Path:
    return Path(composed.run.run_dir).absolute()


def _request(composed: Composed, code: Path | None) -> submit.Request:
    launcher = _asked(composed)
    devices = composed.start.devices
    return submit.Request(
        name=submit.job_name(_folder(composed)), nodes=launcher.nodes, devices=devices,
        gpus=devices if composed.start.place.gpus else 0, partition=_text(launcher.partition),
        account=_text(launcher.account), qos=_text(launcher.qos), time=_text(launcher.time),
        memory=_text(launcher.memory), cpus=launcher.cpus, constraint=launcher.constraint, exclude=launcher.exclude,
        reservation=_text(launcher.reservation), extra=launcher.extra,
        setup=[*launcher.setup, *_environment(code)], notice_s=launcher.notice_s, elastic=launcher.elastic,
    )  # fmt: skip


def _text(value: str | int | None) -> str | None:
    return None if value is None else str(value)


def _refuse_second(run_dir: Path) -> None:
    """A folder is one job's at a time."""
    path = run_dir / JOB
    if path.is_file():
        job_id = str(json.loads(path.read_text())["job"])
        try:
            now = cluster.job(job_id)
        except cluster.ClusterError as error:
            raise ValueError(f"run_dir {run_dir} is job {job_id}'s, and SLURM does not answer: {error}") from error
        if now is not None and not now.over:
            raise ValueError(
                f"run_dir {run_dir} is job {job_id}'s, which is {now.state}; wait for it, scancel {job_id}, or choose "
                "another run_dir"
            )


def _queued(run_dir: Path, job_id: str, code: Path | None) -> None:
    """Leave the job's id, and the state queued."""
    replace_text(run_dir / JOB, json.dumps({"job": job_id, "code": code and code.name}) + "\n")
    before = read_status(run_dir) or Status(
        state="queued", step=0, attempts=0, checkpoint=None, reason=None, wandb_id=None
    )
    write_status(run_dir, replace(before, state="queued", reason=f"SLURM job {job_id}"))


def _named_by_content(run_dir: Path) -> Path | None:
    """Where in the run folder a copy of this checkout's code belongs; None for an installed wheel."""
    if not (ROOT / ".git").exists():
        return None
    digest = hashlib.sha256()
    for file in _sources():
        digest.update(str(file).encode() + b"\0" + (ROOT / file).read_bytes())
    return run_dir / "code" / digest.hexdigest()[:12]


def _copy(place: Path | None) -> None:
    if place is None or place.is_dir():
        return
    aside = place.with_name(f".{place.name}.{os.getpid()}")
    for file in _sources():
        (aside / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, aside / file)
    aside.rename(place)


def _sources() -> list[Path]:
    """Files of the code that git tracks or would: with changes, without what is ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PARTS]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        raise ValueError(f"the code in {ROOT} must be readable by git, which copies it for the job: {said}") from error
    return sorted(Path(name) for name in filter(None, listed.split("\0")) if (ROOT / name).is_file())


def _environment(code: Path | None) -> list[str]:
    """Lines that make the job import the copy first, the user's own modules from where it was submitted last, and ask
    no hub.
    """
    own = f"{shlex.quote(str(code))}:{shlex.quote(str(code / 'launchers'))}" if code else ""
    return [
        "export PYTHONSAFEPATH=1",
        f"export PYTHONPATH={own}${{PYTHONPATH:+:$PYTHONPATH}}:{shlex.quote(os.getcwd())}",
        *offline.exports(),
    ]
