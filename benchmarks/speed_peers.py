"""Speed and memory against LLaMA-Factory, which has an environment of its own: steps in turns, as ratios.

python -m benchmarks.speed_peers [--python .venv-peers/bin/python] [--peers dsft-compiled,...]
writes benchmarks/results/speed-peers.md. LoRA on the rows of benchmarks.speed; `make bench-peers` makes that Python.
"""

import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import Peer, abreast, arguments, pairs, parsed, write
from benchmarks.speed import PEERS as OURS

MODULE = "benchmarks.peer_llamafactory"
THEIRS = {
    "llamafactory": Peer("LLaMA-Factory, its defaults (with checkpointing)", MODULE, "default"),
    "llamafactory-packed": Peer(
        "LLaMA-Factory, neat packing 4 x 512, no checkpointing (other examples in each step)", MODULE, "packed"
    ),
}
PEERS = {name: OURS[name] for name in ("dsft-compiled", "dsft-1024")} | THEIRS


def main() -> int:
    """Measure and write."""
    parser = arguments(__doc__, PEERS)
    parser.add_argument("--python", type=Path, default=Path(".venv-peers/bin/python"), help="has LLaMA-Factory")
    args = parsed(parser, PEERS)
    if not args.python.is_file():
        parser.error(f"--python must be a Python with llamafactory, {args.python} is not there; make bench-peers")
    theirs = {name: replace(peer, python=str(args.python)) for name, peer in THEIRS.items()}
    peers = {name: (PEERS | theirs)[name] for name in args.peers}
    found = abreast(peers, args, mode="lora")
    out = args.out or Path("benchmarks/results/speed-peers.md")
    write(out, "Speed: lora against LLaMA-Factory", "rank 16 on all linears", args, pairs(found, peers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
