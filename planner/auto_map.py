"""Device maps made from a module's tree alone, and checked against it.

The rule: weights are counted, nothing is traced. As many bytes as the caps allow stay on GPUs; layers are in order on
the GPUs as far as that costs no bytes. What waits is in host memory as far as it has room, else on disk.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from planner import map_fill
from planner.device_map import merged
from planner.errors import InfeasibleError, InputError
from planner.hardware import listed
from planner.map_fill import Unit
from planner.memory_caps import Caps, get_max_memory, gpus_of
from planner.module_sizes import check_module, paths
from planner.units import format_bytes

if TYPE_CHECKING:
    import torch


def infer_auto_device_map(
    model: torch.nn.Module,
    max_memory: Mapping[Any, int | str] | None = None,
    no_split_module_classes: Collection[str] | str | None = None,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> dict[str, int | str]:
    """Return a device map that Accelerate and `dispatch` can run: module → number of a GPU, "cpu" or "disk".

    It is within the caps. The first GPU of the map keeps room for the largest layer that waits, and, unless
    `offload_buffers`, for the buffers of all that wait; host memory keeps room for the largest on disk. What shares a
    tensor is in one place, unless no GPU could hold it. fallback_allocation: changes nothing, gaps are always filled.

    Raises:
        InputError: a device, size or dtype that cannot be one. InfeasibleError: a cap for the disk is too small.
    """
    from planner.module_units import rows_of

    check_module(model)
    caps = get_max_memory(max_memory)
    gpus = gpus_of(caps)
    best: tuple[tuple[Unit, ...], map_fill.Places] | None = None
    for units in rows_of(
        model, no_split_module_classes, dtype, special_dtypes,
        offload_buffers=offload_buffers, largest=max((caps[gpu] for gpu in gpus), default=None),
    ):  # fmt: skip
        places = map_fill.kept(units, [caps[gpu] for gpu in gpus])
        if best is None or map_fill.kept_bytes(units, places) > map_fill.kept_bytes(*best):
            best = units, places
        if None not in places:
            break
    assert best is not None
    units, places = best
    found = _below(units, [None if place is None else gpus[place] for place in places], caps)
    if verbose:
        _tell(units, found, caps)
    if clean_result:
        return merged({name: place for unit, place in zip(units, found, strict=True) for name in unit.tensors})
    return {name: place for unit, place in zip(units, found, strict=True) for name in unit.names}


def check_device_map(model: torch.nn.Module, device_map: Mapping[str, Any]) -> None:
    """Raise InputError where a map names what the model does not have, or no device, or leaves out a weight.

    Parameters and the buffers that checkpoints hold must be covered. Whether a GPU is there is not asked.
    """
    check_module(model)
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    stored = list(model.state_dict())
    tensors = {*stored, *(name for name, _ in model.named_buffers(remove_duplicate=False))}
    wrong = [name for name in device_map if name not in modules and name not in tensors]
    if wrong:
        close = difflib.get_close_matches(wrong[0], sorted(modules | tensors), n=3, cutoff=0.6)
        there = listed(close or [name for name, _ in model.named_children()][:3] or ['""'])
        others = f" (and {len(wrong) - 1:,} more that are not there)" if len(wrong) > 1 else ""
        raise InputError(f"the device map names {wrong[0]!r}{others}; the model has no such module; try {there}")
    for name, place in device_map.items():
        if not _is_device(place):
            raise InputError(
                f"the device map puts {name!r} on {place!r}, which is no device; there are numbers of GPUs from 0, "
                "'cpu', 'disk', and what torch.device takes"
            )
    missing = [name for name in stored if not any(path in device_map for path in paths(name))]
    if missing:
        others = f" and of {len(missing) - 1:,} others" if len(missing) > 1 else ""
        raise InputError(
            f'the device map says nothing of {missing[0]}{others}; add their modules, or "" for all that is left'
        )


def _below(units: Sequence[Unit], places: Sequence[int | str | None], caps: Caps) -> list[int | str]:
    """Return the places with "cpu" and "disk" where no GPU keeps a unit."""
    waiting = [i for i, place in enumerate(places) if place is None]
    runs_on_host = len(waiting) == len(units)
    # A unit on disk comes through host memory. Where that runs it, its buffers stay there, and what no hook brings may
    # not wait.
    row = [
        Unit(
            names=units[i].names,
            tensors=units[i].tensors,
            nbytes=units[i].nbytes,
            left_bytes=units[i].left_bytes if runs_on_host else 0,
            brought_bytes=units[i].nbytes,
            need=units[i].need if runs_on_host else 0,
        )
        for i in waiting
    ]
    host = [caps["cpu"]] if caps.get("cpu") else []
    kept = map_fill.kept(row, host)
    if None in kept and not any(place is not None for place in kept) and runs_on_host:
        row = [replace(unit, need=0) for unit in row]
        kept = map_fill.kept(row, host)
    found = list(places)
    for i, place in zip(waiting, kept, strict=True):
        found[i] = "disk" if place is None else "cpu"
    on_disk = sum(unit.nbytes for unit, place in zip(units, found, strict=True) if place == "disk")
    if "disk" in caps and on_disk > caps["disk"]:
        raise InfeasibleError(
            device="disk",
            needed_bytes=on_disk,
            available_bytes=caps["disk"],
            smallest_fix="leave the disk out of max_memory, or raise it",
            message=f"the disk needs {format_bytes(on_disk)} and may hold {format_bytes(caps['disk'])}; leave it out "
            "of max_memory, or raise a cap",
        )
    return [place for place in found if place is not None]


def _is_device(place: Any) -> bool:
    import torch

    if isinstance(place, torch.device) or place == "disk":
        return True
    if isinstance(place, bool) or not isinstance(place, (int, str)):
        return False
    if isinstance(place, int):
        return place >= 0
    try:
        torch.device(place)
    except RuntimeError:
        return place.isdigit()
    return True


def _tell(units: Sequence[Unit], places: Sequence[int | str], caps: Caps) -> None:
    for place in dict.fromkeys([*caps, *places]):
        held = [unit for unit, there in zip(units, places, strict=True) if there == place]
        of = f" of {format_bytes(caps[place])}" if place in caps else ""
        print(f"{place}: {format_bytes(sum(unit.nbytes for unit in held))}{of}")
        for unit in held:
            print(f"  {', '.join(unit.names) or 'the model'}: {format_bytes(unit.nbytes)}")
