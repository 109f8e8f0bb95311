"""An examination of a model's own class on a small copy of it, on CPU, in seconds: how its examples must be computed.

Three examples, longer than each window, chunk and original rope length of the copy, are scored by the class as
transformers calls it, one by one; and by dsft in one row, one by one with its own attention, and one by one with the
class's. The first of these that gives the same scores and gradients, and for which an example changes nothing of
another, is the verdict. Randomness, recomputation, tensors that a build on meta loses, and buffers that a result would
lack are looked at on the way.
"""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsft.engine.head_trial import require_head
from dsft.engine.scored import Found, apart, evaluated, off, one_by_one, scored
from dsft.engine.trial_models import UnfitError, built, by_class, write
from dsft.models.anatomy import dissect
from dsft.models.build import OwnAttentionError, build_meta
from dsft.models.family import Family
from dsft.models.files import ModelFiles
from dsft.models.small import NoCopyError, fill, small_copies, still
from dsft.models.spans import UnheldError
from dsft.models.values import open_values

LENGTHS = (37, 11, 40)
"""Tokens of each example: all examples are longer than SPAN, and one is shorter than ROPE (models.small)."""
SAME, ALIKE = 1e-5, 1e-4
"""Largest differences relative to the largest value: of what must not change by a bit but rounding, and of another
order of computation. Honest classes differ by some 1e-7; one that mixes examples by 1e-3 and more.
"""
ROUGH = 5e-2
"""Largest relative difference of gradients: where a class keeps no more than the largest values of a layer, rounding
decides which values these are.
"""


def examine(files: ModelFiles) -> Family:
    """The verdict on the class and configuration of files. Raises ValueError for a model that dsft cannot hold."""
    labels, files = files.labels, replace(files, labels=())  # the body is what can mix examples, whatever its head
    with _apart_from_all():
        tried: BaseException
        try:
            for config in small_copies(files.config, lambda config: _on_meta(files, config)):
                try:
                    family = _examine(files, config)
                    if labels:
                        require_head(replace(files, config=config, labels=labels))
                    return family
                except _UnusableError as error:
                    tried = error.__cause__ or error
        except NoCopyError as error:
            tried = error.__cause__ or error
            if isinstance(tried, ValueError) and str(tried).startswith("model "):  # ours
                raise tried from None
    raise ValueError(
        f"model {files.name_or_path} must compute in a small copy of it, which is examined before weights load, got "
        f"{type(files.config).__name__.removesuffix('Config')} ({files.config.model_type}): {_line(tried)}; check "
        "model.config and config.json, or use another model"
    )


class _UnusableError(Exception):
    """A small copy does not compute as transformers itself calls it."""


def _examine(files: ModelFiles, config: Any) -> Family:
    still(config)
    with tempfile.TemporaryDirectory() as folder:
        try:
            reference = by_class(files, config, "eager")
            fill(reference)
            examples = [torch.randint(3, config.get_text_config().vocab_size - 2, (length,)) for length in LENGTHS]
            truth = one_by_one(reference, examples)
            evaluated(reference, examples[-1])
            write(reference, Path(folder))
        except Exception as error:  # whatever the class raises over this configuration
            raise _UnusableError from error
        _require_still(files, reference, examples, truth)
        _require_causal(files, reference, examples[-1], truth.scores[-1])
        small = replace(files, config=config, folder=Path(folder), name_or_path=files.name_or_path, init="pretrained")
        library = _library(files, config, reference, examples, truth)
        reasons: list[str] = []
        packed = Family(model_type=files.config.model_type, library=library)
        for family in (packed, replace(packed, packs=False), replace(packed, packs=False, attention=library)):
            try:
                return _accepted(family, small, examples, truth, reasons)
            except UnfitError as error:
                reasons.append(str(error))
            except OwnAttentionError:
                reasons.append(f"{type(reference).__name__} computes attention itself")
            except UnheldError as error:
                reasons.append(str(error))
            except Exception as error:  # a class's own, of any kind, over a call that it does not know
                reasons.append(_line(error))
    raise ValueError(
        f"model {files.name_or_path} must compute here as its own class does, got {type(reference).__name__}: "
        f"{reasons[-1]}; use another model"
    )


def _accepted(
    family: Family, small: ModelFiles, examples: Sequence[Tensor], truth: Found, reasons: Sequence[str]
) -> Family:
    """The verdict, if this way computes what the class does. Raises UnfitError if it does not."""
    model = built(small, family)
    with _calls(model) as graded:
        first = scored(model, examples, packed=family.packs)
    if family.packs:
        _require_apart(model, family, examples, first)
    _require_alike(first, truth)
    _require_held(model, small)
    return replace(
        family,
        reason=reasons[0] if reasons else "",
        recomputes=_recomputes(small, family, examples, first),
        whole=_loads(small, family, model, examples, truth),
        graded=all(graded),
        bf16=_computes_in_bf16(small, family, examples, learns=False),
        bf16_whole=_computes_in_bf16(small, family, examples, learns=True),
    )


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[bool]]:
    """Inside, the list grows by each call of a block: True if autograd records it."""
    graded: list[bool] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_: graded.append(torch.is_grad_enabled()))
        for name in dissect(model).blocks
    ]
    yield graded
    for hook in hooks:
        hook.remove()


def _require_still(files: ModelFiles, reference: nn.Module, examples: Sequence[Tensor], truth: Found) -> None:
    """Require that the same examples give the same scores in training."""
    if (most := off(one_by_one(reference, examples).scores, truth.scores)) > SAME:
        raise ValueError(
            f"model {files.name_or_path} must give the same twice, got {type(reference).__name__}, whose forward pass "
            f"draws random numbers in training ({most:.0%} of the largest score apart): its losses would depend on "
            "ranks and micro-batches; set what draws them to 0 by model.config, or use another model"
        )


def _require_causal(files: ModelFiles, reference: nn.Module, example: Tensor, scores: Tensor) -> None:
    """Require that the last token of an example changes no score but its own."""
    after = one_by_one(reference, [torch.cat([example[:-1], 1 + example[-1:]])]).scores[0]
    if off([after[:-1]], [scores[:-1]]) > SAME:
        raise ValueError(
            f"model {files.name_or_path} must be causal, got {type(reference).__name__} ({files.config.model_type}), "
            "whose tokens see what follows them; set model.config.is_decoder=true where the class knows it, or use "
            "another model"
        )


def _require_alike(found: Found, truth: Found) -> None:
    for index, (mine, theirs) in enumerate(zip(found.scores, truth.scores, strict=True), start=1):
        if not (most := off([mine], [theirs])) <= ALIKE:
            raise UnfitError(f"example {index} scores otherwise than by the class itself, by {most:.1%} of the largest")
    if (most := apart(found.grads, truth.grads)) > ROUGH:
        raise UnfitError(f"its gradient is off by {most:.1%}")


def _require_apart(model: nn.Module, family: Family, examples: Sequence[Tensor], first: Found) -> None:
    """Require that an example of a row changes nothing of those behind it, nor of those before."""
    before = first.scores
    for index in (0, len(examples) - 1):
        changed = [example.flip(0) if at == index else example for at, example in enumerate(examples)]
        after = scored(model, changed, packed=True).scores
        others = [at for at in range(len(examples)) if at != index]
        if (most := off([after[at] for at in others], [before[at] for at in others])) > SAME:
            raise UnfitError(f"examples in a row read each other: one changes another's scores by {most:.0%}")


def _require_held(model: nn.Module, small: ModelFiles) -> None:
    """Require that the values of the folder are those of the model, buffers included."""
    values = open_values(small, torch.float32, 0)
    for name, tensor in model.state_dict().items():
        if name in values and not torch.equal(values.full(name), tensor):
            raise UnfitError(f"{name} does not hold what its folder has")


def _recomputes(small: ModelFiles, family: Family, examples: Sequence[Tensor], first: Found) -> bool:
    try:
        model = built(small, family, again=True)
        found = scored(model, examples, packed=family.packs)
    except Exception:  # a class's own, of any kind: then it is not to be computed again
        return False
    return off(found.scores, first.scores) <= SAME and apart(found.grads, first.grads) <= ALIKE


def _computes_in_bf16(small: ModelFiles, family: Family, examples: Sequence[Tensor], *, learns: bool) -> bool:
    """True if the class gives finite scores and a gradient under autocast to bf16, its weights learning or frozen."""
    try:
        model = built(small, family, dtype=torch.float32 if learns else torch.bfloat16)
        if not learns:
            model.requires_grad_(False)
            embedding = model.get_submodule(dissect(model).embedding)
            embedding.register_forward_hook(lambda module, args, out: out.requires_grad_().clone())
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            found = scored(model, examples, packed=family.packs)
    except Exception:  # a class's own, of any kind, over numbers of two types
        return False
    return all(bool(scores.isfinite().all()) for scores in found.scores)


def _loads(small: ModelFiles, family: Family, model: Any, examples: Sequence[Tensor], truth: Found) -> bool:
    """True if the model's tensors, written as a whole result has them, are the model where transformers loads them."""
    from transformers import AutoModelForCausalLM

    assert small.folder is not None
    write(model, small.folder)
    try:
        read = AutoModelForCausalLM.from_pretrained(
            small.folder, dtype=torch.float32, attn_implementation=family.library,
            trust_remote_code=small.trust_remote_code,
        )  # fmt: skip
        found = one_by_one(read.train(), examples)
    except Exception:  # transformers' own, of any kind, over names that it does not know
        return False
    return off(found.scores, truth.scores) <= ALIKE


def _library(files: ModelFiles, config: Any, reference: nn.Module, examples: Sequence[Tensor], truth: Found) -> str:
    """Name of the attention of transformers that computes what the eager one does, sdpa where it can."""
    try:
        model = by_class(files, config, "sdpa")
        model.load_state_dict(reference.state_dict())
        found = one_by_one(model, examples)
    except Exception:  # a class without it
        return "eager"
    return "sdpa" if off(found.scores, truth.scores) <= ALIKE else "eager"


def _on_meta(files: ModelFiles, config: Any) -> nn.Module:
    return build_meta(replace(files, config=config), torch.float32, "eager")


def _line(error: BaseException) -> str:
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextmanager
def _apart_from_all() -> Iterator[None]:
    """Inside, gradients are kept, nothing is cast, random streams are others, and transformers is silent."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.inference_mode(mode=False):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
