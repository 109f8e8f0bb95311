"""A result as its own loader reads it, against what the live model has left of itself: the tensors, then the logits."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft.config import Run
from dsft.learned import Learned
from dsft.loaded import load
from dsft.published import PROBE

if TYPE_CHECKING:
    from torch import Tensor

    from dsft.models.routing import Compared


BOUNDS = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest difference of the logits allowed, relative to the largest logit: another attention and batch layout round
otherwise (fp32 differs by 1e-6 where both are the same; bf16 has 8 bits)."""


ROUNDED = 8
"""Times that a model computes anew, each time rounded otherwise, where bf16 has left the bound."""
NOISE = 2.0**-8
"""The relative change of each number between two blocks in such a pass: the last bit of bf16."""
TIMES = 2.0
"""How far a position's logits may be off, in the largest change that such rounding has shown for that position."""
BEYOND = 32
"""The proof allows one position in so many to be further off than TIMES."""
SCORES = {"fp32": 1e-4, "bf16": 2e-1}
"""Largest difference of the scores by which experts are chosen, relative to the largest, or TIMES what rounding does.

In bf16 honest results of 34 families had 0.10 at most, those that lack a correction bias 0.47 to 0.69."""


def compare(run: Learned | Run, result: Path) -> dict[str, Any]:
    """The tensors of result and its logits, against those that the live model left in the probe.

    same: whether it is the model that was trained; different: what is not as it was, in words, if anything is.
    """
    import torch
    from safetensors import safe_open

    from dsft.models.routing import Compared, OtherChoicesError

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with safe_open(result / PROBE, "pt") as probe:
        expected = {name: probe.get_tensor(name) for name in probe.keys()}  # no dict
        choices = Compared(expected)
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
    bf16, routed = run.train.precision == "bf16", choices if choices.kept else nullcontext()
    try:
        with routed:
            logits = _logits(model, expected, bf16=bf16)
    except OtherChoicesError as error:
        return {**found, "different": f"other choices of experts: {error}", "same": False}
    found["diverged"] = _diverged(expected["logits"]) or _diverged(logits)
    if found["diverged"]:
        return {**found, "same": False}
    bound = BOUNDS[run.train.precision]
    found |= {"positions": len(expected["kept"]), "probed": expected["tokens"].shape[1], "bound": bound}
    again = _rounded_otherwise(model, expected, routed) if bf16 else iter(())
    found |= judged(expected["logits"], logits, bound, again)
    return found | _routed(choices, again, SCORES[run.train.precision]) if choices.kept and found["same"] else found


def _routed(choices: "Compared", again: "Iterator[Tensor]", bound: float) -> dict[str, Any]:
    """Judge the scores by which a model would have chosen its experts, where it was given the live model's choices.

    A router whose two best experts are nearly equal chooses otherwise where it is rounded otherwise, and the logits of
    that token are others: so the logits that are compared are those of the live model's choices. again: the passes that
    are rounded otherwise, which are made only where the scores are further off than bound.
    """
    off = choices.off
    if off > bound:
        for _ in again:
            pass
        bound = max(bound, TIMES * choices.moved)
    said = f"other scores of experts: scores_off {off:.3g}, bound {bound:.3g}"
    return {"scores_off": off} if off <= bound else {"scores_off": off, "same": False, "different": said}


def judged(live: "Tensor", read: "Tensor", bound: float, again: "Iterator[Tensor]") -> dict[str, Any]:
    """Judge the logits read (1, P, V) of a result, where the live model gave live.

    again: what the result gives where it is rounded otherwise. Where a position is further off than bound, it is held
    to what rounding does to that very position: recurrences and many layers make much of a last bit.
    """
    import torch

    largest = live.abs().max()
    off = (read - live).abs().amax(-1)[0] / largest  # (P,)
    found = {"logits_off": float(off.max()), "same": bool(off.max() <= bound), "different": None}
    if found["same"]:
        return found
    allowed = torch.full_like(off, bound)
    spread = [(other - read).abs().amax(-1)[0] / largest for other in again]
    if spread:
        allowed = torch.maximum(allowed, TIMES * torch.stack(spread).amax(0))
    beyond, most = int((off > allowed).sum()), len(off) // BEYOND if spread else 0
    if beyond <= most:
        return {**found, "beyond": beyond, "same": True}
    where = (
        f"{beyond} of {len(off)} positions beyond what rounding does, {most} allowed" if spread else f"bound {bound}"
    )
    return {**found, "beyond": beyond, "different": f"other logits: logits_off {found['logits_off']:.3g}, {where}"}


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
        logits: torch.Tensor = model(input_ids=tokens.to(device), use_cache=False, **known).logits
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


def _rounded_otherwise(model: Any, probe: dict[str, "Tensor"], routed: Any) -> "Iterator[Tensor]":
    """The logits of a model, ROUNDED times, what goes from block to block changed in its last bit.

    routed: the context of the live model's choices, if it has any.
    """
    import torch

    from dsft.models.anatomy import dissect

    base = _base(model)
    anatomy = dissect(base)
    generator = torch.Generator().manual_seed(0)

    def rounded(module: Any, args: Any, output: Any) -> Any:
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        noise = torch.randn(hidden.shape, generator=generator).to(hidden.device)
        hidden = hidden * (1 + NOISE * noise).to(hidden.dtype)
        return (hidden, *rest) if isinstance(output, tuple) else hidden

    places = (anatomy.embedding, *anatomy.blocks[:-1])
    hooks = [base.get_submodule(name).register_forward_hook(rounded) for name in places]
    for _ in range(ROUNDED):
        with routed:
            logits = _logits(model, probe, bf16=True)
        yield logits
    for hook in hooks:
        hook.remove()


def _diverged(logits: "Tensor") -> str | None:
    """Why logits (1, P, V) are of a model that has diverged: its values are what was trained, and say nothing."""
    if not bool(logits.isfinite().all()):
        return "its logits are not finite"
    if logits.shape[-1] > 1 and bool((logits == logits[..., :1]).all()):
        return "all its logits are equal"
    return None
