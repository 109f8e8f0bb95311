"""The row that proves a result lies past all lengths at which a model computes otherwise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from dsft.data.tokens import TokenSet
from dsft.engine.probe import probe_row

ARRAYS = {"tokens": np.arange(65, dtype=np.int32), "mask": np.ones(65, dtype=bool), "offsets": np.array([0, 5, 45, 65])}
ROWS = TokenSet(Path(), ("rows",), {**ARRAYS, "rows": np.arange(3)})
"""Three examples, of 5, 40 and 20 tokens: 0 to 64."""

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 200}


@pytest.mark.parametrize(
    ("kind", "numbers", "max_length", "positions", "size", "kept"),
    [
        ("llama", {}, 512, 0, 64, range(64)),
        ("llama", {}, 50, 0, 50, range(50)),
        ("llama", {"max_position_embeddings": 40}, 512, 8, 32, range(32)),
        ("mistral", {"sliding_window": 100}, 512, 0, 148, [*range(16), *range(100, 148)]),
        ("mistral", {"sliding_window": 512}, 512, 0, 64, range(64)),
        ("mistral", {"sliding_window": 100}, 120, 0, 120, [*range(16), *range(72, 120)]),
        ("llama", {"rope_parameters": YARN}, 512, 0, 248, [*range(16), *range(200, 248)]),
        ("llama4_text", {"attention_chunk_size": 300}, 512, 0, 348, [*range(16), *range(300, 348)]),
        (
            "mistral", {"sliding_window": 100, "rope_parameters": YARN}, 512, 0, 248,
            [*range(16), *range(100, 116), *range(200, 248)],
        ),
    ],
)  # fmt: skip
def test_a_row_is_past_every_window_chunk_and_original_length(
    kind: str, numbers: dict[str, Any], max_length: int, positions: int, size: int, kept: Any
) -> None:
    row = probe_row(AutoConfig.for_model(kind, **numbers), ROWS, max_length, positions)
    assert row.tokens.tolist() == [*range(5, 65), *list(range(65)) * 9][:size], "the longest, then those after it"
    assert row.kept.tolist() == list(kept)
