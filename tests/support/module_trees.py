"""Small modules drawn by chance, and what a device map of one takes, counted without the planner. For tests only."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch


class Block(torch.nn.Module):
    """A module that must not be split; Open is the same and may be."""


class Open(torch.nn.Module):
    pass


def draw(chance: random.Random, *, leaves: int = 6, ties: bool = True, own: bool = True) -> torch.nn.Module:
    """Return a module of at most so many leaves, some inside others; with tied weights, and tensors of modules' own."""
    left = [leaves]

    def leaf() -> torch.nn.Module:
        left[0] -= 1
        if chance.random() < 0.2:
            return torch.nn.BatchNorm1d(chance.randint(1, 9))
        return torch.nn.Linear(chance.randint(1, 9), chance.randint(1, 9), bias=chance.random() < 0.5)

    def inner(depth: int) -> torch.nn.Module:
        module = (Block if depth and chance.random() < 0.4 else Open)()
        if own and chance.random() < 0.25:
            module.weight = torch.nn.Parameter(torch.zeros(chance.randint(1, 9)))
        if own and chance.random() < 0.15:
            module.register_buffer("table", torch.zeros(chance.randint(1, 9)), persistent=chance.random() < 0.5)
        for number in range(chance.randint(2, 3)):
            if left[0] > 0:
                child = inner(depth + 1) if depth < 2 and chance.random() < 0.4 else leaf()
                module.add_module(f"m{number}", child)
        return module

    with torch.device("meta"):
        model = inner(0)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    if ties and len(linears) > 1 and chance.random() < 0.4:
        one, other = chance.sample(linears, 2)
        other.weight = one.weight
    return model


def tensors_of(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, bool]]:
    """Return every tensor under every name, and whether it is a buffer."""
    found = {name: (value, False) for name, value in model.named_parameters(remove_duplicate=False)}
    return found | {name: (value, True) for name, value in model.named_buffers(remove_duplicate=False)}


def place_of(name: str, device_map: Mapping[str, Any]) -> Any:
    above = [key for key in device_map if key in ("", name) or name.startswith(f"{key}.")]
    return device_map[max(above, key=len)] if above else None


def layers_of(model: torch.nn.Module, whole: set[str]) -> dict[str, str]:
    """Return {tensor: the layer it is in}: a module of a whole class, or without children; else the tensor itself."""
    kinds = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name in tensors_of(model):
        parts = name.split(".")[:-1]
        above = [".".join(parts[:end]) for end in range(len(parts) + 1)]
        one = next((p for p in above if type(kinds[p]).__name__ in whole or not list(kinds[p].children())), None)
        found[name] = name if one is None else one
    return found


def taken(
    model: torch.nn.Module, device_map: Mapping[str, Any], whole: set[str], *, offload_buffers: bool = False
) -> tuple[dict[Any, int], int, bool]:
    """Return what each device of a map takes when Accelerate runs it, the bytes that GPUs keep, and whether it can.

    Waiting layers pass through the first GPU, one at a time; their buffers stay there. Tensors of the model itself
    are moved there, and no hook brings those that other modules have beside their children, unless all of such a module
    waits.
    """
    layers = layers_of(model, whole)
    modules = dict(model.named_modules(remove_duplicate=False))
    gpus = sorted({place for place in device_map.values() if isinstance(place, int)})
    main = gpus[0] if gpus else "cpu"
    used: dict[Any, int] = {}
    waiting: dict[str, dict[int, int]] = {}
    staged: dict[str, dict[int, int]] = {}
    seen: set[tuple[Any, int]] = set()
    kept: dict[int, int] = {}
    runs = True
    for name, (value, is_buffer) in tensors_of(model).items():
        nbytes = value.numel() * value.element_size()
        place = place_of(name, device_map)
        at_root = "." not in name and bool(list(model.children())) and type(model).__name__ not in whole
        if at_root or place is None:
            runs &= place is None or place == main or not gpus
            place = main if gpus else place
        owner = name.rpartition(".")[0]
        alone = (
            layers[name] == name
            and name not in modules
            and not at_root
            and any(place_of(other, device_map) != place for other in layers if other.startswith(f"{owner}."))
        )
        waits = place == "disk" or (place == "cpu" and bool(gpus))
        runs &= not (alone and waits and bool(gpus))
        if waits:
            if place == "disk":
                staged.setdefault(layers[name], {})[id(value)] = nbytes
            if offload_buffers or not is_buffer:
                waiting.setdefault(layers[name], {})[id(value)] = nbytes
            elif (main, id(value)) not in seen:
                seen.add((main, id(value)))
                used[main] = used.get(main, 0) + nbytes
        elif place in gpus:
            kept[id(value)] = nbytes
        if (place, id(value)) not in seen:
            seen.add((place, id(value)))
            used[place] = used.get(place, 0) + nbytes
    if waiting and gpus:
        used[main] = used.get(main, 0) + max(sum(layer.values()) for layer in waiting.values())
    if staged:
        used["cpu"] = used.get("cpu", 0) + max(sum(layer.values()) for layer in staged.values())
    return used, sum(kept.values()), runs
