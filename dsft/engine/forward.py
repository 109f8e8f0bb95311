"""The forward pass of a micro-batch in training: precision, dropout, and a look for random numbers beside it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from dsft_launchers.verdict import RefusedError
from torch import Tensor

from dsft.engine.assemble import Session, autocast
from dsft.engine.masks import stream
from dsft.engine.offload import offloaded
from dsft.objective import Batch, Metrics


def forward(session: Session, step: int, index: int, batch: Batch) -> tuple[Tensor, Metrics]:
    """The objective's terms (K,) and metrics of batch, a step's micro-batch of this index; terms 0 if it is silent.

    Raises RefusedError, in the first one of a start, if other random numbers than dropout's change them.
    """
    run, world, draws = session.run, session.world, session.draws
    there = batch.to(world.device)
    # Torch's own generator is for what a model draws without an effect, as the layers that a probability of 0 leaves
    # out: unlike dropout, its numbers depend on what is packed together.
    torch.manual_seed(stream(run.train.seed, step, batch.ids[0], index))
    before = [] if draws.watched else _states(world.device)
    draws.begin(step, batch, world.device)
    with autocast(session), offloaded(run.train, world.device), draws.taking():
        terms, metrics = run.objective.losses(session.scorer, there)
    if not draws.watched:
        moved = any(not torch.equal(*pair) for pair in zip(before, _states(world.device), strict=True))
        if world.max(moved)[0]:
            _refuse_chance(session, step, there, terms)
        draws.watched = True
    # A silent micro-batch goes through backward, in which ranks meet, and adds nothing.
    return (terms if batch.counts else terms * 0), metrics


def _states(device: torch.device) -> list[Tensor]:
    """The state of each of torch's generators that a forward pass on device may use."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _refuse_chance(session: Session, step: int, batch: Batch, terms: Tensor) -> None:
    """Raise RefusedError, on every rank, if terms are others with other numbers of torch's generators. Collective."""
    run, world, draws = session.run, session.world, session.draws
    with _apart(world.device):
        torch.manual_seed(stream(run.train.seed, step, "others"))
        draws.begin(step, batch, world.device)
        with torch.no_grad(), autocast(session), draws.taking():
            others, _ = run.objective.losses(session.scorer, batch)
    differ = not torch.allclose(terms.detach(), others, rtol=1e-6, atol=0)
    draws.begin(step, batch, world.device)
    if world.max(differ)[0]:
        raise RefusedError(
            "model must draw no random numbers in training but those of dropout, got a loss that changes with torch's "
            "generator and so would with ranks and micro-batches; take another model than one with a random router, or "
            "a method and an objective that draw nothing"
        )


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Torch's generators are afterwards as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
