"""Simulates what others placed: a plan, or an Accelerate device map of a model on a machine.

The planner, which makes a plan of a map, stands above the simulator: it is imported here, late, and nowhere else.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from planner.errors import InputError
from planner.hardware import Hardware
from planner.plan import Plan
from planner.workload import Workload
from simulate import simulator
from simulate.timeline import Timeline


def run(
    placed: Plan | Mapping[str, int | str],
    *,
    model: Any = None,
    hardware: Hardware | None = None,
    workload: Workload | None = None,
    seed: int | None = None,
    **options: Any,
) -> Timeline:
    """Simulate a plan's workload on its hardware, nothing else needed; or an Accelerate device map of `model`.

    model, hardware, workload: for a device map, as `planner.plan_from_device_map` takes them, what describes the
        machine or the work instead (gpus="2x24GB", prompt_tokens=100) among its options; a plan has them.
    seed: draws the experts that tokens are routed to; None: as many as are expected.

    Raises:
        PlanFormatError: the plan's graph has no pass for its workload.
        InputError: neither a plan nor a device map; a device map without a model, or one that cannot be followed; or a
            plan with what it has already.
    """
    given = {"model": model, "hardware": hardware, "workload": workload, **options}
    if isinstance(placed, Plan):
        surplus = [name for name, value in given.items() if value is not None]
        if surplus:
            raise InputError(
                f"a plan has its model, hardware and workload: leave out {', '.join(surplus)}, or plan again with that"
            )
        return simulator.run(placed, seed=seed)
    if not isinstance(placed, Mapping):
        raise InputError(
            f"{type(placed).__name__} is neither a Plan nor a device map; Plan.load(path) reads one that was saved"
        )
    if model is None:
        raise InputError("a device map is simulated for a model; give model=")
    api = importlib.import_module("planner.api")
    plan = api.plan_from_device_map(model, placed, hardware=hardware, workload=workload, **options)
    return simulator.run(plan, seed=seed)
