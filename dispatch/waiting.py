"""Which tensors of a plan wait elsewhere than where they are used."""

from __future__ import annotations

from collections.abc import Iterator

from planner.graph import Tensor, full_name
from planner.memory import waiting_slices, with_groups
from planner.plan import Placement, Plan


def waiting_tensors(plan: Plan) -> Iterator[tuple[Placement, str, Tensor]]:
    """Yield (placement, full name, tensor) of every tensor that waits, wholly or in part."""
    for placement, group in with_groups(plan.graph, plan.placements):
        if waiting_slices(placement, group):
            yield from ((placement, full_name(placement.layer, tensor.name), tensor) for tensor in group.tensors)


def waiting_on_disk(plan: Plan) -> list[str]:
    """Return the full names of what waits on disk; what no checkpoint holds does not."""
    return [
        name
        for placement, name, tensor in waiting_tensors(plan)
        if placement.home == plan.hardware.disk(placement.run_on) and tensor.persistent
    ]
