"""Plan → the ordered actions of one pass. One definition, followed by the simulator and by dispatch.

A layer runs in parts, one for each weight group that is worth a copy, in the order in which they are registered. A
part whose group is streamed waits for its copy and frees its slot when it ends. Copies of whole groups to a GPU are
prefetched, in this order, as slots come free; those of routed experts start when their part does. Mapped files that the
CPU computes with are read ahead of it, so many groups at a time, from the beginning of each pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from planner.graph import Edge, LayerGraph, WeightGroup
from planner.hardware import Hardware, Link
from planner.memory import waiting_slices, with_groups
from planner.plan import Placement

# Groups of mapped files that are brought while another is used; a pass begins with none.
READ_AHEAD = 3


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
        return self.waiting > 0 and self.group.slices == 1 and not self.placement.run_on.endswith("cpu")

    @property
    def read_ahead(self) -> bool:
        """Whether the CPU computes with it straight from a mapped file, whose pages are brought before it does."""
        placement = self.placement
        whole = self.waiting > 0 and self.group.slices == 1 and not self.group.by_rows
        return whole and placement.memory == "disk" and not self.prefetched

    def on_cpu(self, tokens: int) -> bool:
        """Tell whether the CPU computes the waiting slices in a pass of so many tokens over all rows."""
        return self.waiting > 0 and tokens <= self.placement.cpu_up_to_tokens


def link_ns(link: Link, nbytes: int) -> int:
    """Return the time of bytes on a link, without latency; rounded up, so that no detour is shorter by rounding."""
    return -(-nbytes * 10**9 // link.bytes_per_s)


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one layer made, on its way to another device, where `target` is the first layer to take it.

    waits: it is what some layer there takes last (see `awaited`), so that its latency is waited for; what else a layer
        takes is under way by then and costs its bytes.
    """

    source: int
    target: int
    origin: str
    device: str
    prefill_bytes: int
    decode_bytes: int
    waits: bool

    def ns(self, hardware: Hardware, *, prefill: bool) -> int:
        """Return the time it takes on the link between the devices."""
        link = hardware.link(self.origin, self.device)
        nbytes = self.prefill_bytes if prefill else self.decode_bytes
        return (link.latency_ns if self.waits else 0) + link_ns(link, nbytes)


@dataclass(frozen=True, slots=True)
class LayerRun:
    """A layer in execution order: where it runs, what must come from other devices first, and its parts."""

    index: int
    name: str
    device: str
    takes: tuple[Transfer, ...]
    parts: tuple[Part, ...]


def layer_runs(graph: LayerGraph, placements: Sequence[Placement]) -> tuple[LayerRun, ...]:
    """Return every layer of one pass in order."""
    by_layer: dict[str, list[tuple[Placement, WeightGroup]]] = {}
    for placement, group in with_groups(graph, placements):
        by_layer.setdefault(placement.layer, []).append((placement, group))
    devices = [by_layer[layer.name][0][0].run_on for layer in graph.layers]
    takes: dict[int, list[Transfer]] = {}
    for transfer in transfers(graph, devices):
        takes.setdefault(transfer.target, []).append(transfer)
    runs: list[LayerRun] = []
    for index, (layer, device) in enumerate(zip(graph.layers, devices, strict=True)):
        placed = by_layer[layer.name]
        # A slice that is not routed is not read: the share of experts is that of the slices one token uses.
        weights = [group.nbytes * group.used_slices / group.slices for _, group in placed]
        total = sum(weights)
        parts = tuple(
            Part(weight / total if total else 1.0 / len(placed), placement, group, waiting_slices(placement, group))
            for (placement, group), weight in zip(placed, weights, strict=True)
        )
        runs.append(LayerRun(index, layer.name, device, tuple(takes.get(index, ())), parts))
    return tuple(runs)


def transfers(graph: LayerGraph, devices: Sequence[str]) -> tuple[Transfer, ...]:
    """Return what moves between devices in one pass, once for each device that takes it, in order of the takers."""
    latest = awaited(graph)
    moves: dict[tuple[int, str, str], list[Edge]] = {}
    for edge in graph.edges:
        if devices[edge.source] != devices[edge.target]:
            moves.setdefault((edge.source, edge.tensor, devices[edge.target]), []).append(edge)
    found = [
        Transfer(
            source=source,
            target=min(edge.target for edge in edges),
            origin=devices[source],
            device=device,
            prefill_bytes=max(edge.prefill_bytes for edge in edges),
            decode_bytes=max(edge.decode_bytes for edge in edges),
            waits=any(latest[edge.target] == (source, tensor) for edge in edges),
        )
        for (source, tensor, device), edges in moves.items()
    ]
    return tuple(sorted(found, key=lambda move: (move.target, move.source, move.prefill_bytes)))


def awaited(graph: LayerGraph) -> dict[int, tuple[int, str]]:
    """Return for each layer what it waits for: the largest tensor of the latest layer that it takes from."""
    best: dict[int, tuple[int, int, str]] = {}
    for edge in graph.edges:
        found = (edge.source, edge.prefill_bytes + edge.decode_bytes, edge.tensor)
        best[edge.target] = max(best.get(edge.target, found), found)
    return {target: (source, tensor) for target, (source, _, tensor) in best.items()}


def prefetch_order(runs: Sequence[LayerRun], device: str) -> Iterator[Part]:
    """Yield the parts whose groups are prefetched to `device`, in the order of their copies."""
    for run in runs:
        if run.device == device:
            yield from (part for part in run.parts if part.prefetched)
