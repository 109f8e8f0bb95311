"""python -m dsft.job RUN: one process of a run, from its folder alone; the launchers start it on every rank."""

import contextlib
import math
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft_launchers import copied, verdict
from dsft_launchers.attempt import SUPERVISED
from dsft_launchers.codes import CRASHED, DIVERGED, DONE, STOPPED, USER_ERROR
from dsft_launchers.join import ON_CPUS, VISIBLE, resolve
from dsft_launchers.shown import say

from dsft import examined, folder, installed, published
from dsft.basis import Basis, require_code_on_ranks
from dsft.compose import load_yaml, read
from dsft.ending import Attempt, crashed, note
from dsft.entry import collect_again, enter, lose_lines
from dsft.searched import own_folder_last

if TYPE_CHECKING:
    from dsft.checkpoint.lease import Lease
    from dsft.comm.world import World
    from dsft.config import Run
    from dsft.data.open import Dataset
    from dsft.engine.assemble import Session
    from dsft.engine.patience import Patience
    from dsft.engine.progress import Progress
    from dsft.engine.stop import StopFlag
    from dsft.models.files import ModelFiles
    from dsft.recorder import Recorder

DAY_S, HALF_AN_HOUR_S = 86400.0, 1800.0
"""Limits of a collective: where train.hang_after limits every phase, as torch's own half hour would cut long ones
short; and where it does not, torch's default for gloo."""
TRACKER_S, TOKENISING_S = 120.0, 7200.0
"""Of opening the trackers (wandb waits for its server for up to 90 s), and data that are in no node's token cache."""


def main() -> int:
    """Run the rank that the environment names; a task of srun first learns which it is."""
    os.environ.update(resolve("auto", os.environ, devices="auto", nodes=1).variables)
    code = guarded(Path(sys.argv[1]))
    return DONE if code == STOPPED and SUPERVISED in os.environ else code


def guarded(run_dir: Path) -> int:
    """Work, and turn what happened into the exit code; a crash leaves its traceback on stderr and in status.json."""
    from dsft.checkpoint.lease import LeaseLostError

    attempt = Attempt()
    lose_lines()
    try:
        return work(run_dir, attempt)
    except verdict.CannotBeginError as error:  # the cluster's state, not an error of this process: no traceback
        say(f"{verdict.CANNOT_BEGIN}{error}")
        note(run_dir, attempt, f"cannot begin: {error}")
    except verdict.RefusedError as error:  # the user decides how it goes on
        say(f"{verdict.REFUSED}{error}")
        note(run_dir, attempt, str(error))
        return USER_ERROR
    except verdict.DivergedError as error:  # the same command would end so again
        say(f"{verdict.DIVERGES}{error}")
        note(run_dir, attempt, str(error), "diverged")
        return DIVERGED
    except LeaseLostError as error:  # the folder is another's now: say so, write nothing
        say(f"dsft: {error}")
    except Exception as error:  # the last fence: whatever went wrong is this attempt's end
        crashed(run_dir, attempt, error)
    return CRASHED


def work(run_dir: Path, attempt: Attempt) -> int:
    """Resume or begin, train, write the result, and return the exit code. Collective over the ranks."""
    _require_submitted(run_dir)
    from dsft.comm.hello import greet
    from dsft.comm.meeting import LIMIT_S
    from dsft.comm.room import require_room
    from dsft.comm.world import join, leave
    from dsft.data.order import total_steps
    from dsft.engine.limits import BYTES_PER_S, limits_of
    from dsft.engine.patience import Patience
    from dsft.engine.progress import STOPPED as ASKED
    from dsft.engine.stop import StopFlag
    from dsft.models.progress import quiet
    from dsft.recorder import Recorder

    quiet()
    run = _asked(run_dir)
    stop = StopFlag(run.train.max_minutes)
    stop.bind()
    world = join(DAY_S if math.isfinite(run.train.hang_after) else HALF_AN_HOUR_S)
    margin_s = run.train.hang_after if world.size > 1 else math.inf  # one process waits for nobody

    with Patience(margin_s, limits_of(run_dir, world.device.type), leaves=partial(note, run_dir, attempt)) as patience:
        with patience.phase("greeting", LIMIT_S):  # which has a limit of its own
            paged = run.optim.name.startswith("paged")
            require_room(world, folder.planned(run_dir), wanted=str(run.launcher.gpus), paged=paged)
            hello = greet(world, installed.versions(), socket.gethostname())
        with patience.phase("data", _data_s(run_dir)):
            files, data = find(run, world, hello, known=folder.provenance(run_dir))
            run = replace(run, objective=run.objective.knowing(data.train.columns))
        with patience.phase("base digest", files.nbytes / BYTES_PER_S):
            base = Basis(files, run_dir, world)
        total = total_steps(run.train, len(data.train))
        with _held(run_dir, world, attempt) as holder:
            with patience.phase("trackers", TRACKER_S):
                recorder = Recorder(run, run_dir, world, total, attempt.lease, hello)
                world.barrier()
            with recorder:
                attempt.number = recorder.attempt
                if holder is not None and recorder.overtakes:
                    recorder.event("takeover", 0, {"holder": holder})
                at = _train(run_dir, base, data, attempt, recorder, total=total, stop=stop, patience=patience)
                recorder.end(at, data, attempt.keeper.saved if attempt.keeper else recorder.saved)
            with patience.phase("leave", 0.0):
                run.strategy.close()
                leave()
    stop.ignore()
    return STOPPED if at.state == ASKED else DONE


def _train(
    run_dir: Path, base: Basis, data: "Dataset", attempt: Attempt, recorder: "Recorder",
    *, total: int, stop: "StopFlag", patience: "Patience",
) -> "Progress":  # fmt: skip
    """Load, resume, train, and write the result where the run was not stopped before; where it is then. Collective."""
    from dsft.engine import determinism
    from dsft.engine.assemble import assemble
    from dsft.engine.limits import BYTES_PER_S
    from dsft.engine.loop import fit
    from dsft.engine.progress import STOPPED as ASKED
    from dsft.engine.resume import back_to_best, keeper_for, resume
    from dsft.engine.scored_once import score_once
    from dsft.engine.stop import in_vain
    from dsft.verify import foreseen

    run, world, lease = recorder.run, recorder.world, attempt.lease
    with patience.phase("loading", patience.limits.loading_s):
        session = assemble(run, base.files, world, total, family=examined.family_on_ranks(base.files, world))
        asked = next(filter(None, world.gather(stop.reason)), None)
    with patience.phase("reference", patience.limits.forward_s(2 * int(data.train.lengths.sum()))):
        data = score_once(session, data)
    if session.compiler and run.train.compile == "auto":
        recorder.event("compile", 0, {"steps": total})
    if asked is not None:
        return recorder.given_up(in_vain(asked))
    who = folder.identity(run_dir, load_yaml(run_dir / "config.yaml"))
    with patience.phase("resume", 3 * patience.limits.state_s):
        at = attempt.at = resume(session, run_dir, who, lease, total, recorder)
    attempt.started = at.step
    recorder.begin(at.step)
    recorder.event("assembled", at.step, {})
    if at.over and at.step < total:
        recorder.event("early_stop_holds", at.step, {})
    why_not = foreseen(session, run_dir, recorder)
    attempt.keeper = keeper = keeper_for(session, run_dir, who, lease, saved=at.step)
    base.read(partial(_tell_base, run_dir, attempt) if lease is not None else None)
    attempt.training = True
    collect_again()
    with determinism.told(lambda name: recorder.event("not_deterministic", at.step, {"operator": name})):
        at = fit(session, data, recorder, stop, keeper, at, patience=patience)
    attempt.training = False
    if at.state != ASKED:
        with patience.phase("base digest", base.files.nbytes / BYTES_PER_S):
            recorder.event("base_digest", at.step, {"digest": base.settle()})
        with patience.phase("resume", 3 * patience.limits.state_s):
            back_to_best(session, run_dir, who, lease, at, recorder)
        give_result(session, data, run_dir, lease, recorder, patience=patience, why_not=why_not)
    elif run.checkpoint.every and keeper.saved != at.step:
        raise RuntimeError(f"stopped at step {at.step}, which could not be saved; step {keeper.saved} was")
    return at


def _tell_base(run_dir: Path, attempt: Attempt, digest: str) -> None:
    """Note the digest of the base in provenance.json, and in the checkpoints from now on. Called beside the steps."""
    assert attempt.lease is not None
    assert attempt.keeper is not None
    attempt.lease.check()
    folder.note_base(run_dir, digest)
    saver = attempt.keeper.saver
    saver.identity = replace(saver.identity, base_digest=digest)


def _data_s(run_dir: Path) -> float:
    """Return the seconds that opening the data may take: more where this node has to tokenise them."""
    from dsft.data.cache import cache_root, token_folder
    from dsft.engine.limits import BYTES_PER_S

    known = folder.provenance(run_dir)
    inputs, day = known.get("data_digest"), known.get("template_date")
    there = token_folder(cache_root(), inputs, day) if inputs else None
    if there is None or not there.is_dir():
        return TOKENISING_S
    return sum(path.stat().st_size for path in there.rglob("*.npy")) / BYTES_PER_S


@contextlib.contextmanager
def _held(run_dir: Path, world: "World", attempt: Attempt) -> Iterator[str | None]:
    """Hold the run folder inside, and give who held it before. Collective; rank 0 has the lease, in attempt.

    Raises RefusedError on every rank if the process of another start works on the run.
    """
    from dsft.checkpoint import lease as leases

    holder = refusal = None
    if world.rank == 0:
        try:
            attempt.lease, holder = leases.acquire(run_dir / "checkpoints", os.environ)
        except leases.HeldError as error:
            refusal = str(error)
    if refusal := world.gather(refusal)[0]:
        raise verdict.RefusedError(refusal)
    if attempt.lease is None:
        yield None
        return
    published.clear_leftovers(run_dir)
    with attempt.lease.beating():
        yield holder


def _require_submitted(run_dir: Path) -> None:
    """Raise CannotBeginError in a SLURM job whose code was changed since; the job then ends. One rank per node looks.

    The job has looked as well, and does before each start: on its own node.
    """
    if SUPERVISED not in os.environ or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if wrong := copied.imports_another(run_dir, Path(__file__).parents[1]):
        raise verdict.CannotBeginError(wrong)


def _asked(run_dir: Path) -> "Run":
    """What the folder asks for. It was checked where it was made: what is wrong here is a package that is missing."""
    try:
        run = read(run_dir)
    except ValueError as error:
        raise verdict.CannotBeginError(str(error)) from error
    if run.launcher.gpus == ON_CPUS:
        os.environ[VISIBLE] = ""
    return run


def find(
    run: "Run", world: "World", hello: Mapping[str, Any], *, known: Mapping[str, Any]
) -> "tuple[ModelFiles, Dataset]":
    """The base model and the data, which are the same on all ranks, else CannotBeginError. Collective.

    known: provenance of the run: the digest of the model's own code, which may not have changed, and the date that the
    chat template was told at the run's first start.
    """
    from dsft.comm.hello import require_same
    from dsft.data.open import open_for

    require_code_on_ranks(run.model, known, world)
    files, day = run.files(), known.get("template_date")
    seen = None if world.local_rank == 0 else world.barrier  # one rank of each node compares all tokens
    data = open_for(run, files.tokenizer(), day=day, after=seen)
    if world.local_rank == 0:
        world.barrier()
    if world.size > 1:
        base = {"base model": files.fingerprint()} if world.local_rank == 0 else {}  # a node's ranks see the same files
        require_same(world.gather({**base, "data": data.digest}), hello["ranks"])
    return files, data


def give_result(
    session: "Session", data: "Dataset", run_dir: Path, lease: "Lease | None", watch: "Recorder",
    *, patience: "Patience", why_not: str | None,
) -> None:  # fmt: skip
    """Write the result aside, have it read back, and give it its name if the run is still ours. Collective."""
    from dsft.engine.result import write_result
    from dsft.verify import prove

    with patience.phase("result", patience.limits.result_s):
        place = published.result_place(run_dir, session.world.gather(lease.token if lease else 0)[0])
        digest = write_result(session, place)
    if session.run.checkpoint.verify_result:
        prove(session, data, run_dir, place, digest, watch, phase=patience.timed, why_not=why_not)
    with patience.phase("publishing", 2 * patience.limits.result_s):
        if lease is not None:
            published.describe(place)
            lease.check(strict=True)
            published.publish(place, run_dir / "adapter")
        session.world.barrier()


if __name__ == "__main__":
    own_folder_last(inherited=True)
    enter(main)
