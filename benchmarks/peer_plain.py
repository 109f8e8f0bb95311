"""The plain loop as a peer, written by hand on transformers and PEFT: padded batches, the model's own loss, AdamW.

On several processes under FSDP2, a group per block, or DeepSpeed's ZeRO-3 engine: as their users write them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model

from benchmarks.job import BATCH, RATE, Clock, Job, Step, serve
from benchmarks.plain import DTYPES, encode, load, padded


def run(job: Job) -> list[Step]:
    """Each rank pads every world-th example of a step, as torch's DistributedSampler deals them out."""
    if job.setting != "single":
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model, adapter, tokenizer = load(job)
    model = model if adapter is None else get_peft_model(model, adapter)
    model.train()
    model.config.use_cache = False
    forward, backward, update = {"single": _single, "fsdp": _fsdp, "zero3": _zero3}[job.setting](model, job)
    encoded = [encode(tokenizer, row) for row in job.read()[: job.steps * BATCH]]
    clock = Clock()
    for step in range(job.steps):
        examples = encoded[step * BATCH : (step + 1) * BATCH]
        supervised = [sum(label != -100 for label in labels[1:]) for _, labels in examples]
        batch = padded(examples[rank::world])
        # ranks average their gradients: each divides by its share of the step's supervised tokens, not by its own
        loss = forward(**batch, num_items_in_batch=sum(supervised) / world).loss
        backward(loss)
        update()
        tokens = sum(len(tokens) for tokens, _ in examples[rank::world])
        clock.end(tokens, sum(supervised[rank::world]), batch["labels"].numel(), float(loss.detach()))
    if dist.is_initialized():
        dist.destroy_process_group()
    return clock.steps


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
