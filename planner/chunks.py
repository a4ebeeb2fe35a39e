"""A prompt in chunks: the forward calls of a prefill, and which of them are traced."""

from __future__ import annotations

from dataclasses import dataclass

from planner.graph import LayerGraph
from planner.workload import Workload

# Whole chunks that are traced at each end of a long prefill; those between run as one.
_AT_EACH_END = (4, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """`whole` calls of `tokens` each, and one of `rest` tokens where that is not nothing."""

    tokens: int
    whole: int
    rest: int

    @property
    def count(self) -> int:
        """Forward calls of the prefill."""
        return self.whole + bool(self.rest)

    def sizes(self) -> tuple[int, ...]:
        """Return the tokens of the calls that are traced: all, or those at the ends and one as long as all between."""
        rest = (self.rest,) if self.rest else ()
        begin, end = _AT_EACH_END
        between = self.whole - begin - end
        if between < 2:
            return (*(self.tokens,) * self.whole, *rest)
        return (*(self.tokens,) * begin, between * self.tokens, *(self.tokens,) * end, *rest)

    def numbers(self) -> tuple[int | None, ...]:
        """Return which call of the prefill each of `sizes` is; None for the one that stands for those between."""
        count = len(self.sizes())
        if count == self.count:
            return tuple(range(count))
        begin = _AT_EACH_END[0]
        return (*range(begin), None, *range(self.count - (count - begin - 1), self.count))

    def named(self) -> dict[int, str]:
        """Return the calls that a layer graph holds as passes, and how they are called there."""
        found = {0: "prefill"}
        if self.whole > 1:
            found[1] = "prefill_next"
        if self.whole > 2:
            found[self.whole - 1] = "prefill_last"
        if self.rest:
            found[self.whole] = "prefill_rest"
        return found

    def ends_at(self, number: int) -> int:
        """Return the tokens of the prompt in the cache when call `number` ends."""
        return min((number + 1) * self.tokens, self.whole * self.tokens + self.rest)

    def tokens_of(self, number: int) -> int:
        return self.tokens if number < self.whole else self.rest


def chunks(prompt_tokens: int, chunk_tokens: int | None) -> Chunks:
    """Return how a prompt is cut; None: not at all."""
    tokens = prompt_tokens if chunk_tokens is None else min(chunk_tokens, prompt_tokens)
    return Chunks(tokens=tokens, whole=prompt_tokens // tokens, rest=prompt_tokens % tokens)


def chunks_of(graph: LayerGraph, workload: Workload) -> Chunks:
    """Return how the prompt is cut; not at all where the graph has one pass of it (of an encoder-decoder)."""
    is_cut = len(graph.prefill_passes) > 1
    return chunks(workload.prompt_tokens, workload.prefill_chunk if is_cut else None)
