"""python -m dsft.verify RUN RESULT: reads a result back in a fresh process, and compares it with the live model.

A run starts this by itself when it has written its result, and leaves what was found in RUN/adapter/verified.json.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.compose import read
from dsft.config import Run
from dsft.imports import uncompiled
from dsft.protocols import Method
from dsft.wording import refuse

if TYPE_CHECKING:
    from dsft.data.open import Dataset
    from dsft.engine.assemble import Session
    from dsft.engine.progress import Watch

FOUND, PROBE = "verified.json", "probe.safetensors"
DIFFERENT = 3
PATIENCE_S = 1200.0
"""How long the other ranks wait for the fresh process; their collectives wait 1,800 s."""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BOUNDS = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest difference of the logits allowed, relative to the largest logit: another attention and batch layout round
otherwise (fp32 differs by 1e-6 where both are the same; bf16 has 8 bits)."""


def main() -> int:
    """Compare and write what was found; DIFFERENT if the result is not the model that was trained."""
    if len(sys.argv) != 3 or not (Path(sys.argv[2]) / PROBE).is_file():
        return refuse(
            ValueError(
                "dsft verify takes RUN and the folder of a result that RUN is just writing; a run calls it by itself, "
                "see RUN/adapter/verified.json"
            )
        )
    run_dir, result = Path(sys.argv[1]), Path(sys.argv[2])
    found = compare(read(run_dir), result)
    (result / FOUND).write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["same"] else DIFFERENT


def prove(session: "Session", data: "Dataset", run_dir: Path, result: Path, digest: str, watch: "Watch") -> None:
    """Have a fresh process read the result back and compare it with the live model. Collective.

    Raises RuntimeError if it is another one. What could not be compared is said: a base that would take more than half
    of the free memory, a random one that is nowhere to load from, a process that ended otherwise.
    """
    from dsft.data.batch import build_batch
    from dsft.engine.result import write_probe

    world = session.world
    if why_not := world.gather(_cannot(session, run_dir))[0]:
        watch.event("unverified", 0, {"reason": why_not})
        return
    write_probe(session, build_batch(data.train, [0]).tokens, result / PROBE, digest)
    code, said = world.gather(_in_a_fresh_process(run_dir, result) if world.rank == 0 else (0, ""))[0]
    if code == DIFFERENT:
        raise RuntimeError(f"{result}, read back in a fresh process, is not the model that was trained: {said}")
    if code != 0:
        watch.event("unverified", 0, {"reason": f"the process that read it ended with {code}: {said}"})
        return
    watch.event("verified", 0, {})


def _in_a_fresh_process(run_dir: Path, result: Path) -> tuple[int, str]:
    """Its exit code and what it found or said; a signal to this process group does not reach it."""
    alone = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    command = [sys.executable, "-m", "dsft.verify", str(run_dir), str(result)]
    try:
        done = subprocess.run(
            command, env={**alone, "CUDA_VISIBLE_DEVICES": ""}, timeout=PATIENCE_S, start_new_session=True,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, f"nothing after {PATIENCE_S:g} s"
    (result / PROBE).unlink()
    return done.returncode, (result / FOUND).read_text() if done.returncode == DIFFERENT else done.stderr[-500:]


def _cannot(session: "Session", run_dir: Path) -> str | None:
    if session.files.init == "random":
        return "the base is random, so there is nothing to load it from"
    parameters = json.loads((run_dir / "plan.json").read_text())["parameters"]["total"]
    needed = parameters * (4 if session.run.train.precision == "fp32" else 2)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free / 2:
        return f"the base takes {needed / 2**30:.1f} GiB of this machine's free {free / 2**30:.1f}"
    return None


def compare(run: Run, result: Path) -> dict[str, Any]:
    """The tensors of result and its logits, against those that the live model left in the probe."""
    import torch
    from safetensors import safe_open

    from dsft.checkpoint.digests import of_all, of_tensor
    from dsft.models.anatomy import dissect

    with safe_open(result / PROBE, "pt") as probe:
        expected = {name: probe.get_tensor(name) for name in probe.keys()}  # no dict
        digest = probe.metadata()["digest"]
    written = {path.name: path for path in result.glob("*.safetensors") if path.name != PROBE}
    tensors: dict[str, str] = {}
    for path in written.values():
        with safe_open(path, "pt") as file:
            tensors |= {name: of_tensor(file.get_tensor(name)) for name in file.keys()}
    found: dict[str, Any] = {"digest": of_all(tensors), "tensors": len(tensors), "expected_digest": digest}
    same = found["digest"] == digest
    model = load(run, result)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=run.train.precision == "bf16"):
        logits = model(input_ids=expected["tokens"]).logits.float()
    logits = logits[:, -expected["tokens"].shape[1] :]  # PEFT gives a soft prompt's own, too, before them
    off = float((logits - expected["logits"]).abs().max() / expected["logits"].abs().max())
    # a router whose two best experts are nearly equal may choose otherwise once bf16 has rounded: the tensors decide
    bound = None if run.train.precision == "bf16" and dissect(_base(model)).experts else BOUNDS[run.train.precision]
    return {**found, "logits_off": off, "bound": bound, "same": same and (bound is None or off <= bound)}


def _base(model: Any) -> Any:
    """The transformers model, without PEFT's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load(run: Run, result: Path) -> Any:
    """The result on its base (as training saw it), by the loader of its format (PEFT, transformers, ours), on CPU."""
    from transformers import AutoModelForCausalLM

    from dsft.engine.assemble import DTYPES
    from dsft.export import unpacked_base
    from dsft.models.anatomy import dissect

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        if run.method.whole:
            trusted = run.model.resolve().trust_remote_code
            dtype = DTYPES[run.train.precision]
            model: Any = AutoModelForCausalLM.from_pretrained(result, dtype=dtype, trust_remote_code=trusted)
            return run.method.restored(model, dissect(model), result).eval()
        return put(unpacked_base(run), result, run.method).eval()


def put(base: Any, result: Path, method: Method | None) -> Any:
    """The adapter in result on base, which is changed, by the loader of its format: PEFT's or ours.

    method: that trained it, None where nobody knows, which is then all that the format says.
    """
    with uncompiled():
        from peft import PeftModel

    from dsft.methods import native
    from dsft.models.anatomy import dissect

    anatomy = dissect(base)
    if native.holds(result):
        return native.load(base, anatomy, result)
    model = PeftModel.from_pretrained(base, result)
    return model if method is None else method.restored(model, anatomy, result)


if __name__ == "__main__":
    sys.exit(main())
