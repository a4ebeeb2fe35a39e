"""What one call of a model asks for: rows, new tokens, and tokens that are in the cache already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Call:
    """One forward call. All are 0 where its arguments do not tell."""

    rows: int
    new_tokens: int
    past_tokens: int

    @property
    def context_tokens(self) -> int:
        return self.past_tokens + self.new_tokens


def call_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return what a call with these arguments asks for, by its ids or embeddings and its cache."""
    cache = kwargs.get("past_key_values")
    length = getattr(cache, "get_seq_length", None)
    past = int(length()) if length is not None else 0
    for name in ("decoder_input_ids", "input_ids", "decoder_inputs_embeds", "inputs_embeds"):
        given = kwargs.get(name, args[0] if args and name == "input_ids" else None)
        is_embedded = name.endswith("embeds")
        if not isinstance(given, torch.Tensor) or given.is_floating_point() != is_embedded:
            continue
        if given.dim() == (3 if is_embedded else 2):
            return Call(given.shape[0], given.shape[1], past)
    return Call(0, 0, past)
