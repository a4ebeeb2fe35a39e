"""Something done before and after one module's forward, attached and taken off again; the signature is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Before = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
After = Callable[[], None]

_WRAPPED = "_loadplan_wrapped"


def attach(module: torch.nn.Module, *, before: Before | None = None, after: After | None = None) -> None:
    """Wrap a module's forward: `before` may change its arguments; `after` is called even if it raises."""
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            args, kwargs = before(args, kwargs)
        try:
            return forward(*args, **kwargs)
        finally:
            if after is not None:
                after()

    setattr(wrapped, _WRAPPED, True)
    module.forward = wrapped


def detach(module: torch.nn.Module) -> None:
    """Take off everything that `attach` put on this module."""
    while getattr(vars(module).get("forward"), _WRAPPED, False):
        inner = module.forward.__wrapped__
        if getattr(inner, "__func__", None) is type(module).forward:
            del module.forward
        else:
            module.forward = inner


def move(value: Any, device: torch.device) -> Any:
    """Return `value` with every tensor inside lists, tuples and dicts on `device`; others are left as they are."""
    if isinstance(value, torch.Tensor):
        return value if value.device == device or value.device.type == "meta" else value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(move(item, device) for item in value)
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    return value
