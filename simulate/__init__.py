"""Predicts what a Plan or a device map does (`simulate.run`), also under Accelerate's own hooks
(`simulate.run_accelerate`), and runs real code on pretend GPUs (`simulate.virtual`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simulate.accelerate_hooks import run_accelerate
from simulate.energy import energy_joules
from simulate.placements import run
from simulate.timeline import Interval, LaneUse, MemorySample, Timeline

if TYPE_CHECKING:
    from simulate.virtual_machine import virtual

__all__ = ["Interval", "LaneUse", "MemorySample", "Timeline", "energy_joules", "run", "run_accelerate", "virtual"]


def __getattr__(name: str) -> Any:
    # Needs torch, which a simulation does not.
    if name != "virtual":
        raise AttributeError(f"module 'simulate' has no attribute {name!r}")
    from simulate.virtual_machine import virtual

    return virtual
