"""A machine with one thing changed, and which of its memories are alike: what explanations and fixes ask about."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace

from planner.hardware import Device, Hardware, Link
from planner.rules import NO_RULES, Rules


def alike(hardware: Hardware, rules: Rules = NO_RULES) -> tuple[tuple[str, ...], ...]:
    """Return the names of the memories in sets whose members are exchangeable, in the machine's order.

    Alike are memories of equal size whose devices have equal rates, and equal links to equal devices; a device that
    something is pinned to is alike to none.
    """
    pinned = {pin.device for pin in rules.pins}
    sets: dict[object, list[str]] = {}
    for pool in hardware.pools:
        devices = [_likeness(hardware, device) for device in hardware.devices if device.pool == pool.name]
        # A memory without a device (a disk) is alike to none.
        apart = "" if devices and pool.name not in pinned else pool.name
        key = (pool.usable_bytes, pool.reserved_bytes, tuple(devices), apart)
        sets.setdefault(key, []).append(pool.name)
    return tuple(tuple(names) for names in sets.values())


def _likeness(hardware: Hardware, device: Device) -> object:
    links = sorted(
        (_facts(hardware, link.target if out else link.source), out, link.bytes_per_s, link.latency_ns)
        for link in hardware.links
        for out in (link.source == device.name,)
        if device.name in (link.source, link.target)
    )
    return _facts(hardware, device.name), tuple(links)


def _facts(hardware: Hardware, name: str) -> tuple[str, ...]:
    """Return what a place is, but for its name and links."""
    for device in hardware.devices:
        if device.name == name:
            rates = sorted(device.flops_per_s.items())
            numbers = (device.bytes_per_s, device.operator_ns, device.context_bytes, device.workspace_bytes)
            size = hardware.pool(device.pool).usable_bytes
            return (device.kind, device.product, str(rates), str(device.matmuls), *map(str, numbers), str(size))
    return ("disk",)


def with_memory(hardware: Hardware, names: Collection[str], added_bytes: int) -> Hardware:
    """Return the machine with `added_bytes` more in each of the memories named."""
    pools = (
        replace(pool, capacity_bytes=pool.capacity_bytes + added_bytes) if pool.name in names else pool
        for pool in hardware.pools
    )
    return replace(hardware, pools=tuple(pools))


def with_faster_links(hardware: Hardware, links: Collection[Link], times: int) -> Hardware:
    """Return the machine with `times` the rate on the links given."""
    changed = (link.times(times) if link in links else link for link in hardware.links)
    return replace(hardware, links=tuple(changed))


def with_more_gpus(hardware: Hardware, like: str, count: int) -> Hardware:
    """Return the machine with `count` more GPUs after the others, each linked as the GPU `like` is."""
    for _ in range(count):
        hardware = _with_another_gpu(hardware, hardware.device(like))
    return hardware


def _with_another_gpu(hardware: Hardware, model: Device) -> Hardware:
    stem, number = _numbered(model.name)
    taken = [_numbered(device.name) for device in hardware.gpus]
    name = f"{stem}{1 + max((n for other, n in taken if other == stem), default=number)}"
    pool = replace(hardware.pool(model.pool), name=name)
    gpus = (*hardware.gpus, replace(model, name=name, pool=name))
    links = [_renamed(link, {model.name: name}) for link in hardware.links if model.name in (link.source, link.target)]
    pools = [*hardware.pools]
    pools.insert(1 + max(i for i, entry in enumerate(pools) if entry.name == model.pool), pool)
    return replace(
        hardware,
        devices=(*gpus, *(device for device in hardware.devices if device not in hardware.gpus)),
        pools=tuple(pools),
        links=(*hardware.links, *links, *_between(hardware, model, name)),
    )


def _between(hardware: Hardware, model: Device, name: str) -> Iterable[Link]:
    """Return the links between a GPU and one more like it: as to another of its product, else through the host."""
    for other in hardware.gpus:
        if other.name == model.name or other.product != model.product:
            continue
        pair = {(model.name, other.name), (other.name, model.name)}
        found = [link for link in hardware.links if (link.source, link.target) in pair]
        if len(found) == len(pair):
            return [_renamed(link, {other.name: name}) for link in found]
    host = hardware.host(model.name)
    ways = [link for link in hardware.links if {link.source, link.target} == {host, model.name}]
    if not ways:
        return []
    through = min(link.bytes_per_s for link in ways) // 2
    wait = 2 * max(link.latency_ns for link in ways)
    return [
        Link(source=source, target=target, bytes_per_s=through, latency_ns=wait)
        for source, target in ((model.name, name), (name, model.name))
    ]


def _renamed(link: Link, names: dict[str, str]) -> Link:
    return replace(link, source=names.get(link.source, link.source), target=names.get(link.target, link.target))


def _numbered(name: str) -> tuple[str, int]:
    """Return "cuda:" and 3 for "cuda:3"; a name without a number has none but 0."""
    match = re.fullmatch(r"(.*?)(\d+)", name)
    return (match[1], int(match[2])) if match else (name, 0)
