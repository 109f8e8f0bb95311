"""A base as training saw it, and a result on it, by the loader of its format: PEFT's, that of transformers, ours."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.config import Run
from dsft.examined import family_of
from dsft.headed import labels_of
from dsft.learned import Learned
from dsft.protocols import Method

if TYPE_CHECKING:
    import torch


def unpacked_base(run: Learned | Run, packed_on: "torch.device | None" = None, *, labels: tuple[str, ...] = ()) -> Any:
    """The base in the dtype of train.precision, each weight that training had packed as unpacking gives it; on CPU.

    packed_on: the device that packs and unpacks; None is the CPU. labels: of a head for sequences, whose values are the
    folder's if it has such a head, else any.
    """
    from dsft.engine.precision import DTYPES

    files = run.model.resolve()
    loader, named = _loader(labels)
    with _silent() if labels else contextlib.nullcontext():
        base: Any = loader.from_pretrained(
            files.folder,
            dtype=DTYPES[run.train.precision],
            trust_remote_code=files.trust_remote_code,
            use_safetensors=True,
            attn_implementation=family_of(files).library,
            **named,
        )
    if packed_on is not None:
        base.to(packed_on)
    _unpack(run, base)
    return base.cpu()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Inside, transformers does not report the head that a base has not, whose values come next."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _loader(labels: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """The class of transformers that loads a model with these labels, and what it is told of them."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if not labels:
        return AutoModelForCausalLM, {}
    names = dict(enumerate(labels))
    return AutoModelForSequenceClassification, {
        "num_labels": len(labels), "id2label": names, "label2id": {name: index for index, name in names.items()},
        "ignore_mismatched_sizes": True,
    }  # fmt: skip


def _unpack(run: Learned | Run, base: Any) -> None:
    """Replace each weight that training had packed by what unpacking it gives."""
    import torch

    from dsft.models.anatomy import dissect
    from dsft.packed import PACKED, packed_weights

    before = {name: (module, dict(module._parameters)) for name, module in base.named_modules()}
    run.quantization.convert(base, dissect(base))
    for name, module in [(name, module) for name, module in base.named_modules() if packed_weights(module)]:
        plain, params = before[name]
        for key, weight in packed_weights(module).items():
            parts = [module.get_parameter(part) for part in weight.parts]
            with torch.no_grad():
                params[key].data = weight.unpack(parts, weight.compute_dtype or weight.dtype).to(weight.dtype)
        plain._parameters, plain.__dict__[PACKED] = params, {}
        if plain is not module:
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, plain)


def load(run: Learned | Run, result: Path, packed_on: "torch.device | None" = None) -> Any:
    """The result on its base (as training saw it), by the loader of its format (PEFT, transformers, ours), on CPU.

    packed_on: where training packed a packed base; a GPU rounds some of its weights to other levels than a CPU.
    """
    from dsft.engine.precision import DTYPES
    from dsft.models.anatomy import dissect

    labels = labels_of(result)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        if run.method.whole:
            files = run.model.resolve()
            loader, _ = _loader(labels)
            model: Any = loader.from_pretrained(
                result,
                dtype=DTYPES[run.train.precision],
                trust_remote_code=files.trust_remote_code,
                use_safetensors=True,
                attn_implementation=family_of(files).library,
            )
            return run.method.restored(model, dissect(model), result).eval()
        return put(unpacked_base(run, packed_on, labels=labels), result, run.method).eval()


def put(base: Any, result: Path, method: Method | None) -> Any:
    """The adapter in result on base, which is changed, by the loader of its format: PEFT's or ours.

    method: that trained it, None where nobody knows, which is then all that the format says.
    """
    from dsft.methods import native, peft_bridge
    from dsft.methods.patterns import check_config
    from dsft.models.anatomy import dissect

    anatomy = dissect(base)
    if native.holds(result):
        return native.load(base, anatomy, result)
    described = json.loads((result / "adapter_config.json").read_text(encoding="utf-8"))
    check_config(described, result)
    if peft_bridge.names_packed(base, described):
        if method is None:
            raise ValueError("it adapts weights that are packed here, and no run says by which method; give the run")
        return peft_bridge.attached(base, anatomy, result, method)
    model = peft_bridge.load(base, result)
    return model if method is None else method.restored(model, anatomy, result)
