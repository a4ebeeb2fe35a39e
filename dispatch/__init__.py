"""Runs a model as a Plan says. Needs torch; not ortools, pandas or plotly."""

from __future__ import annotations

from dispatch.attach import apply, cache_statistics, remove
from dispatch.checkpoint import Checkpoint
from dispatch.expert_cache import CacheStatistics
from dispatch.measure import Recording, measure
from planner.measurement import Measurement

__all__ = [
    "CacheStatistics", "Checkpoint", "Measurement", "Recording", "apply", "cache_statistics", "measure", "remove",
]  # fmt: skip
