"""What a described machine must be for plans to be made for it; a fault is named in one message."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter

from planner.errors import InputError
from planner.hardware import MAX_GPUS, Hardware, listed, own_name


def check(hardware: Hardware) -> None:
    """Check that names are unique, that everything named is there, and that what plans need is.

    Raises:
        InputError: the first fault found.
    """
    _check_names(hardware)
    _check_sizes(hardware)
    _check_links(hardware)
    _check_shared(hardware)


def _check_names(hardware: Hardware) -> None:
    for what, names in (("devices", [d.name for d in hardware.devices]), ("pools", [p.name for p in hardware.pools])):
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            raise InputError(f"hardware: two {what} are called {twice[0]!r}; give each a name of its own")
    pools = [pool.name for pool in hardware.pools]
    for device in hardware.devices:
        if re.fullmatch(r"([^/]+/)?(cpu|cuda:(0|[1-9][0-9]*))", device.name) is None or (
            (own_name(device.name) == "cpu") != (device.kind == "cpu")
        ):
            raise InputError(
                f"hardware: no {device.kind} device can be called {device.name!r}; write cuda:0, cuda:1, and cpu, with "
                "several nodes node0/cuda:0"
            )
        if device.pool not in pools or hardware.node(device.pool) != hardware.node(device.name):
            raise InputError(f"hardware: {device.name} draws on {device.pool!r}, which is no pool of its node")
    if "" in hardware.nodes and len(hardware.nodes) > 1:
        raise InputError("hardware: some devices are in a node, such as node0/cuda:0, and others are not; name all")
    if len(hardware.gpus) > MAX_GPUS:
        raise InputError(f"hardware: {len(hardware.gpus)} GPUs; at most {MAX_GPUS} are carried")
    needed = [name for node in hardware.nodes or ("",) for name in (_joined(node, "cpu"), _joined(node, "disk"))]
    for name in needed:
        if name not in pools or (own_name(name) == "cpu" and all(name != d.name for d in hardware.devices)):
            raise InputError(
                f"hardware: there is no {name!r}; every node has a device and a pool of its host's memory, and a pool "
                "of its disk (of 0 bytes where it has none)"
            )
        if own_name(name) == "cpu" and hardware.device(name).pool != name:
            raise InputError(f"hardware: {name} must draw on the pool of its own name; let GPUs share that one")


def _check_sizes(hardware: Hardware) -> None:
    counts: list[tuple[str, int, int]] = []
    for device in hardware.devices:
        if "default" not in device.flops_per_s:
            raise InputError(f'hardware: flops_per_s of {device.name} lacks "default", for dtypes that are not named')
        counts += [(f"flops_per_s of {device.name} in {key}", rate, 1) for key, rate in device.flops_per_s.items()]
        counts.append((f"bytes_per_s of {device.name}", device.bytes_per_s, 1))
        counts += [
            (f"{name} of {device.name}", getattr(device, name), 0)
            for name in ("operator_ns", "context_bytes", "workspace_bytes", "activation_bytes_per_s")
        ]
        for each in device.matmuls:
            what = f"of a {each.kind} on {device.name} in {each.dtype}"
            counts += [(f"rows {what}", each.rows, 1), (f"flops_per_s {what}", each.flops_per_s, 1)]
            sizes = {"width": each.width, "inputs": each.inputs}
            counts += [(f"{name} {what}", 1 if size is None else size, 1) for name, size in sizes.items()]
    for pool in hardware.pools:
        counts.append((f"capacity_bytes of {pool.name}", pool.capacity_bytes, 0))
        counts.append((f"reserved_bytes of {pool.name}", pool.reserved_bytes, 0))
    for link in hardware.links:
        counts.append((f"bytes_per_s from {link.source} to {link.target}", link.bytes_per_s, 1))
        counts.append((f"latency_ns from {link.source} to {link.target}", link.latency_ns, 0))
        for name in ("mapped_bytes_per_s", "cached_bytes_per_s", "cached_mapped_bytes_per_s"):
            counts.append((f"{name} from {link.source} to {link.target}", getattr(link, name), 0))
    counts += [(f"bytes_per_s of {shared.name}", shared.bytes_per_s, 1) for shared in hardware.shared]
    if hardware.pinned_limit_bytes is not None:
        counts.append(("pinned_limit_bytes", hardware.pinned_limit_bytes, 0))
    for what, value, least in counts:
        if value < least:
            raise InputError(f"hardware: {what} must be at least {least}, and is {value}")
    spreads = [(device.name, device.spread) for device in hardware.devices]
    spreads += [(f"the link from {link.source} to {link.target}", link.spread) for link in hardware.links]
    for what, spread in spreads:
        if not 0 <= spread < math.inf:
            raise InputError(f"hardware: the spread of {what} must be at least 0, and is {spread}")
    if not 0 < hardware.pageable_fraction <= 1:
        raise InputError(f"hardware: pageable_fraction must lie in (0, 1], and is {hardware.pageable_fraction}")


def _check_links(hardware: Hardware) -> None:
    places = {device.name for device in hardware.devices} | {hardware.disk(host.name) for host in hardware.hosts}
    seen: set[tuple[str, str]] = set()
    for link in hardware.links:
        ends = (link.source, link.target)
        for end in ends:
            if end not in places:
                raise InputError(
                    f"hardware: a link joins {link.source} to {link.target}, and there is no {end!r}; there are "
                    f"{listed(sorted(places))}"
                )
        if link.source == link.target or ends in seen:
            raise InputError(f"hardware: the link from {link.source} to {link.target} is there twice, or leads nowhere")
        seen.add(ends)
    for host in hardware.hosts:
        here = [gpu.name for gpu in hardware.gpus if hardware.host(gpu.name) == host.name]
        others = [other.name for other in hardware.hosts if other is not host]
        needed = [
            (hardware.disk(host.name), host.name),
            *((host.name, name) for name in (*here, *others)),
            *((name, host.name) for name in here),
            *itertools.permutations(here, 2),
        ]
        for source, target in needed:
            if (source, target) not in seen:
                raise InputError(f"hardware: there is no link from {source} to {target}; add it, one for each way")


def _check_shared(hardware: Hardware) -> None:
    twice = [name for name, times in Counter(entry.name for entry in hardware.shared).items() if times > 1]
    if twice:
        raise InputError(f"hardware: two of what is shared are called {twice[0]!r}; give each a name of its own")
    known = {device.name for device in hardware.devices}
    known |= {f"{link.source}→{link.target}" for link in hardware.links}
    for entry in hardware.shared:
        for user in entry.users:
            if user not in known:
                raise InputError(
                    f"hardware: {entry.name!r} is shared by {user!r}, which is no device and no link; write a link as "
                    f"{hardware.links[0].source}→{hardware.links[0].target}"
                )


def _joined(node: str, name: str) -> str:
    return f"{node}/{name}" if node else name
