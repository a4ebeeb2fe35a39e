"""Something done before and after one module's forward, attached and taken off again; the signature is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Before = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
After = Callable[[], None]
# Given what a forward raised: what to raise in its place, or None to leave it.
Failed = Callable[[BaseException], BaseException | None]

_WRAPPED = "_loadplan_wrapped"


def attach(
    module: torch.nn.Module,
    *,
    before: Before | None = None,
    after: After | None = None,
    failed: Failed | None = None,
) -> None:
    """Wrap a module's forward: `before` may change its arguments; `after` is called even if it raises."""
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            args, kwargs = before(args, kwargs)
        try:
            return forward(*args, **kwargs)
        except Exception as exc:
            other = failed(exc) if failed is not None else None
            if other is None:
                raise
            raise other from exc
        finally:
            if after is not None:
                after()

    setattr(wrapped, _WRAPPED, True)
    module.forward = wrapped


def detach(module: torch.nn.Module) -> None:
    """Take off everything that `attach` put on this module."""
    while getattr(vars(module).get("forward"), _WRAPPED, False):
        inner = getattr(module.forward, "__wrapped__")  # noqa: B009 - set by functools.wraps, unknown to the type
        if getattr(inner, "__func__", None) is type(module).forward:
            del module.forward
        else:
            module.forward = inner
