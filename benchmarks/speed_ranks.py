"""Speed and memory of two ranks against the plain loop under the same strategy: steps in turns, as ratios.

python -m benchmarks.speed_ranks [--strategies fsdp,zero3] [--steps 7]
writes benchmarks/results/speed-ranks.md. LoRA; one thread a rank; the first step is not timed. The plain loop is FSDP2
by block, or DeepSpeed's ZeRO-3 engine, and each of its ranks pads every second example of a step.
"""

import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import Peer, abreast, arguments, pairs, parsed, write

RANKS = 2
STRATEGIES = ("fsdp", "zero3")
PEERS = {
    "dsft": Peer("this project", "benchmarks.peer_dsft", "fsdp"),
    "plain": Peer("transformers + PEFT, padded batches", "benchmarks.peer_plain", "fsdp"),
}


def main() -> int:
    """Measure and write."""
    parser = arguments(__doc__, PEERS)
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help=f"of {', '.join(STRATEGIES)}")
    args = parsed(parser, PEERS)
    strategies = args.strategies.split(",")
    if unknown := [name for name in strategies if name not in STRATEGIES]:
        parser.error(f"--strategies must be of {', '.join(STRATEGIES)}, got {', '.join(unknown)}")
    lines = []
    for strategy in strategies:
        peers = {name: replace(PEERS[name], setting=strategy) for name in args.peers}
        found = abreast(peers, args, mode="lora", ranks=RANKS)
        lines += [f"## {strategy}", "", *pairs(found, peers), ""]
    lines.append("Tokens/s over both ranks; peak memory is their sum; imbalance: (largest - mean) / mean of the ranks'")
    lines.append("real tokens in a step, mean over the steps.")
    out = args.out or Path("benchmarks/results/speed-ranks.md")
    write(
        out, f"Speed: lora on {RANKS} ranks", f"rank 16 on all linears, {RANKS} processes, 1 thread each", args, lines
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
