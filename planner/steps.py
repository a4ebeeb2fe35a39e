"""Plan → the ordered actions of one pass. One definition, followed by the simulator and by dispatch.

A layer runs in parts, one for each weight group that is worth a copy, in the order in which they are registered. A
part whose group is streamed waits for its copy and frees its slot when it ends. Copies of whole groups to a GPU are
prefetched, in this order, as slots come free; those of routed experts, and reads of mapped files, start when their
part does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from planner.graph import LayerGraph, WeightGroup
from planner.memory import waiting_slices
from planner.plan import Placement


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a layer's run.

    share: of the layer's computing time. placement, group: what it needs, or None for a layer that needs no copy.
    waiting: slices that wait elsewhere (0 where everything is resident).
    """

    share: float
    placement: Placement
    group: WeightGroup
    waiting: int

    @property
    def prefetched(self) -> bool:
        return self.waiting > 0 and self.group.slices == 1 and self.placement.run_on != "cpu"


@dataclass(frozen=True, slots=True)
class LayerRun:
    """A layer in execution order: where it runs, where its input comes from if elsewhere, and its parts."""

    index: int
    name: str
    device: str
    hop_from: str | None
    parts: tuple[Part, ...]


def layer_runs(graph: LayerGraph, placements: Sequence[Placement]) -> tuple[LayerRun, ...]:
    """Return every layer of one pass in order."""
    by_layer: dict[str, list[Placement]] = {}
    for placement in placements:
        by_layer.setdefault(placement.layer, []).append(placement)
    runs: list[LayerRun] = []
    for index, layer in enumerate(graph.layers):
        kind = graph.kinds[layer.kind]
        placed = by_layer[layer.name]
        device = placed[0].run_on
        previous = runs[-1].device if runs else device
        # A slice that is not routed is not read: the share of experts is that of the slices one token uses.
        weights = [
            kind.group(p.group).nbytes * kind.group(p.group).used_slices / kind.group(p.group).slices for p in placed
        ]
        total = sum(weights) or 1.0
        parts = tuple(
            Part(weight / total if sum(weights) else 1.0 / len(placed), p, kind.group(p.group),
                 waiting_slices(p, kind.group(p.group)))
            for p, weight in zip(placed, weights, strict=True)
        )  # fmt: skip
        runs.append(LayerRun(index, layer.name, device, previous if previous != device else None, parts))
    return tuple(runs)


def prefetch_order(runs: Sequence[LayerRun], device: str) -> Iterator[Part]:
    """Yield the parts whose groups are prefetched to `device`, in the order of their copies."""
    for run in runs:
        if run.device == device:
            yield from (part for part in run.parts if part.prefetched)
