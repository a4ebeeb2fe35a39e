"""Finds what an object holds, through attributes, containers and functions, by Python's own means. For tests only."""

from __future__ import annotations

import gc
import threading
import types
from typing import Any

import torch

_PASSED = (type, types.ModuleType, torch.dtype, torch.device, str, bytes, int, float)


def held(root: Any) -> dict[int, Any]:
    """Return {identity: object} of all that can be reached, but for classes, modules, and what these hold."""
    found: dict[int, Any] = {}
    waiting = [root]
    while waiting:
        one = waiting.pop()
        if id(one) in found or isinstance(one, _PASSED):
            continue
        found[id(one)] = one
        if isinstance(one, types.FunctionType):
            waiting += [one.__closure__, vars(one), one.__defaults__, one.__kwdefaults__]
        elif isinstance(one, types.CellType):
            waiting += [one.cell_contents] if one != types.CellType() else []
        else:
            waiting += gc.get_referents(one)
    return found


def movable(root: Any) -> dict[int, Any]:
    """Return what of it has a state that could come between two models: objects of ours, modules, tensors, locks."""
    kinds = (torch.nn.Module, torch.Tensor, type(threading.RLock()), type(threading.Lock()))
    return {
        key: one for key, one in held(root).items()
        if isinstance(one, kinds) or (type(one).__module__.startswith("dispatch.") and not _is_frozen(one))
    }  # fmt: skip


def memories(root: Any) -> dict[int, int]:
    """Return {address: bytes} of the memory under every tensor that can be reached."""
    tensors = [one for one in held(root).values() if isinstance(one, torch.Tensor) and not one.is_meta]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _is_frozen(one: Any) -> bool:
    parameters = getattr(one, "__dataclass_params__", None)
    return parameters is not None and bool(parameters.frozen)
