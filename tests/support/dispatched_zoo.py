"""Modules of the zoo dispatched, and what copies of them are compared by. For tests only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from plain_modules import ZOO, tensors_in
from torch import nn

import dispatch

PLAYED = {"cuda:0": "cpu"}
CPU = torch.device("cpu")


def dispatched(name: str, folder: Path, *homes: Any, **options: Any) -> Any:
    """Return a module of the zoo dispatched; mapped: all on disk, run by the CPU."""
    entry = ZOO[name]
    places = {block: homes[index % len(homes)] for index, block in enumerate(entry.blocks)}
    if homes == ("mapped",):
        places, options = {"": "disk"}, {"main_device": "cpu", **options}
    options = {"main_device": 0, "offload_dir": folder, "devices": PLAYED, **options}
    return dispatch.dispatch_model(entry.build(), places, preload_module_classes=entry.preload, **options)


def answers(name: str, module: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors_in(ZOO[name].call(module, CPU))


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def hooked(module: nn.Module) -> dict[str, bool]:
    """Return which modules have hooks, and whether their weights wait."""
    named = module.named_modules()
    return {path: dispatch.has_offloaded_params(each) for path, each in named if "forward" in vars(each)}
