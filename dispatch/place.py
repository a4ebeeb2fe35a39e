"""A tensor's place in a module: reading what is there, and putting something else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch

from planner.errors import InputError


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
        if (module._parameters if leaf in module._parameters else module._buffers)[leaf] is not away[name]:
            raise InputError(
                f"{name} was replaced after dispatch.apply, and its weights are streamed from elsewhere: call "
                "dispatch.remove, replace it, and apply the plan again"
            )
