"""A model's layers and their weight groups, found from its modules; nothing is run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from planner import execution as implementations
from planner.errors import TraceError
from planner.graph import Tensor, WeightGroup

# Modules of torch that use their children's weights without calling them.
WHOLE = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer)
# Containers of parameters, which are never called: what they hold is their parent's own.
HOLDERS = (torch.nn.ParameterList, torch.nn.ParameterDict)


def find_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Return (path, module) of every layer, in registration order; a module with several paths under its first.

    A layer is a module whose class the model names in `_no_split_modules`, or, outside of those, a module that has
    parameters of its own. The model itself is one only where nothing inside it is, and a module around a row of blocks
    is none: what such a module has of its own is left loose.
    """
    whole = {str(name) for name in (getattr(model, "_no_split_modules", None) or ())}
    found: list[tuple[str, torch.nn.Module]] = []
    seen: set[int] = set()
    waiting: list[tuple[str, torch.nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        is_whole = type(module).__name__ in whole or isinstance(module, WHOLE)
        if is_whole or (_has_own(module) and not _is_opened(module, whole, is_model=module is model)):
            found.append((path, module))
            continue
        children = [(f"{path}.{name}" if path else name, child) for name, child in _children(module)]
        waiting += reversed(children)
    return found or [("", model)]


def _is_opened(module: torch.nn.Module, whole: set[str], *, is_model: bool) -> bool:
    """Tell whether a module with parameters of its own is too much for one layer."""
    inside = (child for _, child in itertools.islice(walk(module), 1, None) if child is not module)
    if is_model:
        return any(_has_own(child) for child in inside if not isinstance(child, HOLDERS))
    return any(_is_row(child) or type(child).__name__ in whole for child in inside)


def _is_row(module: torch.nn.Module) -> bool:
    """Tell whether a module is a row of blocks: several of one class, which have children themselves."""
    if not isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)):
        return False
    classes = [type(child) for _, child in _children(module) if any(_children(child))]
    return len(classes) > len(set(classes))


def _has_own(module: torch.nn.Module) -> bool:
    held = (child for _, child in _children(module) if isinstance(child, HOLDERS))
    return any(value is not None for owner in (module, *held) for value in owner._parameters.values())


def _called(module: torch.nn.Module, path: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield (path, module) of a module's children; of lists and dicts of modules, which are never called, theirs."""
    for name, child in _children(module):
        if isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict)):
            yield from _called(child, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


def _children(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    return ((name, child) for name, child in module._modules.items() if child is not None)


def walk(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield (path, module) under every path, parents first; a module inside itself is not entered again."""
    above: set[int] = set()
    waiting: list[tuple[str, torch.nn.Module, bool]] = [("", model, False)]
    while waiting:
        path, module, is_done = waiting.pop()
        if is_done:
            above.discard(id(module))
        elif id(module) not in above:
            above.add(id(module))
            yield path, module
            waiting.append((path, module, True))
            below = [(f"{path}.{name}" if path else name, child, False) for name, child in _children(module)]
            waiting += reversed(below)


def weight_groups(layer: torch.nn.Module) -> tuple[WeightGroup, ...]:
    """Return the weight groups of one layer.

    Fused experts are a group whose slices are the experts. Every other child with a matrix is a group; of a child that
    holds a row of blocks, each block is, for it may be called by choice, as an expert is. What is left
    (norms, routers smaller than an expert, tensors of the layer itself) is the group "rest", which always waits where
    its layer runs. A layer without children is one group, "weights", that does too.
    """
    if next(layer.named_children(), None) is None:
        own = tuple(_tensor(*named) for named in _named_tensors(layer))
        return (WeightGroup(name="weights", slices=1, used_slices=1, streamable=False, tensors=own),)
    experts = implementations.experts_modules(layer)
    owners = set(experts)
    in_rows: dict[str, torch.nn.Module] = {}
    for child_name, child in _called(layer):
        in_row = {
            f"{child_name}.{name}.{number}": block
            for name, row in _children(child)
            if isinstance(row, torch.nn.ModuleList) and _is_row(row) and not isinstance(child, WHOLE)
            for number, block in _children(row)
        }
        if in_row:
            in_rows |= in_row
            owners.update(f"{child_name}.{path}" for path, _ in _called(child))
        elif not any(path == child_name or path.startswith(child_name + ".") for path in experts):
            if not isinstance(child, HOLDERS):
                owners.add(child_name)
            continue
        # What stands beside experts (shared experts, a router) are groups of their own.
        owners.update(f"{child_name}.{grandchild}" for grandchild, _ in _children(child))
    members: dict[str, list[Tensor]] = {}
    for name, value, module in _named_tensors(layer):
        owner = next((path for path in _above(name) if path in owners), "rest")
        members.setdefault(owner, []).append(_tensor(name, value, module))
    groups: list[WeightGroup] = []
    small = members.pop("rest", [])
    expert_bytes = {
        path: sum(p.numel() * p.element_size() for p in module.parameters())
        // (_count(module) if path in experts else 1)
        for path, module in (experts | in_rows).items()
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


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.nn.Module]]:
    """Yield (name, tensor, the module that has it) under every name, parameters before buffers."""
    modules = list(walk(model))
    for kind in ("_parameters", "_buffers"):
        for path, module in modules:
            for leaf, value in getattr(module, kind).items():
                if value is not None:
                    yield f"{path}.{leaf}" if path else leaf, value, module


def _above(name: str) -> Iterator[str]:
    """Yield the paths that a tensor's name lies under, the longest first."""
    while name := name.rpartition(".")[0]:
        yield name


def _tensor(name: str, value: torch.Tensor, owner: torch.nn.Module) -> Tensor:
    leaf = name.rpartition(".")[2]
    is_buffer = leaf in owner._buffers
    return Tensor(
        name=name,
        shape=tuple(value.shape),
        dtype=str(value.dtype).removeprefix("torch."),
        nbytes=value.numel() * value.element_size(),
        buffer=is_buffer,
        persistent=not is_buffer or leaf not in owner._non_persistent_buffers_set,
    )


def ties(model: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the sets of names that one tensor goes by."""
    names: dict[int, list[str]] = {}
    for name, value, _ in _named_tensors(model):
        names.setdefault(id(value), []).append(name)
    return tuple(tuple(sorted(group)) for group in names.values() if len(group) > 1)


def loose_tensors(model: torch.nn.Module, layers: list[tuple[str, torch.nn.Module]]) -> tuple[Tensor, ...]:
    """Return the tensors outside of every layer, once each; another name of one inside a layer is only a tie."""
    paths = {path for path, _ in layers}
    outside: list[tuple[str, torch.Tensor, torch.nn.Module]] = []
    known: set[int] = set()
    for name, value, module in _named_tensors(model):
        if "" in paths or any(path in paths for path in _above(name)):
            known.add(id(value))
        else:
            outside.append((name, value, module))
    found = []
    for named in outside:
        if id(named[1]) not in known:
            known.add(id(named[1]))
            found.append(_tensor(*named))
    return tuple(found)
