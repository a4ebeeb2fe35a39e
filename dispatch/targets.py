"""Which devices of this machine are those of a plan, and whether all that the plan says can be carried out here."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from planner.errors import InputError
from planner.graph import WeightGroup
from planner.memory import is_mapped, slot_kind, waiting_slices, with_groups
from planner.plan import Placement, Plan
from planner.units import format_bytes


def check_carried_out(plan: Plan) -> None:
    """Refuse a plan that asks for what is not built, or that lacks what it needs.

    Raises:
        InputError: it spans several nodes, holds weights in another precision, lets the CPU compute experts that are
            not in its memory, or has too few or too small slots for what is copied.
    """
    nodes = sorted({plan.hardware.node(name) for p in plan.placements for name in (p.run_on, p.home)})
    if len(nodes) > 1:
        raise InputError(
            f"the plan spans {len(nodes)} nodes ({', '.join(nodes)}), and running over several processes is not built "
            "yet; plan for the machine of one node"
        )
    for placement, group in with_groups(plan.graph, plan.placements):
        if placement.dtype is not None:
            raise InputError(
                f"the plan holds {placement.layer} {placement.group} in {placement.dtype}: running quantised groups is "
                "not built yet; plan without --dtype choices"
            )
        if waiting_slices(placement, group):
            _check_waiting(plan, placement, group)


def _check_waiting(plan: Plan, placement: Placement, group: WeightGroup) -> None:
    hardware, device = plan.hardware, placement.run_on
    if placement.cpu_up_to_tokens:
        if group.slices == 1 or placement.home != hardware.host(device):
            raise InputError(
                f"the plan lets the CPU compute {placement.layer} {placement.group}, which waits on {placement.home}: "
                "it computes only experts that wait in its own memory; plan again"
            )
    elif is_mapped(hardware, group, device, placement.memory):
        return
    slots = plan.slots_on(device, slot_kind(group))
    if slots is None and placement.cpu_up_to_tokens:
        return
    if slots is None or slots.count < 1 or slots.slot_bytes < group.slice_slab_bytes:
        found = "none" if slots is None else f"{slots.count} of {format_bytes(slots.slot_bytes)}"
        raise InputError(
            f"{placement.layer} {placement.group} passes through slots of {format_bytes(group.slice_slab_bytes)} on "
            f"{device}, where the plan has {found}; plan again"
        )


def is_here(device: torch.device) -> bool:
    """Tell whether this machine has a device. Those of a backend of the user's own are believed, and pretended ones."""
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    if device.type in ("cpu", "meta", torch._C._get_privateuse1_backend_name()):
        return True
    here = torch.accelerator.current_accelerator(check_available=True)
    return here is not None and here.type == device.type and (device.index or 0) < torch.accelerator.device_count()


def find_targets(plan: Plan, devices: Mapping[str, torch.device | str]) -> dict[str, torch.device]:
    """Return the device of this machine for each of the plan's that runs layers; each is itself unless named.

    Raises:
        InputError: a name is not the plan's, or there is no such device here.
    """
    hardware = plan.hardware
    names = [device.name for device in hardware.devices]
    unknown = [name for name in devices if name not in names]
    if unknown:
        raise InputError(f"devices names {unknown[0]!r}; the plan has {', '.join(names)}")
    targets = {}
    for name in sorted(set(plan.run_on())):
        given = devices.get(name, "cpu" if name == hardware.host(name) else name)
        if given == name and hardware.node(name):
            raise InputError(
                f"the plan runs layers on {name}: say which device of this machine that is, "
                f'apply(..., devices={{"{name}": "{name.rpartition("/")[2]}"}})'
            )
        device = torch.device(given)
        if not is_here(device):
            raise InputError(
                f"the plan runs layers on {name}, and this machine has no {device}; plan with its own GPUs (--gpus), "
                "or say which device to use: apply(..., devices={...})"
            )
        if plan.workload.cache == "offloaded" and device.type != "cuda" and name != hardware.host(name):
            raise InputError(
                f"the plan keeps keys and values in host memory, and transformers' offloaded cache copies them with "
                f"CUDA's streams: it cannot run with {name} played by {device}; plan with another cache (--cache)"
            )
        targets[name] = device
    return targets
