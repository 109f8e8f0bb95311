"""The result of a run: an adapter in PEFT's format, or a whole transformers folder, gathered tensor by tensor."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsft.engine.assemble import DTYPES, Session

SHARD_BYTES = 2 * 2**30
"""A whole model is written in files of about this size, so that rank 0 never holds more than one of them."""


def write_result(session: Session, folder: Path) -> None:
    """Write the result into folder (rank 0). Collective: the other ranks give their shards."""
    if session.world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    if session.run.method.whole:
        _write_model(session, folder)
    else:
        learned = dict(_gathered(session, trainable_only=True))
        if session.world.rank == 0:
            session.run.method.save(session.model, learned, folder, session.files.name_or_path)
    if session.world.rank == 0:
        session.tokenizer.save_pretrained(folder)
    session.world.barrier()


def _gathered(session: Session, *, trainable_only: bool) -> Iterator[tuple[str, Tensor]]:
    for name, param in session.model.named_parameters():
        if param.requires_grad or not trainable_only:
            value = session.run.strategy.full(param)
            if session.world.rank == 0:
                yield name, value


def _write_model(session: Session, folder: Path) -> None:
    """A folder that AutoModelForCausalLM loads: names as the hub has them, in the dtype of the run's precision."""
    dtype = DTYPES[session.run.train.precision]
    where: dict[str, str] = {}
    total = 0
    for index, part in enumerate(_parts(session, dtype), start=1):
        file = f"model-{index:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
        total += sum(tensor.nbytes for tensor in part.values())
    if session.world.rank == 0:
        index_file = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
        config = copy.deepcopy(session.model.config)  # the live model goes on with its own
        config.dtype, config.use_cache = dtype, True
        config.save_pretrained(folder)
        session.model.generation_config.save_pretrained(folder)


def _parts(session: Session, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    from transformers.core_model_loading import revert_weight_conversion

    part: dict[str, Tensor] = {}
    size = 0
    for name, value in _gathered(session, trainable_only=False):
        part |= revert_weight_conversion(session.model, {name: value.to(dtype)})
        size += value.numel() * dtype.itemsize
        if size >= SHARD_BYTES:
            yield {key: tensor.contiguous() for key, tensor in part.items()}
            part, size = {}, 0
    if part:
        yield {key: tensor.contiguous() for key, tensor in part.items()}
