"""Digests of tensors: what was written is what is read."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor


def of_tensor(value: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    head = f"{value.dtype} {tuple(value.shape)} ".encode()
    return hashlib.sha256(head + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def of_all(tensors: Mapping[str, str]) -> str:
    """SHA-256 of name -> digest, in the order of names."""
    return hashlib.sha256(json.dumps(dict(tensors), sort_keys=True).encode()).hexdigest()
