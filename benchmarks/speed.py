"""Speed and memory against the plain loop and TRL: the same examples, interleaved, medians, as ratios.

python -m benchmarks.speed [--mode lora|qlora|full] [--peers plain,dsft,...] [--steps 4] [--rounds 3]
writes benchmarks/results/speed-MODE.md. 8 examples of GSM8K a step, SmolLM2-135M; the first step is not timed.
"""

import sys
from pathlib import Path

from benchmarks.measure import Peer, arguments, interleaved, parsed, table, write

SMALL = "train.micro_batch_tokens=1024"
PEERS = {
    "plain": Peer("transformers + PEFT, padded batches", "benchmarks.peer_plain", "single"),
    "dsft": Peer("this project", "benchmarks.peer_dsft", "single"),
    "dsft-1024": Peer("this project, train.micro_batch_tokens=1024", "benchmarks.peer_dsft", f"single {SMALL}"),
    "dsft-compiled": Peer(
        "this project, train.micro_batch_tokens=1024 train.compile=true",
        "benchmarks.peer_dsft",
        f"single {SMALL} train.compile=true",
    ),
    "trl": Peer("TRL, its defaults", "benchmarks.peer_trl", "default"),
    "trl-best": Peer("TRL, grouped by length (other examples in each step)", "benchmarks.peer_trl", "grouped"),
}


def main() -> int:
    """Measure and write."""
    parser = arguments(__doc__, PEERS)
    parser.add_argument("--mode", choices=("lora", "qlora", "full"), default="lora")
    args = parsed(parser, PEERS)
    peers = {name: PEERS[name] for name in args.peers}
    found = interleaved(peers, args, mode=args.mode)
    out = args.out or Path(f"benchmarks/results/speed-{args.mode}.md")
    write(out, f"Speed: {args.mode}", "rank 16 on all linears", args, table(found, peers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
