"""Files that describe a machine → Hardware: written by hand, or by `Hardware.save` (docs/hardware.md)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner.errors import InputError, PlanFormatError
from planner.gpus import Gpu, parse_gpus, parse_nodes, taken_for
from planner.hardware import MAX_GPUS, MAX_NODES, Hardware
from planner.hosts import behind, disk_rate, host, memory_rate
from planner.machines import WAYS, Machine, Node, parse_ram
from planner.products import product as product_of
from planner.serial import decode, read_text
from planner.units import format_bytes, parse_bytes, parse_flops, parse_rate


def load(path: str | Path) -> Hardware:
    """Return the machine of a JSON file: one that `Hardware.save` wrote, or a description by hand.

    Raises:
        InputError: the file cannot be read, or what it says cannot be; the message says where.
    """
    text = read_text(path, what="hardware file")
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as exc:
        raise InputError(f"the hardware file {path}: line {exc.lineno} is not JSON ({exc.msg})") from exc
    except (ValueError, RecursionError) as exc:
        raise InputError(f"the hardware file {path} is not a description of hardware: {exc}") from exc
    try:
        if isinstance(data, dict) and "devices" in data:
            hardware = decode(Hardware, data, where="hardware")
            hardware.check()
            return hardware
        return _described(_Reader(data, "hardware")).hardware()
    except (InputError, PlanFormatError) as exc:
        raise InputError(f"the hardware file {path}: {exc}") from exc


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return result


class _Reader:
    """Takes the keys of one JSON object; `done` refuses those that nobody took."""

    def __init__(self, data: object, where: str):
        if not isinstance(data, dict):
            raise InputError(f"{where} must be an object, and is {_kind(data)}")
        self.data, self.where = data, where
        self.taken: dict[str, None] = {}

    def raw(self, key: str) -> Any:
        self.taken[key] = None
        return self.data.get(key)

    def size(self, key: str) -> int | None:
        value = self._said(key)
        return None if value is None else parse_bytes(value, what=f"{self.where}.{key}")

    def rate(self, key: str) -> int | None:
        value = self._said(key)
        return None if value is None else parse_rate(value, what=f"{self.where}.{key}")

    def rate_of(self, key: str, parse: Callable[..., int]) -> int | None:
        """Take a rate that may have a name, as `parse` reads it."""
        value = self._said(key)
        return None if value is None else parse(value, what=f"{self.where}.{key}")

    def flops(self, key: str) -> int | None:
        value = self._said(key)
        return None if value is None else parse_flops(value, what=f"{self.where}.{key}")

    def count(self, key: str, *, least: int) -> int | None:
        value = self.raw(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InputError(f"{self.where}.{key} must be a whole number of at least {least}, and is {value!r}")
        return value

    def items(self, key: str) -> list[Any]:
        value = self.raw(key)
        if value is not None and not isinstance(value, list):
            raise InputError(f"{self.where}.{key} must be a list, and is {_kind(value)}")
        return value or []

    def done(self) -> None:
        unknown = [key for key in self.data if key not in self.taken]
        if unknown:
            raise InputError(f"{self.where} has unknown {', '.join(unknown)}; known are {', '.join(self.taken)}")

    def _said(self, key: str) -> Any:
        value = self.raw(key)
        if value is not None and not isinstance(value, (str, int)):
            raise InputError(f"{self.where}.{key} must be text such as 24GB, or a whole number; it is {_kind(value)}")
        return value


def _described(reader: _Reader) -> Machine:
    notes = ("GB = 10^9 bytes, GiB = 2^30 bytes",)
    network, latency = reader.rate("network"), reader.count("network_latency_ns", least=0)
    pinned, fraction = reader.size("pinned"), reader.raw("pageable_fraction")
    if fraction is not None and (isinstance(fraction, bool) or not isinstance(fraction, (int, float))):
        raise InputError(f"{reader.where}.pageable_fraction must be a number in (0, 1], and is {_kind(fraction)}")
    nodes: list[Node] = []
    if "nodes" in reader.data:
        for number, entry in enumerate(reader.items("nodes")):
            each = _Reader(entry, f"{reader.where}.nodes[{number}]")
            count = each.count("count", least=1) or 1
            if count > MAX_NODES:
                raise InputError(f"{each.where}.count is {count}; at most {MAX_NODES} nodes are carried")
            nodes += [_node(each)] * count
        reader.done()
        if not nodes:
            raise InputError(f"{reader.where}.nodes is empty; describe at least one node")
    else:
        nodes.append(_node(reader))
    return Machine(
        nodes=tuple(nodes),
        notes=notes,
        network_bytes_per_s=network,
        network_latency_ns=latency,
        pinned_limit_bytes=pinned,
        pageable_fraction=fraction,
    )


def _node(reader: _Reader) -> Node:
    gpus, notes = _gpus_of(reader)
    ways = reader.raw("links")
    if ways is not None and ways not in WAYS:
        raise InputError(f"{reader.where}.links must be one of {', '.join(WAYS)}; got {ways!r}")
    wires: list[tuple[int, int, int]] = []
    for number, entry in enumerate(reader.items("gpu_links")):
        wire = _Reader(entry, f"{reader.where}.gpu_links[{number}]")
        ends, rate = _numbers(wire.raw("gpus"), f"{wire.where}.gpus", len(gpus)), wire.rate("rate")
        wire.done()
        if len(ends) != 2 or rate is None:
            raise InputError(
                f'{wire.where} must have two different GPUs and a rate: {{"gpus": [0, 1], "rate": "50GB/s"}}'
            )
        if {*ends} in [{i, j} for i, j, _ in wires]:
            raise InputError(f"{wire.where} joins GPUs {ends[0]} and {ends[1]} a second time; keep one")
        wires.append((min(ends), max(ends), rate))
    switches = [
        _numbers(entry, f"{reader.where}.switches[{number}]", len(gpus))
        for number, entry in enumerate(reader.items("switches"))
    ]
    members = [gpu for switch in switches for gpu in switch]
    if twice := [gpu for gpu in members if members.count(gpu) > 1]:
        raise InputError(f"{reader.where}.switches: GPU {twice[0]} is behind two of them; keep one")
    kind = reader.raw("host")
    if kind is not None and not isinstance(kind, str):
        raise InputError(f"{reader.where}.host must be a name such as epyc-9004, and is {_kind(kind)}")
    where = None if kind is None else host(kind, what=f"{reader.where}.host")
    node = Node(
        gpus=behind(gpus, where),
        gpu_notes=tuple(notes),
        ways=ways or "host",
        wires=tuple(wires),
        switches=tuple(switches),
        ram_bytes=parse_ram(f"{reader.where}.ram", reader.size("ram")),
        disk_bytes=reader.size("disk"),
        disk_bytes_per_s=reader.rate_of("disk_speed", disk_rate),
        cpu_flops_per_s=reader.flops("cpu_flops"),
        cpu_bytes_per_s=reader.rate_of("cpu_bandwidth", memory_rate),
        host=where,
    )
    reader.done()
    return node


def _numbers(value: Any, where: str, gpus: int) -> tuple[int, ...]:
    """Return numbers of GPUs, all different."""
    good = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    if not good or len(set(value)) != len(value) or not all(0 <= i < gpus for i in value):
        have = f"0 to {gpus - 1}" if gpus else "none"
        raise InputError(f"{where} must list numbers of GPUs, each once (there are {have}); got {value!r}")
    return tuple(value)


def _gpus_of(reader: _Reader) -> tuple[list[Gpu], list[str]]:
    value = reader.raw("gpus")
    notes: list[str] = []
    if value is None or isinstance(value, str):
        nodes = parse_nodes(value or 0)
        if len(nodes) > 1:
            raise InputError(f'{reader.where}.gpus {value!r} describes {len(nodes)} nodes; list them under "nodes"')
        return list(nodes[0][0]), list(nodes[0][1])
    found: list[Gpu] = []
    for number, entry in enumerate(reader.items("gpus")):
        if isinstance(entry, str):
            found += parse_gpus(entry, entry, notes)
            continue
        each = _Reader(entry, f"{reader.where}.gpus[{number}]")
        count = each.count("count", least=1) or 1
        if count > MAX_GPUS:
            raise InputError(f"{each.where}.count is {count}; at most {MAX_GPUS} GPUs are carried")
        found += [_described_gpu(each, notes)] * count
    return found, list(dict.fromkeys(notes))


def _described_gpu(reader: _Reader, notes: list[str]) -> Gpu:
    name, memory = reader.raw("product"), reader.size("memory")
    if name is not None and not isinstance(name, str):
        raise InputError(f"{reader.where}.product {name!r} is not known; write a name of plan gpus")
    if memory == 0 or (memory is None and name is None):
        raise InputError(f"{reader.where} must have a product, or a memory of more than nothing, such as 24GB")
    usable = None
    if name is None:
        product = taken_for(memory or 0, notes)
    else:
        try:
            facts = product_of(name)
        except InputError as exc:
            raise InputError(f"{reader.where}: {exc}") from exc
        product, usable = facts.key, facts.usable_bytes
        notes += [f"GPU {facts.name}: {format_bytes(memory or usable)} usable", *facts.notes()]
    gpu = Gpu(
        capacity_bytes=memory or usable or 0,
        product=product,
        half_flops_per_s=reader.flops("flops"),
        bytes_per_s=reader.rate("bandwidth"),
        host_bytes_per_s=reader.rate("host_link"),
    )
    reader.done()
    return gpu


def _kind(data: object) -> str:
    return "null" if data is None else type(data).__name__
