"""Runs a model as a Plan says. Needs torch; not ortools, pandas or plotly."""

from __future__ import annotations

from dispatch.attach import apply, remove
from dispatch.checkpoint import Checkpoint
from dispatch.measure import Recording, measure
from planner.measurement import Measurement

__all__ = ["Checkpoint", "Measurement", "Recording", "apply", "measure", "remove"]
