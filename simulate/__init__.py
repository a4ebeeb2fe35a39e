"""Predicts what a Plan does: `simulate.run(plan)` → Timeline."""

from __future__ import annotations

from simulate.simulator import run
from simulate.timeline import Interval, MemorySample, Timeline

__all__ = ["Interval", "MemorySample", "Timeline", "run"]
