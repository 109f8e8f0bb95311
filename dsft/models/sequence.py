"""A call of a model with a head of its own for a whole sequence, as transformers' *ForSequenceClassification.

The library's class gives what its head says of the last token that is no padding. Here the model is called with the
tokens whose outputs are wanted, the last of each segment: nothing is padded, and no token is taken for padding.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dsft.models.calling import Fitted, require_prefixes
from dsft.models.family import Family


def install(model: Any, head: str, family: Family) -> None:
    """Let model, called with the places logits_to_keep (P,) of a row, give logits (1, P, labels), float32, of each.

    Called with states=True it gives the states (1, P, width) that the head is given.
    """
    require_prefixes(model, family)
    model.forward = _Call(model, head, Fitted(model.base_model, family))


class _Call:
    """A model's forward pass, in place of its class's own. fitted: leaves out of a call what its body does not take."""

    def __init__(self, model: Any, head: str, fitted: Fitted) -> None:
        self.model, self.head, self.fitted = model, head, fitted

    def __call__(
        self, input_ids: Tensor, logits_to_keep: Tensor, *, targets: Tensor | None = None, states: bool = False,
        **call: Any,
    ) -> Any:  # fmt: skip
        """Logits of the tokens at logits_to_keep. targets: which a count of memory gives every model; not used."""
        from transformers.modeling_outputs import SequenceClassifierOutputWithPast

        body = self.model.base_model
        _, call = self.fitted.begin(body, (), call)
        hidden = body(input_ids=input_ids, **call)[0][:, logits_to_keep]
        if states:
            return SequenceClassifierOutputWithPast(logits=hidden.float())
        head: nn.Module = self.model.get_submodule(self.head)
        weight = next(head.parameters())
        with torch.autocast(hidden.device.type, enabled=False):
            return SequenceClassifierOutputWithPast(logits=head(hidden.to(weight.dtype)).float())
