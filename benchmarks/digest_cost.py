"""What hashing a base costs beside reading it: shards of random bytes, with and without the kernel's cache.

python -m benchmarks.digest_cost FOLDER [--gb 16]   needs root, to drop the kernel's cache, and as much disk in FOLDER

Writes benchmarks/results/base-digest.md. FOLDER is made and removed.
"""

import argparse
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.machine import here

SHARDS, BLOCK, TURNS = 4, 64 * 2**20, 2
PAGE = Path(__file__).parent / "results" / "base-digest.md"


def make(folder: Path, gb: int) -> None:
    """A folder that looks like a model's: config.json and shards of one tensor of bytes each."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    block, size = os.urandom(BLOCK), gb * 10**9 // SHARDS
    files = {f"w{shard}": f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors" for shard in range(SHARDS)}
    index = {"metadata": {"total_size": SHARDS * size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in range(SHARDS):
        head = json.dumps({f"w{shard}": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        head += b" " * (-len(head) % 8)
        with (folder / files[f"w{shard}"]).open("wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            for start in range(0, size, BLOCK):
                file.write(block[: min(BLOCK, size - start)])


def timed(work: Callable[[], object], *, cold: bool) -> float:
    """Seconds of work; cold: nothing of the files is in memory."""
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def read(folder: Path) -> None:
    """Each byte once, file after file."""
    buffer = bytearray(2**20)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def digest(folder: Path) -> None:
    """As a run's first start with this base does."""
    from transformers import LlamaConfig

    from dsft.models.files import ModelFiles

    shutil.rmtree(os.environ["DSFT_CACHE"], ignore_errors=True)  # where a digest would be remembered
    ModelFiles(
        config=LlamaConfig(), folder=folder, name_or_path="base", init="pretrained", revision=None,
        trust_remote_code=False,
    ).digest()  # fmt: skip


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=int, default=16)
    args = parser.parse_args()
    os.environ["DSFT_CACHE"] = str(args.folder / "cache")
    base = args.folder / "base"
    try:
        make(base, args.gb)
        digest(base)  # imports before the clock runs
        rows = [
            (timed(lambda: read(base), cold=True), timed(lambda: digest(base), cold=True),
             timed(lambda: digest(base), cold=False))
            for _ in range(TURNS)
        ]  # fmt: skip
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    table = [f"| {once:.1f} | {cold:.1f} | {warm:.1f} |" for once, cold, warm in rows]
    page = [
        "# The digest of a base beside reading it once",
        "",
        f"`python -m benchmarks.digest_cost FOLDER --gb {args.gb}`, {here()}. Seconds; {SHARDS} files, in turns.",
        "",
        "| read once, from the disk | digest, from the disk | digest, from memory |",
        "|---:|---:|---:|",
        *table,
    ]
    PAGE.write_text("\n".join(page) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
