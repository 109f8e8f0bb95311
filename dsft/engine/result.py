"""The result of a run: an adapter in PEFT's format, or a whole transformers folder, gathered tensor by tensor."""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from dsft_launchers.files import mode_as_usual
from safetensors.torch import save_file
from torch import Tensor

from dsft.checkpoint.digests import of_all, of_tensor
from dsft.engine.assemble import Session
from dsft.engine.precision import DTYPES
from dsft.headed import add_head
from dsft.models.build import build_meta, persistent_buffers
from dsft.models.checkpoint_values import CheckpointValues
from dsft.models.heads import head_tensors
from dsft.models.joined import joined
from dsft.models.randomness import as_published
from dsft.models.weights import Weights
from dsft.protocols import Method

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
            names = head_tensors(session.model) if session.files.labels else frozenset()
            head = {name: learned.pop(name) for name in sorted(names)}
            saved = session.run.method.save(session.model, learned, folder, session.files.name_or_path)
            saved = add_head(folder, saved, head, session.files.labels) if head else saved
            written = {name: of_tensor(value) for name, value in saved.items()}
    if session.world.rank == 0:
        session.tokenizer.save_pretrained(folder)
        mode_as_usual(folder)
    session.world.barrier()
    return of_all(written)


def _gathered(session: Session, *, everything: bool) -> Iterator[tuple[str, Tensor]]:
    for name, param in session.model.named_parameters():
        if everything or param.requires_grad or session.run.method.kept(name):
            value = session.run.strategy.full(param)
            if session.world.rank == 0:
                yield name, value


def _write_model(session: Session, folder: Path) -> dict[str, str]:
    """A folder that transformers loads: names as the hub has them, parameters in the run's precision.

    Returns name -> digest of what is in its files. Raises RuntimeError if they are not the tensors of the model.
    """
    dtype = DTYPES[session.run.train.precision]
    where: dict[str, str] = {}
    digests: dict[str, str] = {}
    total = 0
    for index, (part, more) in enumerate(_parts(session, dtype), start=1):
        file = f"model-{index:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        write_beside(session.run.method, more, folder, index)
        _add(where, dict.fromkeys(part, file))
        digests |= {name: of_tensor(value) for name, value in (part | more).items()}
        total += sum(tensor.nbytes for tensor in part.values())
    if session.world.rank == 0:
        index_file = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
        config = copy.deepcopy(session.model.config)  # the live model goes on with its own
        config.dtype, config.use_cache = dtype, True
        as_published(config, session.files.config)
        if session.files.labels:
            config.architectures = [type(session.model).__name__.removeprefix("FSDP")]
        config.save_pretrained(folder)
        if not session.files.labels:
            session.model.generation_config.save_pretrained(folder)
        _require_whole(session, folder, dtype)
    return digests


def _require_whole(session: Session, folder: Path, dtype: torch.dtype) -> None:
    """Raise RuntimeError unless the files give each tensor of the model's class, and nothing else; reads headers."""
    try:
        found = CheckpointValues(build_meta(session.files, dtype, attention="eager"), Weights(folder))
    except ValueError as error:
        raise RuntimeError(f"{folder} does not hold the model that was trained: {error}") from error
    if found.unexpected:
        raise RuntimeError(f"{folder} holds {found.unexpected[0]}, for which the model that was trained has no place")


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
    size, waiting, parts_of_one = 0, dict[str, Tensor](), dict[str, tuple[str, ...]]()
    if session.world.rank == 0:  # of a model that no strategy has divided
        parts_of_one = joined(build_meta(session.files, dtype, attention="eager"))
    for name, value in _gathered(session, everything=True):
        final, more = session.run.method.finished(session.model, session.anatomy, name, value, dtype)
        waiting[name] = final.to(dtype)
        if waiting.keys() >= set(group := parts_of_one.get(name, (name,))):
            _add(part, revert_weight_conversion(session.model, {each: waiting.pop(each) for each in group}))
        beside |= more
        size += value.numel() * dtype.itemsize
        if size >= SHARD_BYTES:
            yield _contiguous(part), _contiguous(beside)
            part, beside, size = {}, {}, 0
    if session.world.rank == 0:  # no strategy divides buffers, and each keeps its type: a bias in fp32 stays in fp32
        for name, buffer in persistent_buffers(session.model).items():
            _add(part, revert_weight_conversion(session.model, {name: buffer.detach().to("cpu", copy=True)}))
    if part:
        yield _contiguous(part), _contiguous(beside)


def _add(names: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add more to names. Raises RuntimeError for a name that is there already: one tensor would replace another."""
    if twice := sorted(names.keys() & more.keys()):
        raise RuntimeError(f"{twice[0]} would be written twice: two tensors of the model have that name on the hub")
    names |= more


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
