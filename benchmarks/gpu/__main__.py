"""What a machine with a GPU is asked in a few minutes; docs/gpu.md says how to read what it answers.

python -m benchmarks.gpu [--budget 480] [--out FOLDER] [--only A2,E] [--cpu] [--plant A2=hang]

Each check is a process group with a limit of its own; FOLDER/checks.jsonl gets a line as soon as one has ended, and
FOLDER/table.md is written last, also after SIGTERM or Ctrl-C. 0: all that ran is as it must be; 1: something is not;
2: this machine cannot run them, one line says why; 143, 130: it was asked to stop.
"""

import argparse
import math
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.able import Found, look, refusal
from benchmarks.gpu.listed import CHECKS, wanted
from benchmarks.gpu.runner import RESERVE_S, Outcome, Stop, environment, run
from benchmarks.gpu.table import as_it_must, page
from benchmarks.machine import commit

ROOT = Path(__file__).parents[2]
FAULTS = ("hang", "die")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Of the command line. Raises ValueError, one line, for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds until the table is there; 30 or more")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder; what is in it is overwritten")
    parser.add_argument("--only", default=",".join(CHECKS), help=f"of {','.join(CHECKS)}, run in this order")
    parser.add_argument("--cpu", action="store_true", help="rehearse: the same checks on a CPU, of tiny sizes")
    parser.add_argument(
        "--plant", default="", help="with --cpu, e.g. A2=hang or all=hang+die: also check it with faults"
    )
    parser.add_argument("--table", type=Path, help="also write the table here")
    args = parser.parse_args(argv)
    args.only = [name for name in args.only.split(",") if name]
    args.plant = _plants(args.plant, args.only)
    if unknown := sorted({*args.only, *args.plant} - set(CHECKS)) or ([] if args.only else ["nothing"]):
        raise ValueError(f"--only must be of {', '.join(CHECKS)}, got {', '.join(unknown)}")
    if not 30 <= args.budget < math.inf:
        raise ValueError(f"--budget must be 30 s or more, got {args.budget:g}")
    if args.plant and not args.cpu:
        raise ValueError("--plant must go with --cpu, got it alone; on a GPU no check hangs on purpose")
    return args


def _plants(text: str, only: Sequence[str]) -> dict[str, str]:
    """Name of a check -> faults, comma-separated, from NAME=FAULT+FAULT,NAME=FAULT."""
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, _, faults = part.partition("=")
        if unknown := [fault for fault in faults.split("+") if fault not in FAULTS]:
            raise ValueError(f"--plant must be NAME=FAULT of {', '.join(FAULTS)}, got {part} ({unknown[0]!r})")
        found |= dict.fromkeys(only if name == "all" else [name], faults.replace("+", ","))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Refuse or check, and write the table."""
    begun = time.monotonic()
    words = list(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory(prefix="dsft-gpu-") as scratch:
        try:
            args = arguments(words)
            env = environment(Path(scratch), ROOT, cpu=args.cpu)
            found = look(env)
            if why := refusal(found, cpu=args.cpu):
                raise ValueError(why)
            args.out.mkdir(parents=True, exist_ok=True)
        except (ValueError, OSError) as error:
            print(f"dsft: {error}", file=sys.stderr)
            return 2
        return _checked(args, words, env, found, begun)


def _checked(args: argparse.Namespace, words: list[str], env: Mapping[str, str], found: Found, begun: float) -> int:
    folder: Path = args.out.resolve()
    outcomes: list[Outcome] = []
    checks = wanted(args.only, cpu=args.cpu, free_gib=found.free_gib, plants=args.plant)
    with Stop().bound() as stop:
        for outcome in run(checks, until=begun + args.budget, folder=folder, env=env, stop=stop):
            outcomes.append(outcome)
            print(f"{outcome.check} {outcome.state} {outcome.seconds:g} s {outcome.why}".rstrip(), flush=True)
        text = page(outcomes, _head(args, words, found.torch, found.name, begun))
        for path in filter(None, (folder / "table.md", args.table)):
            path.write_text(text)
        print(text, flush=True)
    if stop.by:
        return 128 + signal.Signals[stop.by]
    return 0 if all(map(as_it_must, outcomes)) else 1


def _head(args: argparse.Namespace, words: Sequence[str], torch: str, gpu: str, begun: float) -> list[str]:
    """Where, with what, how long."""
    ran = "**No GPU ran: this is the rehearsal on a CPU, with tiny sizes.** " if args.cpu else ""
    place = "a CPU" if args.cpu else gpu
    return [
        "# The rehearsal of the GPU checks" if args.cpu else "# The GPU checks",
        "",
        f"{ran}`{shlex.join(['python', '-m', 'benchmarks.gpu', *words])}`",
        f"on {place}, {os.cpu_count()} cores, torch {torch}, commit {commit()}; {time.monotonic() - begun:.0f} s of "
        f"{args.budget:g}, of which {RESERVE_S:g} are kept for the end. Bold is not as it must be.",
    ]


if __name__ == "__main__":
    sys.exit(main())
