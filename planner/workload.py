"""What the model will be asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.errors import InputError

DEFAULT_PROMPT_TOKENS = 512
DEFAULT_NEW_TOKENS = 128
# Token ids are real while a model is traced: so many take a quarter of a gigabyte.
MOST_TOKENS = 2**25


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One call of the model: `batch_size` prompts of `prompt_tokens`, each answered by `new_tokens`.

    caller: "generate" is transformers' `generate()`, whose own tensors are counted too; "forward" is one
        `model(input_ids)` without a cache.
    objective: what the planner makes least; "latency" is the whole call, prefill and every decode step.
    """

    caller: Literal["generate", "forward"] = "generate"
    batch_size: int = 1
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS
    new_tokens: int = DEFAULT_NEW_TOKENS
    sampling: Literal["greedy", "sample"] = "greedy"
    num_beams: int = 1
    cache: Literal["dynamic"] = "dynamic"
    kv_dtype: str | None = None
    objective: Literal["latency"] = "latency"

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt_tokens", "new_tokens", "num_beams"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"{name} must be a whole number, not {value!r}")
            if value < 1:
                raise InputError(f"{name} must be at least 1, and is {value}")
        tokens = self.batch_size * (self.prompt_tokens + self.new_tokens)
        if tokens > MOST_TOKENS:
            raise InputError(
                f"{tokens:,} tokens in one call (batch_size * (prompt_tokens + new_tokens)) are more than the "
                f"{MOST_TOKENS:,} that can be traced; plan a smaller batch, or shorter prompts"
            )
        if self.num_beams != 1:
            raise InputError(f"num_beams={self.num_beams}: beam search is not carried yet; plan with one beam")
        if self.kv_dtype is not None:
            raise InputError(
                f"kv_dtype={self.kv_dtype}: a KV cache in another dtype than the model's is not carried yet"
            )

    @property
    def decode_steps(self) -> int:
        """Forward passes after the first: the prefill already yields one token."""
        return self.new_tokens - 1 if self.caller == "generate" else 0
