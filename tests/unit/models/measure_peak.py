"""Run by test_materialize: write a checkpoint of 600 MB, or load it on one of two ranks and print the peak in MiB."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from dsft.comm.world import join, leave
from dsft.models.build import build_meta
from dsft.models.lineage import Lineage
from dsft.models.materialize import materialize
from dsft.models.source import Pretrained
from dsft.models.values import open_values

CONFIG = transformers.LlamaConfig(
    vocab_size=8000,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=18,
    num_attention_heads=16,
    num_key_value_heads=4,
    architectures=["LlamaForCausalLM"],
)


def write(folder: Path) -> None:
    CONFIG.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(CONFIG)
    tensors = {name: torch.full(param.shape, 0.5, dtype=torch.bfloat16) for name, param in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def load(folder: Path) -> None:
    world = join()
    before = peak_mib()
    files = Pretrained(
        path=str(folder), init="pretrained", revision=None, trust_remote_code=False, config_of=None, config=None
    ).resolve()
    model = build_meta(files, torch.bfloat16)
    origins = Lineage(model).origins(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    values = open_values(files, torch.bfloat16, 0)
    materialize(model, values, world, origins=origins, initial=no_new, place=lambda module: None)
    shard = sum(param.to_local().nbytes for param in model.parameters()) / 2**20
    largest = max(param.numel() * param.element_size() for param in model.parameters()) / 2**20
    sys.stdout.write(f"{peak_mib() - before} {shard} {largest}\n")
    dist.barrier()
    leave()


def no_new(name: str, param: torch.Tensor) -> torch.Tensor:
    raise AssertionError(f"{name} was taken for a new parameter")


if __name__ == "__main__":
    {"write": write, "load": load}[sys.argv[1]](Path(sys.argv[2]))
