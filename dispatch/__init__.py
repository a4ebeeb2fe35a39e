"""Runs a model as a Plan says. Needs torch; not ortools, pandas or plotly."""

from __future__ import annotations

from dispatch.attach import apply, cache_statistics, remove
from dispatch.checkpoint import Checkpoint
from dispatch.expert_cache import CacheStatistics
from dispatch.measure import Recording, measure
from planner.auto_map import check_device_map, infer_auto_device_map
from planner.empty_init import init_empty_weights, init_on_device
from planner.measurement import Measurement
from planner.memory_caps import get_balanced_memory, get_max_memory
from planner.module_sizes import compute_module_sizes, find_tied_parameters

__all__ = [
    "CacheStatistics", "Checkpoint", "Measurement", "Recording", "apply", "cache_statistics", "check_device_map",
    "compute_module_sizes", "find_tied_parameters", "get_balanced_memory", "get_max_memory", "infer_auto_device_map",
    "init_empty_weights", "init_on_device", "measure", "remove",
]  # fmt: skip
