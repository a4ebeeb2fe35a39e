"""Graphs of sizes that were not traced, on a line between two that were: guides for a search, never an answer."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import TypeVar

from planner.graph import Edge, LayerGraph, Pass, Span

Record = TypeVar("Record", LayerGraph, Pass, Span, Edge)


def alike(one: LayerGraph, two: LayerGraph) -> bool:
    """Tell whether two traces have the same layers, passes and edges, so that a line can be drawn between them."""
    return (
        (one.kinds, one.layers) == (two.kinds, two.layers)
        and len(one.passes) == len(two.passes)
        and [(e.source, e.target) for e in one.edges] == [(e.source, e.target) for e in two.edges]
    )


def between(one: LayerGraph, two: LayerGraph, part: tuple[int, int]) -> LayerGraph:
    """Return the graph whose every number lies `part` (numerator, denominator) of the way from `one` to `two`."""

    def passed(a: Pass, b: Pass) -> Pass:
        spans = [_on_line(x, y, part) for x, y in zip(a.per_layer(), b.per_layer(), strict=True)]
        return replace(_on_line(a, b, part), spans=tuple(replace(span, count=1) for span in spans))

    return replace(
        _on_line(one, two, part),
        edges=tuple(
            replace(_on_line(a, b, part), source=a.source, target=a.target)
            for a, b in zip(one.edges, two.edges, strict=True)
        ),
        passes=tuple(passed(a, b) for a, b in zip(one.passes, two.passes, strict=True)),
    )


def _on_line(one: Record, two: Record, part: tuple[int, int]) -> Record:
    """Return `one` with every whole number moved towards that of `two`; none becomes negative."""
    numbers = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    moved = {
        name: max(0, number + (getattr(two, name) - number) * part[0] // part[1])
        for name, number in numbers.items()
        if isinstance(number, int)
    }
    return replace(one, **moved)
