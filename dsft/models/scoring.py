"""A causal model that scores: called with targets, its logits are -log p of each target, and no vocabulary is kept.

Called with temperature too, all logits are divided by it; called with entropy=True, the entropy of each row's
distribution stands below the scores. Both stand in one tensor, as FSDP2 hooks what a model returns.

The head's product, log-softmax and the gradient of both are made for some rows at a time, so that memory is free of
rows x vocabulary. A model that changes its logits after its head (soft cap, scale), or whose head is adapted, computes
whole logits first.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsft.models.calling import takes_rows

AT_ONCE = 2**25
"""Logits that exist at a time: 128 MiB in fp32."""


def install(model: nn.Module, head: nn.Module) -> None:
    """Let model take targets (S,) beside logits_to_keep (S,) and give logits (1, S) float32, each -log p in nats.

    With entropy=True it gives (2, S): below them the entropy in nats, which has no gradient.
    """
    scorer = _Scorer(head, direct=type(head) is nn.Linear and takes_rows(model) and _ends_with(model, head))
    head.forward = scorer.head  # type: ignore[method-assign]
    model.register_forward_pre_hook(scorer.begin, with_kwargs=True)
    model.register_forward_hook(scorer.end)


def _ends_with(model: Any, head: nn.Linear) -> bool:
    """True if model hands out its head's product untouched: tried on meta, without its blocks."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    base = model.base_model
    if base is model or not head.weight.is_meta:
        return False
    made: list[Tensor] = []

    def product(hidden: Tensor) -> Tensor:
        made.append(F.linear(hidden, head.weight, head.bias))
        return made[0]

    def states(input_ids: Any = None, *_: Any, inputs_embeds: Any = None, **__: Any) -> Any:
        rows = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        hidden = torch.empty(1, rows, head.in_features, dtype=head.weight.dtype, device="meta")
        return MoeModelOutputWithPast(last_hidden_state=hidden)

    base.forward = states
    head.forward = product  # type: ignore[method-assign, assignment]
    try:
        logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=False).logits
    except Exception:  # whatever a model's own code can raise over a call without its blocks: then nothing is known
        return False
    finally:
        del base.forward, head.forward
    return bool(made) and logits is made[0] and made[0]._version == 0


class _Scorer:
    """targets: of the call that is going on, None if it is to give logits."""

    def __init__(self, head: nn.Module, *, direct: bool) -> None:
        self.product, self.module, self.direct = head.forward, head, direct
        self.targets: Tensor | None = None
        self.temperature, self.entropy = 1.0, False

    def begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Keep targets, temperature and entropy from the model's own forward."""
        self.targets = kwargs.pop("targets", None)
        self.temperature, self.entropy = kwargs.pop("temperature", 1.0), kwargs.pop("entropy", False)
        return args, kwargs

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden (1, S, H) -> scores (1, S), with entropies below (2, S), or logits (1, S, V)."""
        if self.targets is None or not self.direct:
            logits: Tensor = self.product(hidden)
            return logits
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        weight, bias = self.module.weight, self.module.bias
        how = (self.temperature, self.entropy)
        return _Score.apply(hidden[0].to(dtype), weight, bias, self.targets, how)  # type: ignore[no-any-return]

    def end(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Scores from whole logits where the head could not give them."""
        if self.targets is not None and not self.direct:
            logits = output.logits[0].float()
            log_p = (logits if self.temperature == 1 else logits / self.temperature).log_softmax(-1)
            scores = [F.nll_loss(log_p, self.targets, reduction="none")]
            scores += [_entropy(log_p.detach())] if self.entropy else []
            output.logits = torch.stack(scores)  # FSDP2 hooks what a model returns, which a view may lose
        self.targets = None
        return output


class _Score(torch.autograd.Function):
    """-log softmax((h W^T + b) / t)[target] per row: h (S, H), W (V, H), targets (S,), t > 0 -> (1, S) float32.

    how: t, and whether the entropy of each row's softmax is a second row of the output, which has no gradient. A frozen
    head's gradient to h is made in forward, while the logits are there; one that learns has its logits made again in
    backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        how: tuple[float, bool],
    ) -> Tensor:
        temperature, entropy = how
        ctx.learns, ctx.temperature = ctx.needs_input_grad[1] or ctx.needs_input_grad[2], temperature
        scores = torch.empty(1 + entropy, len(targets), dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden) if ctx.needs_input_grad[0] and not ctx.learns else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, product, cast in _blocks(hidden, weight, bias, temperature):
                log_p = product.log_softmax(-1)
                scores[0, rows] = -log_p.gather(1, targets[rows, None])[:, 0]
                if entropy:
                    scores[1, rows] = _entropy(log_p)
                if grads is not None:
                    torch.mm(_slope(log_p, targets[rows]).to(hidden.dtype), cast, out=grads[rows])
        ctx.save_for_backward(*((hidden, weight, bias, targets) if ctx.learns else (grads,)))
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad = grad[0] / ctx.temperature
        if not ctx.learns:
            (grads,) = ctx.saved_tensors
            return (grads * grad[:, None]).to(grads.dtype), None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        with torch.autocast(grad.device.type, enabled=False):
            for rows, product, cast in _blocks(hidden, weight, bias, ctx.temperature):
                slope = _slope(product.log_softmax(-1), targets[rows]).mul_(grad[rows, None])
                if grad_bias is not None:
                    grad_bias += slope.sum(0)
                slope = slope.to(hidden.dtype)
                torch.mm(slope, cast, out=grad_hidden[rows])
                grad_weight += slope.T @ hidden[rows]
        bias_too = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), bias_too, None, None


def _blocks(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Any:
    """(rows, their logits (rows, V) float32 / temperature, W as it was used), AT_ONCE logits at a time."""
    size = max(1, AT_ONCE // len(weight))
    weight = weight.to(hidden.dtype)
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        logits = F.linear(hidden[rows], weight, None if bias is None else bias.to(hidden.dtype))
        logits = logits.float()
        yield rows, logits if temperature == 1 else logits.div_(temperature), weight


def _entropy(log_p: Tensor) -> Tensor:
    """(rows,): - sum p log p in nats; a token of which p is 0 adds nothing."""
    found: Tensor = torch.special.entr(log_p.exp()).sum(-1)
    return found


def _slope(log_p: Tensor, targets: Tensor) -> Tensor:
    """d(-log p) / d(logits) = softmax - one-hot, in the memory of log_p (rows, V)."""
    slope = log_p.exp_()
    slope[torch.arange(len(targets), device=targets.device), targets] -= 1
    return slope
