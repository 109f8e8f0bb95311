"""Peak memory of loading: a 2 GB checkpoint in four files under fsdp x2, through the engine's own assembly.

python -m benchmarks.load_memory [--gib 2.0]   writes benchmarks/results/load-memory.md
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path

from dsft_launchers.local import launch

from benchmarks.job import peak_mib
from benchmarks.machine import here

RESULT = Path("benchmarks/results/load-memory.md")
CASES = {"lora": [], "nf4": ["quantization=nf4"], "int8": ["quantization=int8"]}


def write_checkpoint(folder: Path, gib: float, files: int = 4) -> None:
    """A Llama of random bf16 weights in several files with an index, and a tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from dsft.compose import compose

    config = LlamaConfig(
        vocab_size=8000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=round(11 * gib),
        num_attention_heads=16, num_key_value_heads=4,
    )  # fmt: skip
    config.save_pretrained(folder)
    compose(["model=tiny"]).run.model.resolve().tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: param.shape for name, param in LlamaForCausalLM(config).named_parameters()}
    where: dict[str, str] = {}
    for index in range(files):
        name = f"model-{index}.safetensors"
        part = {key: torch.randn(shape).bfloat16() * 0.02 for key, shape in list(shapes.items())[index::files]}
        save_file(part, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
        del part
        gc.collect()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def rank(overrides: list[str]) -> None:
    """One rank: imports, then assembly; prints what the peak grew by."""
    import bitsandbytes  # noqa: F401 - part of the imports
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from torch.distributed.tensor import DTensor

    from dsft.comm.world import join, leave
    from dsft.compose import compose
    from dsft.engine.assemble import assemble

    world = join()
    run = compose(overrides).run
    files = run.model.resolve()
    files.tokenizer()
    gc.collect()
    before, started = peak_mib(), time.monotonic()
    session = assemble(run, files, world)
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in session.model.parameters()]
    shard = sum(tensor.nbytes for tensor in tensors) / 2**20
    largest = sorted(param.numel() * 2 / 2**20 for param in session.model.parameters() if param.dtype == torch.bfloat16)
    result = {"grown": peak_mib() - before, "shard": shard, "two_largest": 2 * largest[-1],
              "seconds": time.monotonic() - started}  # fmt: skip
    everyone = world.gather(result)
    if world.rank == 0:
        sys.stdout.write(json.dumps(everyone) + "\n")
    leave()


def measure(folder: Path, words: list[str]) -> list[dict[str, float]]:
    """Both ranks' figures, MiB."""
    with tempfile.TemporaryDirectory() as logs:
        overrides = [
            "model=custom", f"model.path={folder}", "method=lora", "strategy=fsdp", "train.precision=bf16",
            "train.steps=1", "tracker=[none]", *words,
        ]  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.load_memory", "--rank", json.dumps(overrides)]
        code = launch(command, num_processes=2, log_dir=Path(logs), env={})
        text = (Path(logs) / "rank-0.log").read_text()
        if code != 0:
            raise RuntimeError(text)
        found: list[dict[str, float]] = json.loads(text.strip().splitlines()[-1])
        return found


def main() -> int:
    """Write the table; 1 if a rank is over its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rank")
    args = parser.parse_args()
    if args.rank:
        rank(json.loads(args.rank))
        return 0
    lines = ["| base | shard | grown above imports | bound: shard + two largest tensors + 100 | seconds |",
             "|---|---|---|---|---|"]  # fmt: skip
    over = False
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), args.gib)
        for name, words in CASES.items():
            for each in measure(Path(folder), words):
                bound = each["shard"] + each["two_largest"] + 100
                over |= each["grown"] > bound
                lines.append(
                    f"| {name} | {each['shard']:.0f} | {each['grown']:.0f} | {bound:.0f} | {each['seconds']:.0f} |"
                )
    head = [
        "# Memory of loading",
        "",
        f"`python -m benchmarks.load_memory`: a {args.gib:g} GB Llama of random bf16 weights in four files, LoRA r=16, "
        "fsdp on two processes, through the engine's assembly; MiB of VmHWM above the same process after its imports, "
        f"for each rank; on {here()}.",
        "",
    ]
    RESULT.write_text("\n".join([*head, *lines]) + "\n")
    print(RESULT.read_text())
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
