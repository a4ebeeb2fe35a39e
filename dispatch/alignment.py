"""Bringing a module's own weights to a device for a while, and a whole model to its device until it is sent back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dispatch import accelerate_hooks, hooks, place
from dispatch.copying import Here
from dispatch.dispatched import GROUP_ATTRIBUTE, WHOLE_ATTRIBUTE
from dispatch.mover import changed
from dispatch.plain_copy import COPYING, Memo, Pickled, plain_copy, tensors_below
from dispatch.stream import GroupStream, StreamedGroup
from dispatch.structure import Place, place_name
from planner.execution import SOURCE_ATTRIBUTE

_CPU = torch.device("cpu")


def has_offloaded_params(module: torch.nn.Module) -> bool:
    """Tell whether a module's own weights are copied each time that it runs, and are on meta until then.

    What the CPU computes with straight from mapped files is there at any time, and is not counted.
    """
    place.check_module(module)
    return GROUP_ATTRIBUTE in vars(module) or hasattr(module, SOURCE_ATTRIBUTE) or accelerate_hooks.is_offloaded(module)


@contextmanager
def align_module_device(module: torch.nn.Module, execution_device: Place | None = None) -> Iterator[None]:
    """Have a module's own weights on a device inside the block: those that wait are brought, others moved.

    execution_device: None is where those that wait would run; others stay where they are.

    Of weights that wait in host memory, a block on the CPU sees the very memory: what it changes there is kept. Other
    changes of weights that wait are lost with the block; those of others are kept.
    """
    place.check_module(module)
    accelerate_hooks.check(f"this {type(module).__name__}", module)
    streamed: tuple[GroupStream, StreamedGroup] | None = vars(module).get(GROUP_ATTRIBUTE)
    device = None if execution_device is None else torch.device(place_name(execution_device))
    if streamed is not None:
        stream, group = streamed
        if group.is_away:
            group.check()
        group.bring(stream.ring.device if device is None else device)
        try:
            yield
        finally:
            group.leave()
            stream.drop()
        return
    moved = {
        leaf: parameter
        for leaf, parameter in module._parameters.items()
        if parameter is not None and device is not None and parameter.device != device
    }
    try:
        for leaf, parameter in moved.items():
            there = parameter.detach().to(device)
            module._parameters[leaf] = place.as_parameter(there, requires_grad=parameter.requires_grad)
        yield
    finally:
        with torch.no_grad():
            for leaf, parameter in moved.items():
                now = module._parameters[leaf]
                if now is not None and not now.is_meta and not parameter.is_meta:
                    parameter.copy_(now)
                module._parameters[leaf] = parameter


class WholeOffload:
    """A whole model that waits in host memory until it is called, and stays on its device until `offload`.

    A copy of the model waits in host memory too, with a hook of its own, and so do copies of the models before it.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, before: WholeOffload | None):
        self.model, self.device, self._before = model, device, before
        self.offload()
        hooks.attach(model, before=self._bring)
        vars(model).update(__deepcopy__=self._copied, __reduce_ex__=self._pickled)
        setattr(model, WHOLE_ATTRIBUTE, self)

    @classmethod
    def of(cls, model: torch.nn.Module) -> WholeOffload | None:
        """Return what holds a model so, or None."""
        found: WholeOffload | None = vars(model).get(WHOLE_ATTRIBUTE)
        return found

    def offload(self) -> None:
        """Send the model back to host memory."""
        self.model.to("cpu")

    def remove(self) -> None:
        """Let the model go, where it is."""
        hooks.detach(self.model)
        for name in (*COPYING, WHOLE_ATTRIBUTE):
            vars(self.model).pop(name, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _hook_of, (self.model, self.device, self._before)

    def _copied(self, memo: Memo) -> torch.nn.Module:
        for tensor in tensors_below(self.model):
            if tensor.device != _CPU:
                memo[id(tensor)] = _on_host(tensor)
        model = plain_copy(self.model, memo)
        memo[id(self)] = WholeOffload(model, self.device, copy.deepcopy(self._before, memo))
        found: torch.nn.Module = model
        return found

    def _pickled(self, protocol: Any) -> tuple[Any, ...]:
        memo: Memo = {id(t): t if t.device == _CPU else _on_host(t) for t in tensors_below(self.model)}
        here = Here({str(self.device): self.device})
        return _offloaded, (Pickled((here, plain_copy(self.model, memo), self._before)),)

    def _bring(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._before is not None:
            self._before.offload()
        self.model.to(self.device)
        device = self.device
        return changed(args, lambda one: one.to(device)), changed(kwargs, lambda one: one.to(device))


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    values = tensor.detach().to("cpu")
    if not isinstance(tensor, torch.nn.Parameter):
        return values
    return place.as_parameter(values, requires_grad=tensor.requires_grad)


def _offloaded(read: tuple[tuple[Here, torch.nn.Module, WholeOffload | None]]) -> torch.nn.Module:
    """Return a model that was pickled, waiting as it did."""
    here, model, before = read[0]
    (device,) = here.targets.values()
    return WholeOffload(model, device, before).model


def _hook_of(model: torch.nn.Module, device: torch.device, before: WholeOffload | None) -> WholeOffload:
    """Return the hook of a model, or of one that its hook was removed from."""
    hook = WholeOffload.of(model)
    if hook is None:
        hook = WholeOffload.__new__(WholeOffload)
        hook.model, hook.device, hook._before = model, device, before
    return hook
