"""Decides where every weight of a model waits and where every layer runs. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.api import frontier, place, plan_from_device_map, plan_model, predict, predict_memory
    from planner.auto_map import check_device_map, infer_auto_device_map
    from planner.correction import corrected_hardware
    from planner.empty_init import init_empty_weights, init_on_device
    from planner.errors import (
        InfeasibleError,
        InputError,
        NoSolutionInTimeError,
        PlanError,
        PlanFormatError,
        PlanMismatchError,
        TraceError,
    )
    from planner.explanation import Explanation, explain
    from planner.footprint import MemoryPrediction
    from planner.graph import LayerGraph
    from planner.hardware import Hardware
    from planner.memory_caps import get_balanced_memory, get_max_memory
    from planner.module_sizes import compute_module_sizes, find_tied_parameters
    from planner.plan import Plan
    from planner.popularity import Popularity
    from planner.rules import Pin, Rules, Sensitivity
    from planner.search import FrontierPoint
    from planner.verify import Violation, verify_plan
    from planner.workload import Workload

_HOMES = {
    "Explanation": "planner.explanation",
    "FrontierPoint": "planner.search",
    "Hardware": "planner.hardware",
    "InfeasibleError": "planner.errors",
    "InputError": "planner.errors",
    "LayerGraph": "planner.graph",
    "MemoryPrediction": "planner.footprint",
    "NoSolutionInTimeError": "planner.errors",
    "Pin": "planner.rules",
    "Plan": "planner.plan",
    "PlanError": "planner.errors",
    "PlanFormatError": "planner.errors",
    "PlanMismatchError": "planner.errors",
    "Popularity": "planner.popularity",
    "Rules": "planner.rules",
    "Sensitivity": "planner.rules",
    "TraceError": "planner.errors",
    "Violation": "planner.verify",
    "Workload": "planner.workload",
    "check_device_map": "planner.auto_map",
    "compute_module_sizes": "planner.module_sizes",
    "corrected_hardware": "planner.correction",
    "explain": "planner.explanation",
    "find_tied_parameters": "planner.module_sizes",
    "frontier": "planner.api",
    "get_balanced_memory": "planner.memory_caps",
    "get_max_memory": "planner.memory_caps",
    "infer_auto_device_map": "planner.auto_map",
    "init_empty_weights": "planner.empty_init",
    "init_on_device": "planner.empty_init",
    "place": "planner.api",
    "plan_from_device_map": "planner.api",
    "plan_model": "planner.api",
    "predict": "planner.api",
    "predict_memory": "planner.api",
    "verify_plan": "planner.verify",
}

__all__ = [
    "Explanation",
    "FrontierPoint",
    "Hardware",
    "InfeasibleError",
    "InputError",
    "LayerGraph",
    "MemoryPrediction",
    "NoSolutionInTimeError",
    "Pin",
    "Plan",
    "PlanError",
    "PlanFormatError",
    "PlanMismatchError",
    "Popularity",
    "Rules",
    "Sensitivity",
    "TraceError",
    "Violation",
    "Workload",
    "check_device_map",
    "compute_module_sizes",
    "corrected_hardware",
    "explain",
    "find_tied_parameters",
    "frontier",
    "get_balanced_memory",
    "get_max_memory",
    "infer_auto_device_map",
    "init_empty_weights",
    "init_on_device",
    "place",
    "plan_from_device_map",
    "plan_model",
    "predict",
    "predict_memory",
    "verify_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'planner' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
