"""What stands for a weight that waits elsewhere: it has its shape and dtype, and refuses to be computed with.

Plain tensors on meta do not: products with one give memory that nothing was written to, without a word (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from planner.errors import InputError


class _Refusing(torch.Tensor):
    """A tensor on meta that meets no tensor with values; what is made of it is such a tensor too."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Raise InputError where `func` takes a tensor with values beside this one."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if any(_has_values(value) for value in (*args, *kwargs.values())):
                raise InputError(
                    "weights that wait elsewhere were used without calling the module that has them, or by a hook on "
                    "it: name the class that uses them, or that holds such a module, in preload_module_classes. What "
                    f"was called: {getattr(func, '__name__', func)}"
                )
            made = func(*args, **kwargs)
        return _away_too(made)


class AwayTensor(_Refusing):
    """Stands for a buffer, or for what was made of such a tensor."""


class AwayParameter(_Refusing, torch.nn.Parameter):
    """Stands for a parameter."""


AWAY = (AwayTensor, AwayParameter)


def away(tensor: torch.Tensor, *, parameter: bool) -> torch.Tensor:
    """Return what stands for a tensor while its values are elsewhere; it takes no gradients."""
    empty = tensor.detach().to("meta")
    return AwayParameter(empty, requires_grad=False) if parameter else empty.as_subclass(AwayTensor)


def _away_too(made: Any) -> Any:
    if type(made) is torch.Tensor and made.is_meta:
        return made.as_subclass(AwayTensor)
    return type(made)(_away_too(item) for item in made) if type(made) in (tuple, list) else made


def _has_values(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_meta
    return isinstance(value, (tuple, list)) and any(_has_values(item) for item in value)
