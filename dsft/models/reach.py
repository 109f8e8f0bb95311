"""How many positions a model knows, by its configuration."""

from typing import Any


def reach(shape: Any) -> int | None:
    """Positions of a model of this configuration; None where it sets no end: no number, or one below 1 (XLNet's -1)."""
    known: int | None = getattr(shape, "max_position_embeddings", None)
    return known if known is not None and known > 0 else None
