"""Runs a model as a Plan says. Needs torch; not ortools, pandas or plotly."""

from __future__ import annotations

from dispatch.alignment import align_module_device, has_offloaded_params
from dispatch.attach import apply, cache_statistics, remove
from dispatch.checkpoint import Checkpoint
from dispatch.expert_cache import CacheStatistics
from dispatch.measure import Recording, measure
from dispatch.offload import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from planner.measurement import Measurement

__all__ = [
    "CacheStatistics", "Checkpoint", "Measurement", "Recording", "align_module_device", "apply", "cache_statistics",
    "cpu_offload", "cpu_offload_with_hook", "disk_offload", "dispatch_model", "has_offloaded_params",
    "load_checkpoint_and_dispatch", "load_checkpoint_in_model", "measure", "remove", "remove_hook_from_module",
    "remove_hook_from_submodules",
]  # fmt: skip
