"""What `.device` of a module says while its first weights wait elsewhere: where it runs, and never meta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def tell(
    model: torch.nn.Module, layers: Sequence[str], devices: Mapping[str, torch.device]
) -> list[tuple[torch.nn.Module, type]]:
    """Give modules whose `device` would be meta that of the first of `layers` that they hold or are in; return each
    with the class that it had. `device` is a property of classes, so such a module gets a class of its own.
    """
    changed: list[tuple[torch.nn.Module, type]] = []
    for path, module in model.named_modules():
        kind: Any = type(module)
        if not isinstance(getattr(kind, "device", None), property) or next(module.parameters(), None) is None:
            continue
        found: Any = module.device
        if isinstance(found, torch.device) and found.type == "meta":
            name = next((name for name in layers if _meets(path, name)), layers[0])
            module.__class__ = _with_device(kind, devices[name])
            changed.append((module, kind))
    return changed


def _with_device(kind: type, device: torch.device) -> type:
    """Return a class that is this one but for its device."""

    def told(self: torch.nn.Module) -> torch.device:
        return device

    return type(kind.__name__, (kind,), {"device": property(told), "__module__": kind.__module__})


def untell(changed: list[tuple[torch.nn.Module, type]]) -> None:
    """Give modules back the classes that they had."""
    for module, kind in changed:
        module.__class__ = kind


def _meets(path: str, layer: str) -> bool:
    """Tell whether a module holds a layer, or is in it."""
    return not path or path == layer or layer.startswith(f"{path}.") or path.startswith(f"{layer}.")
