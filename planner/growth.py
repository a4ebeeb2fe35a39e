"""What a plan's placement takes in a larger call than it was planned for, by its graph and without a new trace.

What is assumed: decode steps go on as affinely in the context as between the two that were traced, where two were; else
the cache grows in proportion to the context. What a prefill takes beside the cache grows in proportion to the tokens of
its longest call, and everything in proportion to the rows. Where masks and scores of tokens x context are held, these
grow faster, so that this is the least that a longer prompt takes. Nothing is taken to shrink.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from planner.graph import LayerGraph, Pass, Span
from planner.memory import planned_bytes
from planner.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The size of a call: rows, the most tokens of one forward, and the longest context."""

    rows: int
    tokens: int
    context_tokens: int

    @classmethod
    def of(cls, plan: Plan) -> Size:
        """Return the size that a plan was made for."""
        work = plan.workload
        tokens = max((entry.tokens for entry in plan.graph.prefill_passes), default=work.prompt_tokens)
        return cls(rows=work.rows, tokens=tokens, context_tokens=work.prompt_tokens + work.decode_steps)

    def holds(self, other: Size) -> bool:
        """Tell whether a call of the other size is no larger than this in anything."""
        return (
            other.rows <= self.rows
            and other.tokens <= self.tokens
            and other.context_tokens <= self.context_tokens
        )  # fmt: skip


def grown_bytes(plan: Plan, size: Size) -> dict[str, int]:
    """Return the least that would be planned for on every memory, in device-used bytes, were the call of this size."""
    planned = Size.of(plan)
    rows = max(Fraction(1), Fraction(size.rows, planned.rows))
    tokens = max(Fraction(1), Fraction(size.tokens, planned.tokens))
    context = max(planned.context_tokens, size.context_tokens)
    graph = replace(plan.graph, passes=tuple(_passes(plan, rows, tokens, context)))
    usages = planned_bytes(graph, plan.hardware, plan.placements, plan.slots)
    return {name: usage.total for name, usage in usages.items()}


def _passes(plan: Plan, rows: Fraction, tokens: Fraction, context: int) -> Iterator[Pass]:
    graph = plan.graph
    longest = Fraction(context, Size.of(plan).context_tokens)
    steps = graph.decode_passes
    is_static = plan.workload.cache == "static"
    for entry in graph.prefill_passes:
        cached = longest if is_static or not steps else tokens
        yield _scaled(entry, rows * tokens, rows * cached)
    for entry in steps:
        yield _scaled(entry, rows, rows * longest if is_static or len(steps) < 2 else rows)
    if len(steps) > 1 and not is_static and context > steps[-1].context_tokens:
        yield _onward(graph, context, rows)


def _onward(graph: LayerGraph, context: int, rows: Fraction) -> Pass:
    """Return the decode step at a context, on the line through the first and the last."""
    first, last = graph.decode_passes[0], graph.decode_passes[-1]
    ahead = Fraction(context - last.context_tokens, max(1, last.context_tokens - first.context_tokens))
    spans = []
    for one, other in zip(first.per_layer(), last.per_layer(), strict=True):
        changes = {
            name: _ceil(rows * (getattr(other, name) + ahead * max(0, getattr(other, name) - getattr(one, name))))
            for name in (*_HELD, *_CACHED)
        }
        spans.append(replace(other, count=1, **changes))
    return replace(last, name="decode_onward", context_tokens=context, spans=tuple(spans), holdings=(), lasting=())


_HELD = ("held_bytes", "peak_bytes", "scratch_bytes")
_CACHED = ("kv_before_bytes", "kv_after_bytes", "kv_host_bytes")


def _scaled(entry: Pass, held: Fraction, cached: Fraction) -> Pass:
    def grown(span: Span) -> Span:
        changes = {name: _ceil(getattr(span, name) * held) for name in _HELD}
        changes |= {name: _ceil(getattr(span, name) * cached) for name in _CACHED}
        return replace(span, **changes)

    return replace(entry, spans=tuple(grown(span) for span in entry.spans), holdings=(), lasting=())


def _ceil(value: Fraction) -> int:
    return -(-value.numerator // value.denominator)
