"""What each device may hold of a model, as Accelerate's users say it: {0: "10GB", "cpu": "64GB"}."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import InputError
from planner.map_fill import Unit, in_order
from planner.module_sizes import check_module
from planner.units import parse_memory

if TYPE_CHECKING:
    import torch


Caps = dict[int | str, int]
# Places beside GPUs that are called by number, in the order in which they are filled.
_OTHERS = ("mps", "cpu", "disk")
# Of the only GPU, where its free memory is taken as the cap: the rest is for what is computed.
_SHARE_OF_ONE = (9, 10)


def get_max_memory(max_memory: Mapping[Any, int | str] | None = None) -> Caps:
    """Return caps in bytes, GPUs first; where none are given, what is free on every GPU and on the host now.

    What is given is read and not changed. A GPU may be one that this machine does not have.

    Raises:
        InputError: a device or a size that cannot be one, or nothing given and the host's free memory not known.
    """
    if max_memory is None:
        return _free()
    for name in max_memory:
        is_number = isinstance(name, int) and not isinstance(name, bool)
        if (is_number and int(name) < 0) or not (is_number or name in _OTHERS):
            raise InputError(
                f"max_memory names {name!r}, which is no device; there are the numbers of GPUs from 0, 'mps', 'cpu' "
                "and 'disk'"
            )
    numbers = sorted(name for name in max_memory if isinstance(name, int))
    order: list[int | str] = [*numbers, *(name for name in _OTHERS if name in max_memory)]
    return {name: parse_memory(max_memory[name], what=f"max_memory of {name!r}") for name in order}


def get_balanced_memory(
    model: torch.nn.Module,
    max_memory: Mapping[Any, int | str] | None = None,
    no_split_module_classes: Collection[str] | str | None = None,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    low_zero: bool = False,
) -> Caps:
    """Return caps with which `infer_auto_device_map` shares the weights out evenly: for all GPUs but the last the
    smallest common one, in bytes, with which everything still fits in order. None is above what was given.

    Where not everything fits on the GPUs nothing is left to balance, and caps are as given. low_zero: the first GPU is
    given only what the others have no room for. With nothing given and one GPU, a tenth of its free memory is left.
    """
    from planner.module_units import rows_of

    check_module(model)
    caps = get_max_memory(max_memory)
    gpus = gpus_of(caps)
    if len(gpus) == 1 and max_memory is None:
        caps[gpus[0]] = caps[gpus[0]] * _SHARE_OF_ONE[0] // _SHARE_OF_ONE[1]
    if len(gpus) < 2:
        return caps
    own = [caps[gpu] for gpu in gpus]
    for units in rows_of(model, no_split_module_classes, dtype, special_dtypes):
        if _fits(units, own):
            caps.update(zip(gpus, _even(units, own, low_zero=low_zero), strict=True))
            break
    return caps


def gpus_of(caps: Caps) -> list[int | str]:
    """Return the devices beside host and disk that may hold anything, in order."""
    return [name for name, nbytes in caps.items() if name not in ("cpu", "disk") and nbytes > 0]


def _even(units: Sequence[Unit], own: Sequence[int], *, low_zero: bool) -> list[int]:
    first: list[int] = []
    if low_zero:
        first = [_least(own[0], lambda cap: _fits(units, [cap, *own[1:]]))]
    rest = own[len(first) :]
    common = _least(max(rest), lambda cap: _fits(units, [*first, *(min(cap, each) for each in rest)]))
    return [*first, *(min(common, each) for each in rest[:-1]), own[-1]]


def _fits(units: Sequence[Unit], caps: Sequence[int]) -> bool:
    return in_order(units, caps) is not None


def _least(most: int, is_enough: Callable[[int], bool]) -> int:
    """Return the least number with which `is_enough`, which holds for `most` and above some number."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low


def _free() -> Caps:
    import torch

    from planner.local import free_ram

    caps: Caps = {}
    shared = False
    for index in range(torch.cuda.device_count()):
        kept = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        caps[index] = torch.cuda.mem_get_info(index)[0] + kept
        shared |= bool(getattr(torch.cuda.get_device_properties(index), "is_integrated", False))
    ram, _ = free_ram(Path("/"))
    if ram is None:
        raise InputError("free host memory is not known here; give max_memory, such as {0: '20GB', 'cpu': '64GB'}")
    # Where GPU and host are one memory, it is said once.
    if torch.backends.mps.is_available():
        caps["mps"] = ram
    elif not shared:
        caps["cpu"] = ram
    return caps
