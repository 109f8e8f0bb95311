"""A result as its own loader reads it, against what the live model has left of itself: the tensors, then the logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.config import Run
from dsft.learned import Learned
from dsft.loaded import load
from dsft.published import PROBE

if TYPE_CHECKING:
    from torch import Tensor

BOUNDS = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest difference of the logits allowed, relative to the largest logit: another attention and batch layout round
otherwise (fp32 differs by 1e-6 where both are the same; bf16 has 8 bits)."""


def compare(run: Learned | Run, result: Path) -> dict[str, Any]:
    """The tensors of result and its logits, against those that the live model left in the probe.

    same: whether it is the model that was trained; different: what is not as it was, in words, if anything is.
    """
    import torch
    from safetensors import safe_open

    from dsft.models.routing import CHOICE

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with safe_open(result / PROBE, "pt") as probe:
        expected = {name: probe.get_tensor(name) for name in probe.keys()}  # no dict
        choices = [expected.pop(name) for name in sorted(expected) if name.startswith(CHOICE)]
        digest = probe.metadata()["digest"]
    read_digest, tensors = digest_of(result)
    found: dict[str, Any] = {"digest": read_digest, "tensors": tensors, "expected_digest": digest, "on": device.type}
    if read_digest != digest:
        return {
            **found,
            "different": f"other tensors: digest {read_digest} of {tensors}, expected {digest}",
            "same": False,
        }
    model = load(run, result, device).to(device)
    bf16 = run.train.precision == "bf16"
    logits = _logits(model, expected, bf16=bf16)
    found["diverged"] = _diverged(expected["logits"]) or _diverged(logits)
    if found["diverged"]:
        return {**found, "same": False}
    found |= {"positions": len(expected["kept"]), "probed": expected["tokens"].shape[1]}
    bound = BOUNDS[run.train.precision]
    found |= {"bound": bound, **judged(expected["logits"], logits, bound)}
    if not found["same"] and choices:
        found |= _with_choices(model, expected, choices, bound, bf16=bf16)
    return found


def judged(live: "Tensor", read: "Tensor", bound: float) -> dict[str, Any]:
    """Judge the logits read (1, P, V) of a result, where the live model gave live."""
    off = float((read - live).abs().max() / live.abs().max())
    different = None if off <= bound else f"other logits: logits_off {off:.3g}, bound {bound}"
    return {"logits_off": off, "same": off <= bound, "different": different}


def _with_choices(
    model: Any, probe: dict[str, "Tensor"], choices: "list[Tensor]", bound: float, *, bf16: bool
) -> dict[str, Any]:
    """Judge a model with experts by the logits that it gives with the choices of the live model.

    A router whose two best experts are nearly equal chooses otherwise where it is rounded otherwise, and the logits of
    that token are others. So the choices are those of the live model, and their scores must be this one's best but for
    rounding.
    """
    from dsft.models.routing import Compared

    routed = Compared(choices)
    try:
        with routed:
            logits = _logits(model, probe, bf16=bf16)
    except ValueError as error:
        return {"different": f"other choices of experts: {error}"}
    found = judged(probe["logits"], logits, bound)
    if found["same"] and routed.short > bound:
        said = f"other choices of experts: by {routed.short:.3g} of the largest score, bound {bound}"
        found |= {"same": False, "different": said}
    return {**found, "choices_off": routed.short}


def digest_of(result: Path) -> tuple[str, int]:
    """Digest and number of all tensors in the files of a result."""
    from safetensors import safe_open

    from dsft.checkpoint.digests import of_all, of_tensor

    tensors: dict[str, str] = {}
    for path in sorted(result.glob("*.safetensors")):
        if path.name != PROBE:
            with safe_open(path, "pt") as file:
                tensors |= {name: of_tensor(file.get_tensor(name)) for name in file.keys()}  # no dict
    return of_all(tensors), len(tensors)


def _logits(model: Any, probe: dict[str, "Tensor"], *, bf16: bool) -> "Tensor":
    """Logits (1, P, V) in fp32 of the positions kept; counted from the end, as PEFT puts a soft prompt before them."""
    import torch

    from dsft.models.calling import takes_rows

    tokens = probe["tokens"]
    device = next(model.parameters()).device
    kept = (probe["kept"] - tokens.shape[1]).to(device)
    known = {"logits_to_keep": kept} if takes_rows(_base(model)) else {}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16), _of_all_tokens(model) as given:
        logits: torch.Tensor = model(input_ids=tokens.to(device), **known).logits
    logits = given[-1] if given else logits
    return (logits if known else logits[:, kept]).float().cpu()


@contextmanager
def _of_all_tokens(model: Any) -> "Iterator[list[Tensor]]":
    """Yield a list that holds the head's outputs for every token (1, T, labels) after each call of the model inside.

    The class of the model itself returns the outputs of one token. The list stays empty for a language model.
    """
    from dsft.models.heads import head_name, is_classifier

    given: list[Tensor] = []
    base = _base(model)
    if not is_classifier(base):
        yield given
        return
    hook = base.get_submodule(head_name(base)).register_forward_hook(lambda module, args, output: given.append(output))
    try:
        yield given
    finally:
        hook.remove()


def _base(model: Any) -> Any:
    """The transformers model, without PEFT's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _diverged(logits: "Tensor") -> str | None:
    """Why logits (1, P, V) are of a model that has diverged: its values are what was trained, and say nothing."""
    if not bool(logits.isfinite().all()):
        return "its logits are not finite"
    if logits.shape[-1] > 1 and bool((logits == logits[..., :1]).all()):
        return "all its logits are equal"
    return None
