"""Runs a model as a Plan says. Needs torch; not ortools, pandas or plotly."""

from __future__ import annotations

from dispatch.adapting import weights_at_home
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
from planner.auto_map import check_device_map, infer_auto_device_map
from planner.empty_init import init_empty_weights, init_on_device
from planner.measurement import Measurement
from planner.memory_caps import get_balanced_memory, get_max_memory
from planner.module_sizes import compute_module_sizes, find_tied_parameters

__all__ = [
    "CacheStatistics", "Checkpoint", "Measurement", "Recording", "align_module_device", "apply", "cache_statistics",
    "check_device_map", "compute_module_sizes", "cpu_offload", "cpu_offload_with_hook", "disk_offload",
    "dispatch_model", "find_tied_parameters", "get_balanced_memory", "get_max_memory", "has_offloaded_params",
    "infer_auto_device_map", "init_empty_weights", "init_on_device", "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model", "measure", "remove", "remove_hook_from_module", "remove_hook_from_submodules",
    "weights_at_home",
]  # fmt: skip
