"""A base as training saw it, and a result on it, by the loader of its format: PEFT's, that of transformers, ours."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.config import Run
from dsft.examined import family_of
from dsft.learned import Learned
from dsft.protocols import Method

if TYPE_CHECKING:
    import torch


def unpacked_base(run: Learned | Run, packed_on: "torch.device | None" = None) -> Any:
    """The base in the dtype of train.precision, each weight that training had packed as unpacking gives it; on CPU.

    packed_on: the device that packs and unpacks; None is the CPU.
    """
    from transformers import AutoModelForCausalLM

    from dsft.engine.precision import DTYPES

    files = run.model.resolve()
    base: Any = AutoModelForCausalLM.from_pretrained(
        files.folder,
        dtype=DTYPES[run.train.precision],
        trust_remote_code=files.trust_remote_code,
        use_safetensors=True,
        attn_implementation=family_of(files).library,
    )
    if packed_on is not None:
        base.to(packed_on)
    _unpack(run, base)
    return base.cpu()


def _unpack(run: Learned | Run, base: Any) -> None:
    """Replace each weight that training had packed by what unpacking it gives."""
    import torch

    from dsft.models.anatomy import dissect
    from dsft.protocols import PackedLinear

    plain = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    run.quantization.convert(base, dissect(base))
    for name, module in list(base.named_modules()):
        if isinstance(module, PackedLinear):
            linear = plain[name]
            linear.weight.data = module.unpack().to(linear.weight.dtype)
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, linear)


def load(run: Learned | Run, result: Path, packed_on: "torch.device | None" = None) -> Any:
    """The result on its base (as training saw it), by the loader of its format (PEFT, transformers, ours), on CPU.

    packed_on: where training packed a packed base; a GPU rounds some of its weights to other levels than a CPU.
    """
    from transformers import AutoModelForCausalLM

    from dsft.engine.precision import DTYPES
    from dsft.models.anatomy import dissect

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        if run.method.whole:
            files = run.model.resolve()
            model: Any = AutoModelForCausalLM.from_pretrained(
                result,
                dtype=DTYPES[run.train.precision],
                trust_remote_code=files.trust_remote_code,
                use_safetensors=True,
                attn_implementation=family_of(files).library,
            )
            return run.method.restored(model, dissect(model), result).eval()
        return put(unpacked_base(run, packed_on), result, run.method).eval()


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
    check_config(json.loads((result / "adapter_config.json").read_text(encoding="utf-8")), result)
    model = peft_bridge.load(base, result)
    return model if method is None else method.restored(model, anatomy, result)
