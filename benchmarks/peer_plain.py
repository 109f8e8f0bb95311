"""The plain loop as a peer, written by hand on transformers and PEFT: padded batches, the model's own loss, AdamW.

On several processes under FSDP2, a group per block, or DeepSpeed's ZeRO-3 engine: as their users write them.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from dsft_launchers.place import MEETING
from peft import get_peft_model

from benchmarks.job import BATCH, RATE, Clock, Job, Step, serve
from benchmarks.plain import DTYPES, encode, load, padded


def run(job: Job) -> list[Step]:
    """The job on all ranks."""
    if job.setting != "single":
        place, (rank, size) = os.environ[MEETING], (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        dist.init_process_group("gloo", init_method=f"file://{place}/peers", rank=rank, world_size=size)
    loop, clock = Loop(job), Clock()
    for step in range(job.steps):
        clock.end(*loop.step(step))
    if dist.is_initialized():
        dist.destroy_process_group()
    return clock.steps


class Loop:
    """Each rank pads every world-th example of a step, as torch's DistributedSampler deals them out."""

    def __init__(self, job: Job) -> None:
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        model, adapter, tokenizer = load(job)
        self.model = model if adapter is None else get_peft_model(model, adapter)
        self.model.train()
        self.model.config.use_cache = False
        prepare = {"single": _single, "fsdp": _fsdp, "zero3": _zero3}[job.setting]
        self.forward, self.backward, self.update = prepare(self.model, job)
        self.encoded = [encode(tokenizer, row) for row in job.read()[: job.steps * BATCH]]

    def step(self, index: int) -> tuple[int, int, int, float]:
        """This rank's real tokens, supervised tokens, positions and loss in step index, counted from 0."""
        rank, world = self.rank, self.world
        examples = self.encoded[index * BATCH : (index + 1) * BATCH]
        supervised = [sum(label != -100 for label in labels[1:]) for _, labels in examples]
        batch = padded(examples[rank::world])
        # ranks average their gradients: each divides by its share of the step's supervised tokens, not by its own
        loss = self.forward(**batch, num_items_in_batch=sum(supervised) / world).loss
        self.backward(loss)
        self.update()
        tokens = sum(len(tokens) for tokens, _ in examples[rank::world])
        return tokens, sum(supervised[rank::world]), batch["labels"].numel(), float(loss.detach())


Parts = tuple[Callable[..., Any], Callable[[torch.Tensor], Any], Callable[[], Any]]
"""Forward, backward, and what moves the parameters and forgets their gradients."""


def _adamw(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)


def _single(model: Any, _: Job) -> Parts:
    optimizer = _adamw(model)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, torch.Tensor.backward, update


def _fsdp(model: Any, job: Job) -> Parts:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.to(DTYPES[job.precision])  # a group has one dtype, and PEFT makes its adapters in fp32
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _single(model, job)


def _zero3(model: Any, job: Job) -> Parts:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": job.precision == "bf16"},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=_adamw(model), config=settings, dist_init_required=False)
    return engine, engine.backward, engine.step


if __name__ == "__main__":
    serve(run)
