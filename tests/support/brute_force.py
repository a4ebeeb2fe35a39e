"""Every placement of a small case, weighed and priced. Nothing here calls planner.cost, memory or placement."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.graph import LayerGraph, Pass, WeightGroup
from planner.plan import Placement
from small_cases import MIB, Case

# Of each device, what is the greatest of what its layers need, not their sum.
MAXIMA = ("activations", "group slots", "expert slots", "groups staged", "experts staged", "used")


@dataclass(frozen=True)
class Option:
    """One unit on one device: for every layer of it, for every group, where it waits and how many slices stay."""

    device: str
    homes: tuple[tuple[tuple[str, int], ...], ...]


def units_of(graph: LayerGraph) -> list[list[int]]:
    """Return the layers that are decided together: all before the first streamable one, each block, all after."""
    blocks = [i for i in range(len(graph.layers)) if any(g.streamable for g in graph.kind_of(i).groups)]
    front = list(range(blocks[0]))
    tail = list(range(blocks[-1] + 1, len(graph.layers)))
    return [unit for unit in (front, *([i] for i in range(blocks[0], blocks[-1] + 1)), tail) if unit]


def options_of(graph: LayerGraph, gpus: list[str]) -> list[list[Option]]:
    result = []
    for unit in units_of(graph):
        options = []
        for device in (*gpus, "cpu"):
            choices = []
            for index in unit:
                for entry in graph.kind_of(index).groups:
                    stay = [(device, entry.slices)]
                    elsewhere = ["disk"] if device == "cpu" else ["cpu", "disk"] if entry.streamable else []
                    choices.append(stay + [(home, kept) for home in elsewhere for kept in range(entry.slices)])
            for picked in itertools.product(*choices):
                rest = iter(picked)
                homes = tuple(tuple(next(rest) for _ in graph.kind_of(index).groups) for index in unit)
                options.append(Option(device, homes))
        result.append(options)
    return result


def _slab(entry: WeightGroup) -> int:
    return sum(math.ceil(tensor.nbytes // entry.slices / 256) * 256 for tensor in entry.tensors)


def _allocated(nbytes: int, device: str) -> int:
    if device in ("cpu", "disk"):
        return nbytes
    unit = 2 * MIB if nbytes >= 10 * MIB else 512
    return math.ceil(nbytes / unit) * unit


class Ledger:
    """Weighs and prices every placement of a case at once; one column of each array is one placement."""

    def __init__(self, case: Case):
        self.case = case
        self.graph, self.hardware = case.graph, case.hardware
        self.devices = [device.name for device in self.hardware.devices]
        self.places = [*self.devices, "disk"]
        self.units = units_of(self.graph)
        self.options = options_of(self.graph, [name for name in self.devices if name != "cpu"])
        self.steps = [
            ("prefill", 1, self.graph.passes[:1]),
            ("decode", case.workload.new_tokens - 1, self.graph.passes[1:]),
        ]
        self._enumerate()

    def _enumerate(self) -> None:
        sums = highest = last = None
        hops = np.zeros(1, dtype=np.int64)
        for number, options in enumerate(self.options):
            rows = [self._rows(number, option) for option in options]
            added = np.array([row[0] for row in rows], dtype=np.int64).T
            most = np.array([row[1] for row in rows], dtype=np.int64).T
            device = np.array([self.devices.index(option.device) for option in options])
            if sums is None or highest is None or last is None:
                sums, highest, last = added, most, device
                hops = np.zeros(len(options), dtype=np.int64)
                continue
            hops = (hops[:, None] + (last[:, None] != device[None, :])).ravel()
            last = np.broadcast_to(device, (len(last), len(device))).ravel()
            sums = (sums[:, :, None] + added[:, None, :]).reshape(len(sums), -1)
            highest = np.maximum(highest[:, :, None], most[:, None, :]).reshape(len(highest), -1)
        assert sums is not None
        assert highest is not None
        self._weigh(sums, highest)
        self._price(sums, hops)

    def _rows(self, number: int, option: Option) -> tuple[list[int], list[int]]:
        """Return what adds up (bytes by place, serial and copy times, homes of tied weights) and what is a maximum."""
        held = dict.fromkeys(self.places, 0)
        most = {(kind, name): 0 for kind in MAXIMA for name in self.devices}
        times = {
            (lane, step, name): 0 for lane in ("serial", "copies") for step, _, _ in self.steps for name in self.devices
        }
        tied = [0, 0]
        device = option.device
        most["used", device] = 1
        if number == 0:
            held[device] += sum(tensor.nbytes for tensor in self.graph.loose)
        for index, homes in zip(self.units[number], option.homes, strict=True):
            spans = [entry.per_layer()[index] for entry in self.graph.passes]
            held[device] += max(s.kv_after_bytes for s in spans)
            most["activations", device] = max(
                most["activations", device], max(s.held_bytes + s.peak_bytes + s.scratch_bytes for s in spans)
            )
            for step, _, passes in self.steps:
                times["serial", step, device] += self._compute(index, passes, device)
            for entry, (home, kept) in zip(self.graph.kind_of(index).groups, homes, strict=True):
                slab, waiting = _slab(entry), entry.slices - kept
                held[device] += kept * _allocated(slab, device)
                held[home] += waiting * slab
                for position, name in enumerate(("embed", "head")):
                    if self.graph.ties and self.graph.layers[index].name == name:
                        tied[position] = 1 + self.places.index(home)
                if not waiting:
                    continue
                what = "expert" if entry.slices > 1 else "group"
                if device != "cpu" or entry.slices > 1:
                    most[f"{what} slots", device] = max(most[f"{what} slots", device], 2 * _allocated(slab, device))
                if device != "cpu" and home == "disk":
                    most[f"{what}s staged", device] = 1
                for step, _, passes in self.steps:
                    spent = waiting * self._copy(entry, home, device, passes[0].tokens * self.graph.batch_size)
                    times["copies", step, device] += spent
                    if device == "cpu" or entry.slices > 1:
                        times["serial", step, device] += spent
        return [*held.values(), *times.values(), *tied], list(most.values())

    def _compute(self, index: int, passes: tuple[Pass, ...], device: str) -> int:
        facts = self.hardware.device(device)
        total = 0
        for entry in passes:
            work, tokens = entry.per_layer()[index], entry.tokens * self.graph.batch_size
            read = work.moved_bytes
            for part in self.graph.kind_of(index).groups:
                if part.slices > 1:
                    distinct = part.slices * (1.0 - (1.0 - part.used_slices / part.slices) ** tokens)
                    read += int(distinct * part.nbytes / part.slices)
            rate = facts.flops_per_s.get("bfloat16", facts.flops_per_s["default"])
            total += max(
                work.flops * 10**9 // rate, read * 10**9 // facts.bytes_per_s, work.operators * facts.operator_ns
            )
        return total // len(passes)

    def _copy(self, entry: WeightGroup, home: str, device: str, tokens: int) -> int:
        way = [(home, device)] if device == "cpu" or home == "cpu" else [("disk", "cpu"), ("cpu", device)]
        links = [link for link in self.hardware.links if (link.source, link.target) in way]
        whole = sum(link.latency_ns for link in links) + _slab(entry) * 10**9 // min(link.bytes_per_s for link in links)
        distinct = (
            entry.slices * (1.0 - (1.0 - entry.used_slices / entry.slices) ** tokens) if entry.slices > 1 else 1.0
        )
        return int(whole * distinct / entry.slices)

    def _weigh(self, sums: Any, highest: Any) -> None:
        count = len(self.devices)
        rows = (highest[i * count : (i + 1) * count] for i in range(len(MAXIMA)))
        activations, groups, experts, groups_staged, experts_staged, used = rows
        self.held = {}
        for number, name in enumerate(self.places):
            total = sums[number].copy()
            if name != "disk":
                facts = self.hardware.device(name)
                fixed = facts.context_bytes + facts.workspace_bytes + (22 * MIB if name != "cpu" else 0)
                total += activations[number] + groups[number] + experts[number] + used[number] * fixed
            if name == "cpu":
                total += (groups_staged * groups + experts_staged * experts).sum(axis=0)
            self.held[name] = total
        if self.graph.ties:
            size = math.ceil(self.graph.kinds[0].nbytes / 256) * 256
            front, tail = sums[-2], sums[-1]
            for number, name in enumerate(self.places):
                self.held[name] = self.held[name] - size * ((front == tail) & (front == 1 + number))

    def _price(self, sums: Any, hops: Any) -> None:
        self.cost = np.zeros(sums.shape[1], dtype=np.int64)
        names = set(self.devices)
        between = [link for link in self.hardware.links if link.source in names and link.target in names]
        lanes = len(self.steps) * len(self.devices)
        serial = sums[len(self.places) : len(self.places) + lanes]
        copies = sums[len(self.places) + lanes : len(self.places) + 2 * lanes]
        for number, (step, times, _) in enumerate(self.steps):
            rows = slice(number * len(self.devices), (number + 1) * len(self.devices))
            busy = np.maximum(serial[rows], copies[rows]).sum(axis=0)
            edge = self.graph.edges[0]
            nbytes = edge.prefill_bytes if step == "prefill" else edge.decode_bytes
            rate = min((link.bytes_per_s for link in between), default=10**9)
            each = max((link.latency_ns for link in between), default=0) + nbytes * 10**9 // rate
            self.cost += times * (busy + hops * each)

    def _usable(self, name: str) -> int:
        pool = self.hardware.pool(name)
        return max(0, pool.capacity_bytes - pool.reserved_bytes)

    def best(self) -> int | None:
        """Return the least cost of a placement that fits, or None where none does."""
        fits = np.ones(len(self.cost), dtype=bool)
        for name in self.places:
            fits &= self.held[name] <= self._usable(name)
        return int(self.cost[fits].min()) if fits.any() else None

    def missing(self) -> dict[str, int]:
        """Return for each place the least growth with which something fits, where growing it alone helps."""
        found = {}
        for name in self.places:
            fits = np.ones(len(self.cost), dtype=bool)
            for other in self.places:
                if other != name:
                    fits &= self.held[other] <= self._usable(other)
            if fits.any():
                found[name] = int(self.held[name][fits].min()) - self._usable(name)
        return found

    def placements(self, column: int) -> tuple[Placement, ...]:
        """Return one enumerated placement in the planner's words."""
        picked = []
        for options in reversed(self.options):
            column, choice = divmod(column, len(options))
            picked.append(options[choice])
        result = []
        for unit, option in zip(self.units, reversed(picked), strict=True):
            for index, homes in zip(unit, option.homes, strict=True):
                for entry, (home, kept) in zip(self.graph.kind_of(index).groups, homes, strict=True):
                    kind = "disk" if home == "disk" else "device" if home == option.device else "pinned"
                    result.append(
                        Placement(
                            layer=self.graph.layers[index].name, group=entry.name, home=home, memory=kind,
                            run_on=option.device, nbytes=entry.nbytes,
                            resident_slices=kept if entry.slices > 1 else None,
                        )
                    )  # fmt: skip
        return tuple(result)
