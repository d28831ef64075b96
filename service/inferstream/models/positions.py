"""Where a model's positions start, and so how many tokens it can take."""

from __future__ import annotations

from typing import Any

OFFSET_POSITIONS = frozenset(("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer"))
"""Model types that count positions from the padding id + 1, over the tokens that are not the padding id."""


def most_tokens(config: Any, pad_id: int) -> int | None:
    """How many tokens the positions of a transformers configuration allow; None: no limit."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in OFFSET_POSITIONS:
        positions -= pad_id + 1
    if positions is not None and positions <= 0:  # -1: xlnet's way to say that there is no limit
        return None
    return positions
