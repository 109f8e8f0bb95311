"""Mistakes of a device, planted in a step on purpose: what blind.py must find."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dsft import objective
from dsft.methods import bottleneck
from dsft.models import scoring
from dsft.objectives.sft import SFT
from dsft.strategies.update import Update


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Within, the function that this stray is planted in is the strayed one."""
    owner, attribute, strayed = STRAYS[name]
    was = getattr(owner, attribute)
    setattr(owner, attribute, strayed(was))
    try:
        yield
    finally:
        setattr(owner, attribute, was)


def _forward_on_the_host(was: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: was(*args).cpu()


def _forward_by_the_host(was: Callable[..., Any]) -> Callable[..., Any]:
    def strayed(*args: Any) -> Any:
        out = was(*args)
        return out.cpu().to(out.device)

    return strayed


def _drawn_by_the_host(was: Callable[..., Any]) -> Callable[..., Any]:
    def strayed(*args: Any) -> Any:
        out = was(*args)
        return out + torch.empty_like(out).normal_(generator=torch.Generator())

    return strayed


def _terms_on_the_host(was: Callable[..., Any]) -> Callable[..., Any]:
    def strayed(*args: Any) -> Any:
        terms, metrics = was(*args)
        return terms.cpu(), metrics

    return strayed


def _terms_to_numpy(was: Callable[..., Any]) -> Callable[..., Any]:
    def strayed(*args: Any) -> Any:
        terms, metrics = was(*args)
        return terms, {"first": terms.detach().numpy()[0], **metrics}

    return strayed


def _look_at_the_loss(was: Callable[..., Any]) -> Callable[..., Any]:
    def strayed(*args: Any) -> Any:
        terms, metrics = was(*args)
        assert terms.sum() > 0
        return terms, metrics

    return strayed


def _indices_on_the_host(was: Callable[..., Any]) -> Callable[..., Any]:
    def strayed(log_p: Any, targets: Any) -> Any:
        slope = log_p.exp_()
        slope[torch.arange(len(targets)), targets] -= 1
        return slope

    return strayed


def _values_on_the_host(was: Callable[..., Any]) -> Callable[..., Any]:
    def strayed(update: Update, *args: Any) -> Any:
        for param in update.params:
            param.data.add_(torch.zeros(param.shape))
        return was(update, *args)

    return strayed


def _copied_from_pageable(was: Callable[..., Any]) -> Callable[..., Any]:
    return lambda value, device: value.to(device, non_blocking=True)


STRAYS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "forward-on-host": (bottleneck.Adapter, "forward", _forward_on_the_host),
    "forward-by-host": (bottleneck.Adapter, "forward", _forward_by_the_host),
    "drawn-by-host": (bottleneck.Adapter, "forward", _drawn_by_the_host),
    "terms-on-host": (SFT, "losses", _terms_on_the_host),
    "terms-to-numpy": (SFT, "losses", _terms_to_numpy),
    "look-at-loss": (SFT, "losses", _look_at_the_loss),
    "indices-on-host": (scoring, "_slope", _indices_on_the_host),
    "values-on-host": (Update, "step", _values_on_the_host),
    "copied-from-pageable": (objective, "sent", _copied_from_pageable),
}
"""Name -> what it is planted in, and how."""
