"""python -m dsft.verify RUN RESULT: reads a result back in a fresh process, and compares it with the live model.

A run starts this by itself when it has written its result, and leaves what was found in RUN/adapter/verified.json.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft_launchers.place import MEETING
from dsft_launchers.verdict import WAY_OUT, DivergedError

from dsft.compared import ROUNDED, compare, digest_of
from dsft.config import Run
from dsft.folder import state
from dsft.learned import FLAG, learned
from dsft.published import FOUND, PROBE, note
from dsft.searched import own_folder_last, python
from dsft.telemetry.meter import available_bytes, host_memory_bytes
from dsft.wording import refuse

if TYPE_CHECKING:
    import torch

    from dsft.data.open import Dataset
    from dsft.engine.assemble import Session
    from dsft.engine.progress import Watch

DIFFERENT = 3
READS = 2
"""Starts of the fresh process on the CPU, if a signal kills it."""
GROWTH, ROOM = 1.2, 2**31
"""What it takes of a GPU: the base, of which one weight at a time is there twice, a context, and one forward pass."""
START_S, BYTES_PER_S, OPERATIONS_PER_S = 45.0, 20e6, 5e9
"""What the fresh process may take: its imports on a busy machine, and the base, read and computed on a slow one."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", MEETING)


Phase = Callable[[str, float], AbstractContextManager[None]]
"""Limits what happens inside: its name, and the seconds that it may take."""


@dataclass(frozen=True)
class Ended:
    """The end of the fresh process. code: None if it ran out of time; said: its last line; found: what it wrote."""

    code: int | None
    said: str = ""
    found: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    """Compare and write what was found; DIFFERENT if the result is not the model that was trained."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    given = [word for word in sys.argv[1:] if word != FLAG]
    if len(given) != 2 or not (Path(given[1]) / PROBE).is_file():
        return refuse(
            ValueError(
                "dsft verify takes RUN and the folder of a result that RUN is just writing; a run calls it by itself, "
                "see RUN/adapter/verified.json"
            )
        )
    with contextlib.suppress(OSError, AttributeError):  # without that call it ends by itself, later
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    own_folder_last(inherited=True)
    run_dir, result = map(Path, given)
    found = compare(learned(run_dir, trust_remote_code=FLAG in sys.argv), result)
    note(result, found)
    return 0 if found["same"] else DIFFERENT


def _unlimited(name: str, seconds: float) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


def prove(
    session: "Session", data: "Dataset", run_dir: Path, result: Path, digest: str, watch: "Watch",
    *, phase: Phase = _unlimited, why_not: str | None = None,
) -> None:  # fmt: skip
    """Have a fresh process read the result back and compare it with the live model. Collective.

    What was found is noted in the result: it is the same, or, by why_not, which foreseen has given before the first
    step, the base cannot be loaded for a comparison; then only the tensors in its files are compared. Raises
    RuntimeError for everything else.
    """
    from dsft.engine.probe import probe_row, write_probe

    world, run, shape, (parameters, _) = session.world, session.run, session.model.config, _planned(run_dir)
    row = probe_row(shape.get_text_config(), data.train, run.train.max_length, run.method.positions)
    needed = base_bytes(run, parameters)
    seconds = START_S + needed / BYTES_PER_S + _operations(session, parameters, len(row.tokens)) / OPERATIONS_PER_S
    with phase("verification", seconds):
        if why_not is not None:
            wrong = world.gather(_as_written(result, digest, why_not) if world.rank == 0 else None)[0]
            if wrong is not None:
                raise RuntimeError(_unpublished(result, wrong))
            watch.event("unverified", 0, {"reason": why_not})
            return
        if short := world.gather(_short(needed))[0]:
            raise RuntimeError(_unpublished(result, short))
        write_probe(session, row, result / PROBE, digest)
    words = [str(run_dir), str(result), *([FLAG] if session.files.trust_remote_code else [])]
    ended, card = Ended(None), world.gather(_card(world.device, needed))[0]
    for visible in [*filter(None, [card]), *[""] * READS]:
        with phase("verification", seconds):
            mine = _in_a_fresh_process(words, result, seconds, visible) if world.rank == 0 else Ended(None)
            ended = world.gather(mine)[0]
        if _settled(ended, visible):
            break
    if world.rank == 0:
        (result / PROBE).unlink(missing_ok=True)
    if why := ended.found.get("diverged"):
        step = state(run_dir).get("step")
        raise DivergedError(f"after {f'step {step}, the last' if step else 'the last step'}, {why}; {WAY_OUT}")
    if ended.code != 0 or ended.found.get("same") is not True:
        raise RuntimeError(_unpublished(result, _why(ended, seconds)))
    watch.event("verified", 0, {})


def _card(device: "torch.device", needed: int) -> str:
    """What CUDA_VISIBLE_DEVICES holds for the reader: this rank's GPU, if a base of so many bytes fits beside what is
    there; "" if it is to compute on the CPU.
    """
    import torch

    if device.type != "cuda":
        return ""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(device)[0] < GROWTH * needed + ROOM:
        return ""
    visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
    return visible[device.index] if visible else str(device.index)


def _settled(ended: Ended, visible: str) -> bool:
    """Return True if the reader has found something out, or failed in a way in which the next one would fail too.

    On a GPU, visible, it may have failed of that: of its memory, or as it is for one process alone.
    """
    return ended.code in (0, DIFFERENT) or (not visible and (ended.code is None or ended.code >= 0))


def _in_a_fresh_process(words: list[str], result: Path, seconds: float, visible: str) -> Ended:
    """Start the reader and wait for its end; a signal to this process group does not reach it."""
    alone = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    command = [*python("dsft.verify"), *words]
    try:
        done = subprocess.run(
            command, env={**alone, "CUDA_VISIBLE_DEVICES": visible}, timeout=seconds, start_new_session=True,
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Ended(None)
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    try:
        found = json.loads((result / FOUND).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    return Ended(done.returncode, said[-1][:500] if said else "", found)


def _why(ended: Ended, seconds: float) -> str:
    if ended.code is None:
        return f"the process that read it back was not done after {seconds:.0f} s"
    if ended.code == DIFFERENT:
        found = ended.found.get("different")
        return f"read back in a fresh process, it is not the model that was trained: {found}"
    if ended.code < 0:
        return f"the process that read it back was killed by {_signal(-ended.code)} {READS} times"
    return f"the process that read it back ended with {ended.code}: {ended.said}"


def _signal(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _unpublished(result: Path, why: str) -> str:
    return (
        f"{result} is not published as the run's result: {why}; start the run again, which writes it anew, or with "
        "checkpoint.verify_result=false"
    )


def _as_written(result: Path, digest: str, why_not: str) -> str | None:
    """What is wrong with the files of a result whose base cannot be loaded, None if nothing; why_not is noted."""
    try:
        for path in sorted(result.glob("*.json")):
            json.loads(path.read_text(encoding="utf-8"))
        found, tensors = digest_of(result)
    except Exception as error:  # safetensors' and the file system's, whatever a torn file leads to
        return f"its files cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"
    if found != digest:
        return f"its files hold other tensors than were trained: digest {found}, expected {digest}"
    note(result, {"same": None, "why": why_not, "digest": found, "tensors": tensors})
    return None


def base_bytes(run: Run, parameters: int) -> int:
    """Bytes of a base of so many parameters as the fresh process loads it."""
    return parameters * (4 if run.train.precision == "fp32" else 2)


def _planned(run_dir: Path) -> tuple[int, int]:
    """Parameters of the base, and the bytes of memory that a rank takes."""
    plan = json.loads((run_dir / "plan.json").read_text())
    return plan["parameters"]["total"], plan["memory"]["total"]


def _operations(session: "Session", parameters: int, tokens: int) -> float:
    """Multiplications and additions of what the fresh process computes."""
    again = ROUNDED if session.run.train.precision == "bf16" else 0  # where the first pass leaves the bound
    return 2.0 * parameters * tokens * (1 + again)


def foreseen(session: "Session", run_dir: Path, watch: "Watch") -> str | None:
    """Why the base cannot be loaded for a comparison once the run has ended; None if it can. Collective.

    Asked, and said, before the first step.
    """
    world, here = session.world, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    parameters, of_a_rank = _planned(run_dir)
    taken = here * of_a_rank if world.device.type == "cpu" else 0
    found = unproven(session.files.init, base_bytes(session.run, parameters), host_memory_bytes(), taken)
    why_not = world.gather(found)[0]
    if why_not is not None and session.run.checkpoint.verify_result:
        watch.event("unverifiable", 0, {"reason": why_not})
    return why_not


def unproven(init: str, needed: int, memory: int | None, taken: int) -> str | None:
    """Why no result of such a run can be compared with its model; None if one can.

    init: of the base; needed: its bytes; memory: of this machine, None if unknown; taken: of that, by the run itself.
    """
    if init == "random":
        return "the base is random, so there is nothing to load it from"
    if memory is not None and needed > (memory - taken) / 2:
        gib = [f"{each / 2**30:.1f}" for each in (needed, memory, taken)]
        return f"the base takes {gib[0]} GiB, and this machine has {gib[1]}, of which the run takes {gib[2]}"
    return None


def _short(needed: int) -> str | None:
    """What is wrong if a base of so many bytes, that had room before the first step, has none any more."""
    free = available_bytes()
    if free is None or GROWTH * needed <= free:
        return None
    return (
        f"the base takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free, and before the first step it had room; "
        "end what else runs on that machine"
    )


if __name__ == "__main__":
    sys.exit(main())
