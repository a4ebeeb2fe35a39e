"""What the model will be asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from planner.errors import InputError
from planner.serial import OMITTED

DEFAULT_PROMPT_TOKENS = 512
DEFAULT_NEW_TOKENS = 128
# Token ids are real while a model is traced: so many take a quarter of a gigabyte.
MOST_TOKENS = 2**25

Objective = Literal["latency", "ttft", "tpot", "throughput", "fit", "max-context", "max-batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One call of the model: `batch_size` prompts of `prompt_tokens`, each answered by `new_tokens`.

    caller: "generate" is transformers' `generate()`, whose own tensors are counted too; "forward" with one new token
        is one `model(input_ids)` without a cache, with more a plain loop over `model(...)` with the cache it returned.
    sampling, top_p, num_beams, num_return_sequences: as `generate` takes them; top_p needs "sample".
    cache: "dynamic" grows, "static" is as long as the whole answer from the start, "fp8" keeps keys and values in 8
        bits (transformers' quantised cache); layers with a sliding window keep their window in each. "offloaded" grows
        as well, and waits in host memory.
    prefill_chunk: tokens of the prompt in one forward call (generate's prefill_chunk_size); None: all at once.
    objective: what the planner makes least: "latency" (the whole call: prefill and every decode step), "ttft" (the
        prefill), "tpot" (a decode step), "fit" (bytes of memory, those of GPUs and the host together); "throughput"
        chooses the batch too, and "max-context" and "max-batch" the longest prompt or largest batch that fits.
    """

    caller: Literal["generate", "forward"] = "generate"
    batch_size: int = 1
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS
    new_tokens: int = DEFAULT_NEW_TOKENS
    sampling: Literal["greedy", "sample"] = "greedy"
    top_p: float | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    cache: Literal["dynamic", "static", "fp8", "offloaded"] = "dynamic"
    kv_dtype: str | None = None
    prefill_chunk: int | None = field(default=None, metadata=OMITTED)
    objective: Objective = "latency"

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt_tokens", "new_tokens", "num_beams", "num_return_sequences"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"{name} must be a whole number, not {value!r}")
            if value < 1:
                raise InputError(f"{name} must be at least 1, and is {value}")
        if self.prefill_chunk is not None:
            if (
                isinstance(self.prefill_chunk, bool)
                or not isinstance(self.prefill_chunk, int)
                or self.prefill_chunk < 1
            ):
                raise InputError(f"prefill_chunk must be a whole number of at least 1, not {self.prefill_chunk!r}")
            if self.caller == "forward":
                raise InputError(
                    "prefill_chunk is an option of generate(); plain forward calls take the prompt at once"
                )
        if self.cache == "offloaded" and self.caller == "forward":
            raise InputError("the offloaded cache is an option of generate(); plain forward calls have their own")
        tokens = self.batch_size * (self.prompt_tokens + self.new_tokens)
        if tokens > MOST_TOKENS:
            raise InputError(
                f"{tokens:,} tokens in one call (batch_size * (prompt_tokens + new_tokens)) are more than the "
                f"{MOST_TOKENS:,} that can be traced; plan a smaller batch, or shorter prompts"
            )
        if self.top_p is not None and (self.sampling != "sample" or not 0 < self.top_p <= 1):
            raise InputError(f"top_p={self.top_p}: it must lie in (0, 1], with sampling")
        if self.num_return_sequences > max(self.num_beams, 1) and self.sampling != "sample":
            raise InputError(
                f"num_return_sequences={self.num_return_sequences} needs sampling, or at least as many beams "
                f"(there are {self.num_beams})"
            )
        if self.kv_dtype is not None:
            raise InputError(
                f"kv_dtype={self.kv_dtype}: a KV cache in another dtype than the model's is not carried yet"
            )

    @property
    def decode_steps(self) -> int:
        """Forward passes after the first: the prefill already yields one token."""
        return self.new_tokens - 1

    @property
    def rows(self) -> int:
        """Sequences that one forward call carries: the batch, times its beams or its several answers."""
        return self.batch_size * max(self.num_beams, self.num_return_sequences)
