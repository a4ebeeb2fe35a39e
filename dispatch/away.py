"""What stands for a weight that waits elsewhere: it has its shape and dtype, and refuses to be computed with.

Plain tensors on meta do not: products with one give memory that nothing was written to, without a word (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.errors import InputError


class Away(torch.Tensor):
    """A tensor on meta that meets no tensor with values; what is made of it is such a tensor too."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Raise InputError where `func` takes a tensor with values beside this one, or writes to this one."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ == "__get__":
                # What every call of a module asks, as requires_grad: nothing is computed, and nothing written.
                return _away_too(func(*args, **kwargs))
            given = list(_tensors((*args, *kwargs.values())))
            has_values = any(not tensor.is_meta for tensor in given)
            # Setting `data` is no operator, and copying values here would fail before it comes to one.
            if func == _SET_DATA or (has_values and _in_place(func)):
                raise _written(func)
            if has_values:
                raise _used(func)
            try:
                with _NotWritten(func, given):
                    made = func(*args, **kwargs)
            except (NotImplementedError, RuntimeError) as exc:
                # Of copies, torch says NotImplementedError.
                if isinstance(exc, NotImplementedError) or func.__name__ in _ASK_FOR_VALUES:
                    raise _used(func) from exc
                raise
        return _away_too(made)


class AwayTensor(Away):
    """Stands for a buffer, or for what was made of such a tensor."""


class AwayParameter(Away, torch.nn.Parameter):
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


class _NotWritten(TorchDispatchMode):
    """Refuses operators that write to what a function was given, or to views of it: what is written there is nowhere.

    func: what was called.
    """

    def __init__(self, func: Callable[..., Any], tensors: Iterable[torch.Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._func, self._storages = func, {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[number] if number < len(args) else kwargs.get(argument.name)
                if any(tensor.untyped_storage()._cdata in self._storages for tensor in _tensors((written,))):
                    raise _written(self._func)
        return func(*args, **kwargs)


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]  # annotated as a plain attribute


_ASK_FOR_VALUES = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__complex__")


def _used(func: Callable[..., Any]) -> InputError:
    return InputError(
        "weights that wait elsewhere were used without calling the module that has them, or by a hook on it: name the "
        "class that uses them, or that holds such a module, in preload_module_classes. What was called: "
        f"{_named(func)}"
    )


def _written(func: Callable[..., Any]) -> InputError:
    return InputError(
        "values were given to weights that wait elsewhere, where they would be lost: load_state_dict of the whole "
        "model writes to host memory that they wait in, as does dispatch.weights_at_home(model); or call "
        f"dispatch.remove first. What was called: {_named(func)}"
    )


def _in_place(func: Callable[..., Any]) -> bool:
    """Tell by its name whether a function changes its first argument."""
    name = func.__name__
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _named(func: Callable[..., Any]) -> str:
    return "data" if func == _SET_DATA else func.__name__


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
