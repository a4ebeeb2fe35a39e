"""Models built without memory for their weights, or straight on a device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary


def init_empty_weights(include_buffers: bool | None = None) -> contextlib.AbstractContextManager[None]:
    """Return a context in which modules are built with their parameters on meta, and with `include_buffers` all else.

    Buffers are otherwise real, so that tables which no checkpoint holds are right.
    """
    return init_on_device(torch.device("meta"), include_buffers=include_buffers)


@contextlib.contextmanager
def init_on_device(device: torch.device | str | int, include_buffers: bool | None = None) -> Iterator[None]:
    """Build modules with their parameters on a device, and with `include_buffers` all other new tensors too.

    A parameter that two modules share is still one; those that a module makes later (lazy ones) stay where it makes
    them.
    """
    device = torch.device(device)
    if include_buffers:
        with device:
            yield
        return
    register = torch.nn.Module.register_parameter
    moved: Any = WeakIdKeyDictionary()

    def register_there(module: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        register(module, name, param)
        if param is None or torch.nn.parameter.is_lazy(param) or _is_there(param, device):
            return
        if param not in moved:
            moved[param] = _on(param, device)
        module._parameters[name] = moved[param]

    torch.nn.Module.register_parameter = register_there  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _is_there(param: torch.nn.Parameter, device: torch.device) -> bool:
    return param.device.type == device.type and device.index in (None, param.device.index)


def _on(param: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
    """Return a parameter of the same class, with the same attributes, on another device."""
    made: torch.nn.Parameter = torch.Tensor._make_subclass(type(param), param.detach().to(device), param.requires_grad)
    made.__dict__.update(param.__dict__)
    return made
