"""Peers side by side: each in a fresh process, in turns, medians as ratios to the first."""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.job import BATCH, Job
from benchmarks.machine import here

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
KEYS = ("tok_s", "tok_cpu_s", "share", "padding", "imbalance", "peak_mib")

ALIKE = {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
"""The environment of every peer."""

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""How a peer's threads wait is its own affair, and dsft has set it for the process that imported it."""

Found = dict[str, list[dict[str, Any]]]
"""Peer -> what each of its rounds gave."""


@dataclass(frozen=True)
class Peer:
    """title: its row in the table; module: run with the job's file; setting: see Job."""

    title: str
    module: str
    setting: str
    python: str = sys.executable


def arguments(doc: str | None, peers: Mapping[str, object]) -> argparse.ArgumentParser:
    """What every speed benchmark takes."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--peers", default=",".join(peers), help=f"of {', '.join(peers)}; ratios are to the first")
    parser.add_argument("--steps", type=int, default=4, help="the first is not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=GSM8K, help="rows with question and answer")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=None)
    parser.add_argument("--out", type=Path)
    return parser


def parsed(parser: argparse.ArgumentParser, peers: Mapping[str, object]) -> argparse.Namespace:
    """The arguments, checked; exits with 2 if one is wrong. Sets what all peers run under: no accelerator."""
    args = parser.parse_args()
    args.peers = args.peers.split(",")
    if unknown := [name for name in args.peers if name not in peers]:
        parser.error(f"--peers must be of {', '.join(peers)}, got {', '.join(unknown)}")
    if args.steps < 2 or args.rounds < 1:
        parser.error(f"--steps must be 2 or more and --rounds 1 or more, got {args.steps} and {args.rounds}")
    if not args.data.is_file():
        parser.error(f"--data must be a .jsonl of GSM8K, {args.data} is not there")
    os.environ |= ALIKE
    from dsft.compose import compose

    args.precision = args.precision or compose(["model=tiny"]).run.train.precision
    return args


def interleaved(peers: Mapping[str, Peer], args: argparse.Namespace, *, mode: str, ranks: int = 1) -> Found:
    """Round by round, every peer once. share: of the matmul ceiling, measured just before, the work that it did."""
    import torch

    from dsft.compose import compose
    from dsft.engine.assemble import DTYPES, skeleton
    from dsft.models.work import matmul_ceiling, widest, work

    run = compose(["model=smollm2_135m", f"method={mode}", f"train.precision={args.precision}"]).run
    files = run.model.resolve()
    bones = skeleton(run, files)
    needed, shape = work(bones.model, bones.anatomy), widest(bones.model, bones.anatomy)
    found: Found = {name: [] for name in peers}
    for turn in range(args.rounds):
        for name, peer in peers.items():
            ceiling = matmul_ceiling(2048, shape, DTYPES[args.precision], torch.device("cpu"))
            job = Job(mode, files.name_or_path, str(args.data.resolve()), args.steps, args.precision, peer.setting)
            found[name].append(last := measure(peer, job, ranks))
            last["share"] = needed.of(last["tok_s"], last["sup_s"]) / ceiling
            speed = f"{last['tok_s']:.0f} tokens/s, {last['tok_cpu_s']:.0f} tokens/CPU-s"
            print(f"round {turn + 1} {name}: {speed}, {last['peak_mib']:.0f} MiB", flush=True)
    return found


def measure(peer: Peer, job: Job, ranks: int) -> dict[str, Any]:
    """Run a peer on fresh processes; what its ranks left, put together. Raises RuntimeError if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(asdict(job)))
        command = [peer.python, "-m", peer.module, str(path)]
        code, said = _ranks(command, Path(folder) / "logs", ranks) if ranks > 1 else _alone(command)
        if code != 0:
            raise RuntimeError(f"{peer.title} ({job.mode}, {job.setting}) ended with {code}: {said[-3000:]}")
        return together([json.loads((path.parent / f"rank-{rank}.json").read_text()) for rank in range(ranks)])


def _alone(command: list[str]) -> tuple[int, str]:
    env = {key: value for key, value in os.environ.items() if key not in WAITING}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def _ranks(command: list[str], logs: Path, ranks: int) -> tuple[int, str]:
    from dsft_launchers.local import launch

    code = launch(command, num_processes=ranks, log_dir=logs, env={"OMP_NUM_THREADS": "1"})
    return code, "\n".join(path.read_text()[-1500:] for path in sorted(logs.iterdir()))


def together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over ranks; the slowest one's time; imbalance: (largest - mean) / mean of a step's tokens, mean of steps."""
    timed = [part["steps"][1:] for part in parts]
    steps = list(zip(*timed, strict=True))
    keys = ("tokens", "supervised", "positions", "cpu_seconds")
    total = {key: sum(step[key] for mine in timed for step in mine) for key in keys}
    seconds = max(sum(step["seconds"] for step in mine) for mine in timed)
    tokens = [[part["tokens"] for part in step] for step in steps]
    whole = zip(*(part["steps"] for part in parts), strict=True)
    return {
        "tok_s": total["tokens"] / seconds,
        "sup_s": total["supervised"] / seconds,
        "tok_cpu_s": total["tokens"] / total["cpu_seconds"],
        "padding": 1 - total["tokens"] / total["positions"],
        "imbalance": statistics.mean(max(each) / statistics.mean(each) - 1 for each in tokens),
        "peak_mib": sum(part["peak_mib"] for part in parts),
        "losses": [statistics.mean(part["loss"] for part in step) for step in whole],
    }


def table(found: Found, peers: Mapping[str, Peer], *, ranks: int = 1) -> Iterator[str]:
    """A row per peer: medians; ratios to the first of the same round, since a machine's pace drifts, their median."""
    first = next(iter(found))
    several = ["imbalance"] if ranks > 1 else []
    heads = ["", "real tokens/s", f"x {first}", "tokens/CPU-s", "of the ceiling", "padding", *several, "peak MiB",
             f"x {first}", "losses at steps 1, 2, last"]  # fmt: skip
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    middle = {name: {key: statistics.median(run[key] for run in runs) for key in KEYS} for name, runs in found.items()}

    def ratio(name: str, key: str) -> str:
        pairs = zip(found[name], found[first], strict=True)
        return f"{statistics.median(mine[key] / theirs[key] for mine, theirs in pairs):.2f}"

    for name, values in middle.items():
        losses = [found[name][0]["losses"][index] for index in (0, 1, -1)]
        cells = [
            peers[name].title, f"{values['tok_s']:.0f}", ratio(name, "tok_s"),
            f"{values['tok_cpu_s']:.0f}", f"{values['share']:.0%}", f"{values['padding']:.0%}",
            *[f"{values[key]:.1%}" for key in several],
            f"{values['peak_mib']:,.0f}", ratio(name, "peak_mib"),
            ", ".join(f"{loss:.4f}" for loss in losses),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def write(out: Path, title: str, what: str, args: argparse.Namespace, lines: Iterator[str] | list[str]) -> None:
    """Write a result with what it was measured on, and show it. what: a sentence's part about the peers."""
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    head = [
        f"# {title}",
        "",
        f"SmolLM2-135M, GSM8K, {BATCH} examples a step, {args.precision}, {what}; medians of {args.rounds} interleaved "
        f"rounds of {args.steps - 1} timed steps.",
        f"`{command}` on {here()}.",
        "",
    ]
    out.write_text("\n".join([*head, *lines]) + "\n")
    print(out.read_text())
