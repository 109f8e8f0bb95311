"""Speed and memory against the plain loop and TRL: one beside the other, their steps in turns, as ratios.

python -m benchmarks.speed [--mode lora|qlora|full] [--peers dsft-compiled,plain,...] [--steps 7]
writes benchmarks/results/speed-MODE.md. 8 examples of GSM8K a step, SmolLM2-135M; the first step, in which blocks are
compiled, is not timed. Ours: micro-batches of 1,024 tokens.
"""

import sys
from pathlib import Path

from benchmarks.measure import Peer, abreast, arguments, pairs, parsed, write

SMALL = "train.micro_batch_tokens=1024"
PEERS = {
    "dsft-compiled": Peer(
        "this project, train.compile=true", "benchmarks.peer_dsft", f"single {SMALL} train.compile=true"
    ),
    "dsft-1024": Peer("this project, train.compile=false", "benchmarks.peer_dsft", f"single {SMALL}"),
    "plain": Peer("transformers + PEFT, padded batches", "benchmarks.peer_plain", "single"),
    "trl": Peer("TRL, its defaults", "benchmarks.peer_trl", "default"),
    "trl-best": Peer("TRL, grouped by length (other examples in each step)", "benchmarks.peer_trl", "grouped"),
    "dsft": Peer("this project, train.compile=false, micro-batches of whole batches", "benchmarks.peer_dsft", "single"),
}
"""Compiled is what a run of 1,000 steps or more is, unless its base is packed."""


def main() -> int:
    """Measure and write."""
    parser = arguments(__doc__, PEERS)
    parser.add_argument("--mode", choices=("lora", "qlora", "full"), default="lora")
    args = parsed(parser, PEERS)
    peers = {name: PEERS[name] for name in args.peers}
    found = abreast(peers, args, mode=args.mode)
    out = args.out or Path(f"benchmarks/results/speed-{args.mode}.md")
    write(out, f"Speed: {args.mode}", "rank 16 on all linears", args, pairs(found, peers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
