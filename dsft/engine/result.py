"""The result of a run: an adapter in PEFT's format, or a whole transformers folder, gathered tensor by tensor."""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from dsft_launchers.files import mode_as_usual
from safetensors.torch import save_file
from torch import Tensor

from dsft.checkpoint.digests import of_all, of_tensor
from dsft.engine.assemble import DTYPES, Session, autocast
from dsft.models.randomness import as_published
from dsft.protocols import Method

PROBED = 64
"""Tokens of an example, at most, whose logits prove a result."""

SHARD_BYTES = 2 * 2**30
"""A whole model is written in files of about this size, so that rank 0 never holds more than one of them."""


def write_result(session: Session, folder: Path) -> str:
    """Write the result into folder (rank 0). Collective: the other ranks give their shards.

    Returns the digest of what the live model gave (see checkpoint.digests), on rank 0.
    """
    session.run.strategy.rest()
    if session.world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    if session.run.method.whole:
        written = _write_model(session, folder)
    else:
        learned = dict(_gathered(session, everything=False))
        written = {}
        if session.world.rank == 0:
            saved = session.run.method.save(session.model, learned, folder, session.files.name_or_path)
            written = {name: of_tensor(value) for name, value in saved.items()}
    if session.world.rank == 0:
        session.tokenizer.save_pretrained(folder)
        mode_as_usual(folder)
    session.world.barrier()
    return of_all(written)


def write_probe(session: Session, tokens: Tensor, path: Path, digest: str) -> None:
    """Leave the live model's logits for tokens (T,) in path, for a fresh process to compare. Collective."""
    session.model.eval()
    tokens = tokens[:PROBED]
    with torch.no_grad(), autocast(session):
        logits = session.module(
            input_ids=tokens[None].to(session.world.device),
            position_ids=torch.arange(len(tokens), device=session.world.device)[None],
            segment_lengths=(len(tokens),),
            use_cache=False,
        ).logits.float()
    if session.world.rank == 0:
        probe = {"tokens": tokens[None].contiguous(), "logits": logits.cpu().contiguous()}
        save_file(probe, path, metadata={"digest": digest})


def _gathered(session: Session, *, everything: bool) -> Iterator[tuple[str, Tensor]]:
    for name, param in session.model.named_parameters():
        if everything or param.requires_grad or session.run.method.kept(name):
            value = session.run.strategy.full(param)
            if session.world.rank == 0:
                yield name, value


def _write_model(session: Session, folder: Path) -> dict[str, str]:
    """A folder that AutoModelForCausalLM loads: names as the hub has them, in the dtype of the run's precision.

    Returns name -> digest of what is in its files.
    """
    dtype = DTYPES[session.run.train.precision]
    where: dict[str, str] = {}
    digests: dict[str, str] = {}
    total = 0
    for index, (part, more) in enumerate(_parts(session, dtype), start=1):
        file = f"model-{index:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        write_beside(session.run.method, more, folder, index)
        where |= dict.fromkeys(part, file)
        digests |= {name: of_tensor(value) for name, value in (part | more).items()}
        total += sum(tensor.nbytes for tensor in part.values())
    if session.world.rank == 0:
        index_file = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
        config = copy.deepcopy(session.model.config)  # the live model goes on with its own
        config.dtype, config.use_cache = dtype, True
        as_published(config, session.files.config)
        config.save_pretrained(folder)
        session.model.generation_config.save_pretrained(folder)
    return digests


def write_beside(method: Method, more: Mapping[str, Tensor], folder: Path, index: int) -> None:
    """Write what a method keeps beside the files of a model (see Method.finished), if it keeps anything."""
    if more:
        stem, said = method.beside
        save_file(dict(more), folder / f"{stem}-{index:05d}.safetensors", metadata={"format": "pt", **said})


def _parts(session: Session, dtype: torch.dtype) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What goes into each file of the model, and what goes beside it."""
    from transformers.core_model_loading import revert_weight_conversion

    part: dict[str, Tensor] = {}
    beside: dict[str, Tensor] = {}
    size = 0
    for name, value in _gathered(session, everything=True):
        final, more = session.run.method.finished(session.model, session.anatomy, name, value, dtype)
        part |= revert_weight_conversion(session.model, {name: final.to(dtype)})
        beside |= more
        size += value.numel() * dtype.itemsize
        if size >= SHARD_BYTES:
            yield _contiguous(part), _contiguous(beside)
            part, beside, size = {}, {}, 0
    if part:
        yield _contiguous(part), _contiguous(beside)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
