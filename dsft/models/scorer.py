"""The one place that calls a model on a batch."""

from typing import Any

import torch
from torch import Tensor, nn

from dsft.comm.devices import sent
from dsft.objective import Batch


class Scorer:
    """A model that scoring.install has prepared. packs: False where each segment must be a call of its own."""

    def __init__(self, module: nn.Module, *, packs: bool) -> None:
        self.module, self.packs = module, packs

    def score(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """(P,) float32: -log p in nats of each supervised target, given its own segment before it.

        temperature: what all logits are divided by. A batch without a supervised token gives an empty tensor that still
        has a gradient path.
        """
        return self._scores(batch, temperature=temperature)[0]

    def score_with_entropy(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """(2, P) float32: the scores, and below them the entropy in nats of each distribution, without a gradient."""
        return self._scores(batch, temperature=temperature, entropy=True)

    def _scores(self, batch: Batch, **how: Any) -> Tensor:
        """(1 or 2, P), as score and score_with_entropy give them."""
        if self.packs or len(batch.lengths) == 1:
            places = batch.supervised
            asked = {"logits_to_keep": places, "targets": batch.targets[places], **how}
            return self._call(batch.tokens, batch.positions, batch.lengths, asked)
        first, scores = 0, []
        parts = (part.split(batch.lengths) for part in (batch.tokens, batch.positions, batch.targets))
        for tokens, positions, targets, supervised in zip(*parts, batch.supervised.split(batch.answers), strict=True):
            places = supervised - first
            asked = {"logits_to_keep": places, "targets": targets[places], **how}
            scores.append(self._call(tokens, positions, (len(tokens),), asked))
            first += len(tokens)
        return torch.cat(scores, 1)

    def outputs(self, batch: Batch) -> Tensor:
        """(S, labels) float32: what the model's head gives of each segment, at its last token."""
        ends = sent(torch.tensor(batch.lengths).cumsum(0) - 1, batch.tokens.device)
        if self.packs or len(batch.lengths) == 1:
            return self._call(batch.tokens, batch.positions, batch.lengths, {"logits_to_keep": ends})
        parts = [part.split(batch.lengths) for part in (batch.tokens, batch.positions)]
        return torch.cat(
            [
                self._call(tokens, at, (len(tokens),), {"logits_to_keep": at[-1:]})
                for tokens, at in zip(*parts, strict=True)
            ]
        )

    def _call(self, tokens: Tensor, positions: Tensor, lengths: tuple[int, ...], asked: dict[str, Any]) -> Tensor:
        """Call the model on one row: scores (1 or 2, P) where it is asked for targets, else outputs (S, labels).

        asked: what the model is given beside the row.
        """
        logits: Tensor = self.module(
            input_ids=tokens[None],
            position_ids=positions[None],
            segment_lengths=lengths,
            use_cache=False,
            **asked,
        ).logits
        return logits if "targets" in asked else logits[0]
