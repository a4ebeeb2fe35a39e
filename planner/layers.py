"""A model's layers and their weight groups, found from its modules; nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from planner import execution as implementations
from planner.errors import TraceError
from planner.graph import Tensor, WeightGroup


def find_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Return (path, module) of every layer, in registration order.

    A layer is a module whose class the model names in `_no_split_modules`, or, outside of those, a module that has
    parameters of its own.
    """
    whole = {str(name) for name in (getattr(model, "_no_split_modules", None) or ())}
    found: list[tuple[str, torch.nn.Module]] = []

    def walk(path: str, module: torch.nn.Module) -> None:
        own = next(module.parameters(recurse=False), None) is not None
        if type(module).__name__ in whole or own:
            found.append((path, module))
            return
        for name, child in module.named_children():
            walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return found


def weight_groups(layer: torch.nn.Module) -> tuple[WeightGroup, ...]:
    """Return the weight groups of one layer.

    Fused experts are a group whose slices are the experts. Every other child with a matrix is a group. What is left
    (norms, routers smaller than an expert, tensors of the layer itself) is the group "rest", which always waits where
    its layer runs. A layer without children is one group, "weights", that does too.
    """
    if next(layer.named_children(), None) is None:
        own = tuple(_tensor(name, value, layer) for name, value in _named_tensors(layer))
        return (WeightGroup(name="weights", slices=1, used_slices=1, streamable=False, tensors=own),)
    experts = implementations.experts_modules(layer)
    owners: list[str] = list(experts)
    for child_name, child in layer.named_children():
        if not any(path == child_name or path.startswith(child_name + ".") for path in experts):
            owners.append(child_name)
            continue
        # What stands beside experts (shared experts, a router) are groups of their own.
        paths = [f"{child_name}.{grandchild}" for grandchild, _ in child.named_children()]
        owners += [path for path in paths if path not in experts]
    members: dict[str, list[Tensor]] = {}
    for name, value in _named_tensors(layer):
        owner = max((path for path in owners if name.startswith(path + ".")), key=len, default="rest")
        members.setdefault(owner, []).append(_tensor(name, value, layer))
    groups: list[WeightGroup] = []
    small = members.pop("rest", [])
    expert_bytes = {
        path: sum(p.numel() * p.element_size() for p in module.parameters()) // _count(module)
        for path, module in experts.items()
    }
    for name, tensors in members.items():
        if name in experts:
            used = _top_k(layer, experts[name])
            groups.append(
                WeightGroup(
                    name=name,
                    slices=_count(experts[name]),
                    used_slices=used,
                    streamable=True,
                    tensors=tuple(tensors),
                )
            )
        elif not any(len(tensor.shape) > 1 for tensor in tensors) or (
            "." in name and sum(tensor.nbytes for tensor in tensors) < min(expert_bytes.values(), default=0)
        ):
            small += tensors
        else:
            groups.append(WeightGroup(name=name, slices=1, used_slices=1, streamable=True, tensors=tuple(tensors)))
    if small:
        groups.append(WeightGroup(name="rest", slices=1, used_slices=1, streamable=False, tensors=tuple(small)))
    return tuple(groups)


def _count(experts: torch.nn.Module) -> int:
    count = experts.num_experts
    assert isinstance(count, int)
    return count


def _top_k(layer: torch.nn.Module, experts: torch.nn.Module) -> int:
    for module in layer.modules():
        value = getattr(module, "top_k", None)
        if isinstance(value, int):
            return value
    config: Any = experts.config
    for name in ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "top_k"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise TraceError(f"{type(experts).__name__}: how many experts a token uses is not known for this model yet")


def _named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _tensor(name: str, value: torch.Tensor, owner: torch.nn.Module) -> Tensor:
    path, _, leaf = name.rpartition(".")
    parent = owner.get_submodule(path)
    is_buffer = leaf in parent._buffers
    return Tensor(
        name=name,
        shape=tuple(value.shape),
        dtype=str(value.dtype).removeprefix("torch."),
        nbytes=value.numel() * value.element_size(),
        buffer=is_buffer,
        persistent=not is_buffer or leaf not in parent._non_persistent_buffers_set,
    )


def ties(model: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = {}
    for name, value in _named_tensors(model):
        names.setdefault(id(value), []).append(name)
    return tuple(tuple(sorted(group)) for group in names.values() if len(group) > 1)


def loose_tensors(model: torch.nn.Module, layers: list[tuple[str, torch.nn.Module]]) -> tuple[Tensor, ...]:
    inside = [f"{path}." if path else "" for path, _ in layers]
    return tuple(
        _tensor(name, value, model)
        for name, value in _named_tensors(model)
        if not any(name.startswith(prefix) for prefix in inside)
    )
