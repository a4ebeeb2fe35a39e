"""Modules that Accelerate offloaded, as `from_pretrained(device_map=...)` lets it: told of, and refused."""

from __future__ import annotations

import torch

from planner.errors import InputError


def is_offloaded(module: torch.nn.Module) -> bool:
    """Tell whether Accelerate brings a module's own weights each time that it runs."""
    return hasattr(module, "_hf_hook") and any(
        parameter is not None and parameter.is_meta for parameter in module._parameters.values()
    )


def check(path: str, module: torch.nn.Module) -> None:
    """Raise InputError where Accelerate offloaded a module."""
    if is_offloaded(module):
        raise InputError(
            f"{path or 'this model'} is offloaded by Accelerate, as from_pretrained(device_map=...) does: make the "
            "model without a device_map, and dispatch that (from a checkpoint: load_checkpoint_and_dispatch); or, if "
            "none of it is on disk, call accelerate.hooks.remove_hook_from_submodules(model) first"
        )
