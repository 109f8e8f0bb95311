"""Peers side by side: each beside ours, their steps in turns, since a machine's pace drifts from minute to minute."""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.job import BATCH, Job
from benchmarks.machine import here

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"

ALIKE = {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
"""The environment of every peer."""

LAUNCH = "import sys; from pathlib import Path; from dsft_launchers.local import launch; \
sys.exit(launch(sys.argv[3:], num_processes=int(sys.argv[1]), log_dir=Path(sys.argv[2]), env={'OMP_NUM_THREADS': '1'}))"

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""How a peer's threads wait is its own affair, and dsft has set it for the process that imported it."""

Pairs = dict[str, tuple[dict[str, Any], dict[str, Any]]]
"""Peer -> what the first peer gave beside it, and what it gave."""


@dataclass(frozen=True)
class Peer:
    """title: its row in the table; module: run with its words and the job's file; setting: see Job."""

    title: str
    module: str
    setting: str
    python: str = sys.executable


def arguments(doc: str | None, peers: Mapping[str, object]) -> argparse.ArgumentParser:
    """What every speed benchmark takes."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--peers", default=",".join(peers), help=f"of {', '.join(peers)}; all are held to the first")
    parser.add_argument("--steps", type=int, default=7, help="the first is not timed")
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
    if args.steps < 2:
        parser.error(f"--steps must be 2 or more, got {args.steps}")
    if not args.data.is_file():
        parser.error(f"--data must be a .jsonl of GSM8K, {args.data} is not there")
    os.environ |= ALIKE
    from dsft.compose import compose

    args.precision = args.precision or compose(["model=tiny"]).run.train.precision
    return args


def abreast(peers: Mapping[str, Peer], args: argparse.Namespace, *, mode: str, ranks: int = 1) -> Pairs:
    """Every peer but the first beside the first, their steps in turns. share: of the matmul ceiling."""
    import torch

    from dsft.compose import compose
    from dsft.engine.assemble import DTYPES, skeleton
    from dsft.models.work import matmul_ceiling, widest, work

    run = compose(["model=smollm2_135m", f"method={mode}", f"train.precision={args.precision}"]).run
    files = run.model.resolve()
    bones = skeleton(run, files)
    needed, shape = work(bones.model, bones.anatomy), widest(bones.model, bones.anatomy)
    (_, ours), *others = peers.items()
    found: Pairs = {}
    for name, peer in others:
        ceiling = matmul_ceiling(2048, shape, DTYPES[args.precision], torch.device("cpu"))
        jobs = [
            Job(mode, files.name_or_path, str(args.data.resolve()), args.steps, args.precision, each.setting)
            for each in (ours, peer)
        ]
        found[name] = pair = _pair((ours, peer), jobs, ranks)
        for each in pair:
            each["share"] = needed.of(each["tok_s"], each["sup_s"]) / ceiling
        speeds = " and ".join(f"{each['tok_s']:.0f} tokens/s, {each['tok_cpu_s']:.0f} tokens/CPU-s" for each in pair)
        print(f"ours and {name}: {speeds}", flush=True)
    return found


def _pair(peers: Sequence[Peer], jobs: Sequence[Job], ranks: int) -> tuple[dict[str, Any], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for index, (peer, job) in enumerate(zip(peers, jobs, strict=True)):
            env = {"BENCH_TURNS": f"{folder}:{index}:{len(peers)}"}
            running.append(_started(peer, job, Path(folder) / str(index), ranks, env))
        codes = [process.wait() for process in running]
        for index, code in enumerate(codes):
            _check(peers[index], code, Path(folder) / str(index))
        ours, theirs = (_left(Path(folder) / str(index), ranks) for index in range(2))
        return together(ours), together(theirs)


def measure(peer: Peer, job: Job) -> dict[str, Any]:
    """Run a peer alone in a fresh process. Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "alone"
        _check(peer, _started(peer, job, place, 1, {}).wait(), place)
        return together(_left(place, 1))


def _started(peer: Peer, job: Job, place: Path, ranks: int, env: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    place.mkdir()
    (place / "job.json").write_text(json.dumps(asdict(job)))
    command = [peer.python, "-m", *peer.module.split(), str(place / "job.json")]
    if ranks > 1:
        command = [sys.executable, "-c", LAUNCH, str(ranks), str(place), *command]
    own = {key: value for key, value in os.environ.items() if key not in WAITING}
    with (place / "said").open("w") as said:
        return subprocess.Popen(command, env={**own, **env}, stdout=said, stderr=said)


def _check(peer: Peer, code: int, place: Path) -> None:
    if code != 0:
        raise RuntimeError(f"{peer.title} ended with {code}: {(place / 'said').read_text()[-3000:]}")


def _left(place: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


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


def pairs(found: Pairs, peers: Mapping[str, Peer]) -> Iterator[str]:
    """A row per pair: the first of peers, and the one beside it."""
    heads = ["beside", "its real tokens/s", "ours", "ours / its", "by CPU seconds", "its share of the ceiling", "ours",
             "its padding", "its imbalance", "ours", "its peak MiB", "ours", "ours / its",
             "its losses at steps 1, 2, last", "ours"]  # fmt: skip
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for name, (ours, its) in found.items():
        losses = [", ".join(f"{each['losses'][index]:.4f}" for index in (0, 1, -1)) for each in (its, ours)]
        cells = [
            peers[name].title, f"{its['tok_s']:.0f}", f"{ours['tok_s']:.0f}", f"**{ours['tok_s'] / its['tok_s']:.2f}**",
            f"{ours['tok_cpu_s'] / its['tok_cpu_s']:.2f}", f"{its['share']:.0%}", f"{ours['share']:.0%}",
            f"{its['padding']:.0%}", f"{its['imbalance']:.1%}", f"{ours['imbalance']:.1%}",
            f"{its['peak_mib']:,.0f}", f"{ours['peak_mib']:,.0f}",
            f"**{ours['peak_mib'] / its['peak_mib']:.2f}**", *losses,
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def write(out: Path, title: str, what: str, args: argparse.Namespace, lines: Iterator[str] | list[str]) -> None:
    """Write a result with what it was measured on, and show it. what: a sentence's part about the peers."""
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    head = [
        f"# {title}",
        "",
        f"SmolLM2-135M, GSM8K, {BATCH} examples a step, {args.precision}, {what}; {args.steps - 1} timed steps.",
        f"`{command}` on {here()}.",
        "",
    ]
    out.write_text("\n".join([*head, *lines]) + "\n")
    print(out.read_text())
