"""The one place that lets a model write: for the exact match of an evaluation, and for chat."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    device: torch.device,
    temperature: float = 0.0,
    **settings: Any,
) -> list[str]:
    """Answer each prompt (T,) int64, all side by side: shorter ones are padded on the left.

    temperature: 0 takes the likeliest token each time, above 0 one of all tokens is drawn. settings: further ones of
    transformers' own generate (streamer, eos_token_id, synced_gpus). Special tokens and outer blanks are dropped.
    """
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = torch.full((len(prompts), width), 0 if pad is None else pad)
    mask = torch.zeros_like(tokens)
    for index, prompt in enumerate(prompts):
        tokens[index, width - len(prompt) :] = prompt
        mask[index, width - len(prompt) :] = 1
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": 0}
    out = model.generate(
        input_ids=tokens.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        use_cache=True,
        pad_token_id=pad,
        **settings,
    )
    texts: list[str] = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]
