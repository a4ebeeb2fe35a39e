"""Something done before and after one module's forward, attached and taken off again; the signature is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.fx import GraphModule

Before = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
After = Callable[[], None]
Made = Callable[[Any], Any]


class Around(Protocol):
    """Runs a forward with its arguments, in whatever it takes."""

    def run(
        self, module: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what the forward returns."""


# On what `attach` puts in a module's place for its forward: the forward that was there.
_WRAPPED = "_loadplan_wrapped"
# On what stands for the forward of a module's class.
_IS_CLASSES = "_loadplan_classes"


def attach(
    module: torch.nn.Module, *, before: Before | None = None, made: Made | None = None, after: After | None = None
) -> None:
    """Wrap a module's forward: `before` may change its arguments and `made` what it returns; `after` is called even if
    it raises.

    torch.compile leaves these as they are, and compiles the forward between them.
    """
    forward = _forward(module)
    before = None if before is None else torch.compiler.disable(before)
    made = None if made is None else torch.compiler.disable(made)
    after = None if after is None else torch.compiler.disable(after)

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            args, kwargs = before(args, kwargs)
        try:
            result = forward(*args, **kwargs)
            return result if made is None else made(result)
        finally:
            if after is not None:
                after()

    _wrap(module, forward, wrapped)


def attach_around(module: torch.nn.Module, around: Around) -> None:
    """Wrap a module's forward, and leave it to `around` to call it."""
    forward = _forward(module)

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around.run(module, forward, args, kwargs)

    _wrap(module, forward, wrapped)


def _forward(module: torch.nn.Module) -> Callable[..., Any]:
    """Return the forward that is to be wrapped. A GraphModule's class gets another whenever its graph is compiled anew,
    so that is looked up in each call.
    """
    forward: Callable[..., Any] = module.forward
    if not isinstance(module, GraphModule) or "forward" in vars(module):
        return forward

    @functools.wraps(forward)
    def latest(*args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs)

    setattr(latest, _IS_CLASSES, True)
    return latest


def _wrap(module: torch.nn.Module, forward: Any, wrapped: Any) -> None:
    outside = torch.compiler.disable(wrapped, recursive=False)
    setattr(outside, _WRAPPED, forward)
    module.forward = outside


def detach(module: torch.nn.Module) -> None:
    """Take off everything that `attach` put on this module."""
    if "forward" in vars(module):
        own = own_forward(module)
        del module.forward
        if own is not None:
            module.forward = own


def own_forward(module: torch.nn.Module) -> Callable[..., Any] | None:
    """Return the forward that a module has of its own, under what `attach` put there; None where it is its class's."""
    own: Callable[..., Any] | None = vars(module).get("forward")
    while (inner := getattr(own, _WRAPPED, None)) is not None:
        if getattr(inner, "__func__", None) is type(module).forward or getattr(inner, _IS_CLASSES, False):
            return None
        own = inner
    return own
