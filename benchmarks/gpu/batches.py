"""Micro-batches without a tokenizer: examples of lengths like GSM8K's in a large vocabulary, or of one length."""

import numpy as np
import torch

from dsft.objective import IGNORE, Batch

MEAN, SPREAD, FEWEST, MOST = 205.0, 75.0, 60, 512
"""Tokens of an example of GSM8K as a chat under Llama 3's tokenizer, about: question, answer, and the chat's own."""
SUPERVISED = 0.55
"""Share of an example's tokens that are its answer."""


def ragged(tokens: int, vocabulary: int, *, seed: int, device: torch.device | None = None) -> Batch:
    """Examples of drawn lengths, tokens in all."""
    dice, lengths = np.random.default_rng(seed), list[int]()
    while (left := tokens - sum(lengths)) > 0:
        length = int(np.clip(dice.normal(MEAN, SPREAD), FEWEST, MOST))
        lengths.append(length if left - length >= FEWEST else left)
    return laid_out(lengths, vocabulary, SUPERVISED, seed=seed, device=device)


def laid_out(
    lengths: list[int], vocabulary: int, supervised: float, *, seed: int, device: torch.device | None = None
) -> Batch:
    """Random tokens of these lengths end to end; the last part of each carries loss."""
    dice = np.random.default_rng(seed)
    tokens = torch.from_numpy(dice.integers(0, vocabulary, sum(lengths)))
    targets = []
    for example in tokens.split(lengths):
        target = torch.roll(example, -1)
        target[: len(example) - max(2, round(supervised * len(example)))] = IGNORE
        target[-1] = IGNORE
        targets.append(target)
    positions = torch.cat([torch.arange(length) for length in lengths])
    names = tuple(f"{seed}-{index}" for index in range(len(lengths)))
    batch = Batch(
        tokens, positions, torch.cat(targets), tuple(lengths), names, tuple(range(len(names))), (1,) * len(names)
    )
    return batch if device is None else batch.to(device)
