"""A tensor's place in a module: reading what is there, and putting something else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from dispatch.away import Away
from planner.errors import InputError


def check_module(model: object) -> None:
    """Raise InputError where what was given for a model is none."""
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.jit.ScriptModule):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise InputError(f"{kind} cannot be dispatched: give the torch.nn.Module itself")


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and buffer under each of its names, tied ones too."""
    return itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def owner(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """Return (module, leaf name) of a full tensor name."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def owner_in(parts: Mapping[str, torch.nn.Module], name: str) -> tuple[torch.nn.Module, str]:
    """Return (module, leaf name) of a full tensor name, among modules by their paths."""
    path, _, leaf = name.rpartition(".")
    return parts[path], leaf


def get(module: torch.nn.Module, leaf: str) -> torch.Tensor:
    """Return the parameter or buffer called `leaf`, detached from autograd."""
    found: torch.Tensor | None = module._parameters.get(leaf)
    if found is None:
        found = module._buffers[leaf]
    assert found is not None
    return found.detach()


def here(module: torch.nn.Module, leaf: str) -> torch.Tensor | None:
    """Return the very object that is the parameter or buffer called `leaf`."""
    return module._parameters.get(leaf) if leaf in module._parameters else module._buffers.get(leaf)


def order_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the order of its dimensions in which a tensor lies in memory without a gap, as channels-last ones do; None
    where that is their own order, or there is none.
    """
    if tensor.is_contiguous():
        return None
    order = tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return order if tensor.permute(order).is_contiguous() else None


def strides_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the strides that a copy of a tensor is to have; None for those that a new one has."""
    if tensor.is_contiguous():
        # By what a dimension of one element has, torch tells channels-last tensors.
        return tensor.stride() if 1 in tensor.shape and tensor.stride() != _new_strides(tensor.shape) else None
    return tensor.stride() if order_of(tensor) is not None else None


def _new_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))


def empty(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return memory for a tensor of this shape, dtype and order."""
    strides = strides_of(like)
    if strides is None:
        return torch.empty(like.shape, dtype=like.dtype, device=device)
    return torch.empty_strided(like.shape, strides, dtype=like.dtype, device=device)


def put(module: torch.nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the parameter or buffer called `leaf`, whichever it is; a parameter takes gradients as before."""
    if leaf in module._parameters:
        current = module._parameters[leaf]
        tensor = as_parameter(tensor, requires_grad=current is not None and current.requires_grad)
    set_tensor(module, leaf, tensor)


def as_parameter(tensor: torch.Tensor, *, requires_grad: bool = False) -> torch.nn.Parameter:
    """Return `tensor` as a parameter; a parameter is returned as it is."""
    if isinstance(tensor, torch.nn.Parameter):
        return tensor
    return torch.nn.Parameter(tensor, requires_grad=requires_grad)


def set_tensor(module: torch.nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the parameter or buffer called `leaf`, as the very object that it is."""
    if leaf not in module._parameters:
        module._buffers[leaf] = tensor
        return
    assert isinstance(tensor, torch.nn.Parameter)
    module._parameters[leaf] = tensor


def check_away(owners: Mapping[str, tuple[torch.nn.Module, str]], away: Mapping[str, torch.Tensor]) -> None:
    """Refuse to go on where somebody put another parameter in the place of one that is streamed.

    Raises:
        InputError: it would be passed over without a word.
    """
    for name, (module, leaf) in owners.items():
        found = here(module, leaf)
        # What it is may have been swapped with another's too (`torch.utils.swap_tensors`).
        if found is not away[name] or not isinstance(found, Away):
            raise InputError(
                f"{name} was replaced after dispatch.apply, and its weights are streamed from elsewhere: call "
                "dispatch.remove, which leaves it there, and dispatch the model again"
            )
