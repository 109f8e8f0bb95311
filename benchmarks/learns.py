"""What each method learns at its own settings: SmolLM2-135M, sums of two numbers, before and after.

python -m benchmarks.learns [--methods a,b] [--steps 60] [--resume] [overrides]

Appends one line per method to benchmarks/results/methods-smollm2.jsonl as it ends, so that a run that was killed goes
on: a method that has a line of the same code and length is not run again. Then the page and the chart are written.
Overrides make a row apart, under the methods' own settings: `--methods full,pissa optim.lr=1e-4`. With --speed only
tokens/s are measured anew, over a few steps, where the runs before had other work beside them.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.learns_text import CHART, PAGE, chart, page
from benchmarks.machine import here
from dsft.wording import OWN_CONF

if TYPE_CHECKING:
    from dsft.data.open import Dataset
    from dsft.engine.assemble import Session

ROOT = Path(__file__).parents[1]
LINES = ROOT / "benchmarks" / "results" / "methods-smollm2.jsonl"
METHODS = sorted(path.stem for path in (OWN_CONF / "method").glob("*.yaml"))
CODE = ("dsft", "conf", "launchers", "benchmarks", ":(exclude)benchmarks/results")
"""What decides the numbers."""

HELD_OUT = 48
TIMED = 5
"""Steps where only speed is asked for; the first is left out."""

TASK = (
    "{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 2, operators: ['+'], allow_parentheses: false, "
    "allow_negation: false}"
)


def words(method: str, steps: int, more: Sequence[str] = ()) -> list[str]:
    """Overrides of one run: all that is not said is the method's default, its rate too. more: what differs."""
    return [
        "model=smollm2_135m", f"method={method}", "data=reasoning_gym", "data.task=basic_arithmetic",
        f"data.config={TASK}", "data.size=4000", f"data.eval_size={HELD_OUT}", "data.system='Add the numbers.'",
        f"train.steps={steps}", "train.global_batch_size=16", "train.max_length=256", "optim.schedule=linear",
        f"optim.warmup_steps={steps // 12}", "strategy=single", "launcher=local", "launcher.devices=1", "tracker=[]",
        *more,
    ]  # fmt: skip


def opened(method: str, steps: int, more: Sequence[str]) -> "tuple[Session, Dataset]":
    """Model and data of one run. Raises ValueError where these settings cannot be."""
    import torch

    from dsft.comm.world import World
    from dsft.compose import compose
    from dsft.data.open import open_data
    from dsft.engine.assemble import assemble

    run = compose(words(method, steps, more)).run
    run.method.check(steps)
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=run.train.max_length, seed=run.train.seed)
    return assemble(run, files, World(0, 1, 0, torch.device("cpu")), steps), data


def trained(session: "Session", data: "Dataset", steps: int, total: int) -> dict[str, list[float]]:
    """Loss, tokens and seconds of the first steps of total."""
    from dsft.engine.loop import step_batches
    from dsft.engine.optimizers import rate
    from dsft.engine.step import train_step

    found: dict[str, list[float]] = {"losses": [], "tokens": [], "seconds": []}
    for step in range(1, steps + 1):
        started = time.perf_counter()
        batches = step_batches(session, data, step)[1]
        result = train_step(session, batches, step, rate(session.run.optim, step, total))
        found["losses"].append(result.loss)
        found["tokens"].append(result.tokens)
        found["seconds"].append(time.perf_counter() - started)
    return found


def learn(session: "Session", data: "Dataset", steps: int) -> dict[str, Any]:
    """Evaluate, train, evaluate."""
    from dsft.engine.evaluate import evaluate
    from dsft.models.census import census
    from dsft.telemetry.meter import peak_memory_bytes

    run = session.run
    before = evaluate(session, data).values
    _forget_peak()
    found = trained(session, data, steps, steps)
    peak = peak_memory_bytes(session.world.device)
    after = evaluate(session, data).values
    counts = census(session.model, session.anatomy)
    state = run.strategy.export_state()
    return {
        "lr": run.optim.lr,
        "loss_before": before["eval/loss"],
        "loss_after": after["eval/loss"],
        "accuracy_before": before["eval/accuracy"],
        "accuracy_after": after["eval/accuracy"],
        "trainable": counts["trainable"],
        "total": counts["total"],
        "state_bytes": sum(value.nbytes for name, value in state.items() if not name.startswith("param/")),
        "tokens_per_s": speed_of(found),
        "peak_memory_bytes": peak,
        "precision": run.train.precision,
        "losses": [round(loss, 5) for loss in found["losses"]],
        "steps_s": sum(found["seconds"]),
    }


def speed_of(found: Mapping[str, Sequence[float]]) -> float:
    """Tokens per second of all steps but the first."""
    return sum(found["tokens"][1:]) / sum(found["seconds"][1:])


def one(method: str, steps: int, more: Sequence[str], *, timed: bool) -> dict[str, Any]:
    """What a line says of a run; {"refused": reason} where these settings cannot be."""
    begun = time.monotonic()
    try:
        session, data = opened(method, steps, more)
    except ValueError as error:
        return {"refused": str(error)}
    if timed:
        return {"tokens_per_s": speed_of(trained(session, data, TIMED, steps))}
    return {**learn(session, data, steps), "seconds": time.monotonic() - begun}


def _forget_peak() -> None:
    """Let the peak of this process be what it holds now: generating answers takes more than training does."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def commit() -> str:
    """The last commit that changed the code, with + where it has changed since."""
    said = [
        subprocess.run(["git", *words, "--", *CODE], cwd=ROOT, capture_output=True, text=True, check=False).stdout
        for words in (["log", "-1", "--format=%h"], ["status", "--porcelain"])
    ]
    return (said[0].strip() or "unknown") + ("+" if said[1].strip() else "")


def lines() -> list[dict[str, Any]]:
    """What was measured so far, in the order of time."""
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.is_file() else []


def missing(wanted: list[str], known: list[dict[str, Any]], code: str | None, **asked: Any) -> list[str]:
    """Those of wanted that have no line of what is asked (steps, changed, timed) and of this code; None: of any."""
    unsaid = {"changed": "", "timed": False}
    alike = (line for line in known if all({**unsaid, **line}[key] == value for key, value in asked.items()))
    there = {line["method"] for line in alike if code in (None, line["commit"])}
    return [method for method in wanted if method not in there]


def arguments() -> argparse.Namespace:
    """Of the command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="of these; empty: only write page and chart")
    parser.add_argument("--steps", type=int, default=60, help="at least 2")
    parser.add_argument("--resume", action="store_true", help="keep lines of other code, too")
    parser.add_argument("--speed", action="store_true", help="only tokens/s, over a few steps")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="that differ from the method's own settings")
    args = parser.parse_intermixed_args()
    args.wanted = [name for name in args.methods.split(",") if name]
    if unknown := sorted(set(args.wanted) - set(METHODS)):
        parser.error(f"--methods must be of {', '.join(METHODS)}, got {', '.join(unknown)}")
    if args.steps < 2:
        parser.error(f"--steps must be 2 or more, got {args.steps}")
    return args


def main() -> int:
    """Run what is missing, write page and chart; 1 if a method ended otherwise than by a result."""
    args = arguments()
    if args.one:
        print(json.dumps(one(args.one, args.steps, args.overrides, timed=args.speed)))
        return 0
    failed = False
    asked = {"changed": " ".join(args.overrides), "steps": args.steps, "timed": args.speed}
    for method in missing(args.wanted, lines(), None if args.resume else commit(), **asked):
        command = [sys.executable, "-m", "benchmarks.learns", "--one", method, "--steps", str(args.steps)]
        command += [*args.overrides, *["--speed"] * args.speed]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        failed |= done.returncode != 0
        if done.returncode != 0:
            print(f"{method} ended with {done.returncode}: {done.stderr[-1500:]}", file=sys.stderr, flush=True)
            continue
        told = {"method": method, **asked, "commit": commit(), "machine": here()}
        with LINES.open("a") as out:
            out.write(json.dumps({**told, **json.loads(done.stdout.splitlines()[-1])}) + "\n")
        print(f"{method} {done.stdout.splitlines()[-1][:300]}", flush=True)
    measured = [line for line in lines() if line["steps"] == args.steps]
    PAGE.write_text(page(measured, args.steps))
    CHART.write_text(chart(measured))
    print(PAGE.read_text())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
