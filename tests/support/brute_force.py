"""Every placement of a small case, weighed and priced. Nothing here calls planner.cost, memory, precision or placement.

One column of each array is one placement: for every unit of layers a device, and for every group of each layer a
precision, the memory its slices wait in, and how many of them stay. Whether a GPU has one slot or two for whole groups
is tried on top (`singles`).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.graph import LayerGraph, Pass, Span, WeightGroup
from planner.plan import Placement
from small_cases import MIB, Case

# Of each device, what is the greatest of what its layers need, not their sum.
MAXIMA = ("used", "activations", "groups", "experts", "groups from disk", "experts from disk", "nearness")
# A copy takes less than this; of (FAR - time) the greatest belongs to the smallest copy.
FAR = 10**15
LOSSES_TO_ONE = 10**12
# More are not enumerated: such a case is too large.
MOST_COLUMNS = 60_000


@dataclass(frozen=True)
class Kept:
    """How one group is kept: its precision, where its slices wait ("" where all stay), and how many stay."""

    dtype: str | None
    memory: str
    home: str
    stay: int


@dataclass(frozen=True)
class Option:
    """One unit on one device: for every layer of it, how every group is kept."""

    device: str
    kept: tuple[tuple[Kept, ...], ...]


def units_of(graph: LayerGraph, *, named: bool) -> list[list[int]]:
    """Return the layers decided together: unless `named`, all before the first block, and all after the last."""
    if named:
        return [[i] for i in range(len(graph.layers))]
    blocks = [i for i in range(len(graph.layers)) if any(g.streamable for g in graph.kind_of(i).groups)]
    front, tail = list(range(blocks[0])), list(range(blocks[-1] + 1, len(graph.layers)))
    return [unit for unit in (front, *([i] for i in range(blocks[0], blocks[-1] + 1)), tail) if unit]


class Machine:
    """Names and links of a case's hardware, looked up by rules of its own."""

    def __init__(self, case: Case):
        self.hardware = case.hardware
        self.devices = [device.name for device in self.hardware.devices]
        self.is_gpu = {device.name: device.kind != "cpu" for device in self.hardware.devices}
        self.links = {(link.source, link.target): (link.bytes_per_s, link.latency_ns) for link in self.hardware.links}
        self.mapped = {(link.source, link.target): link.mapped_bytes_per_s for link in self.hardware.links}

    @staticmethod
    def beside(name: str, what: str) -> str:
        """Return the host or the disk of a device's node."""
        return name.split("/")[0] + "/" + what if "/" in name else what

    def way(self, *stops: str) -> tuple[int, int]:
        """Return (bytes/s, latency in ns) of a way over links; between nodes it leads over their hosts."""
        rates, latency = [], 0
        for pair in itertools.pairwise(stops):
            found = [pair]
            if pair not in self.links:
                found = list(
                    itertools.pairwise((pair[0], self.beside(pair[0], "cpu"), self.beside(pair[1], "cpu"), pair[1]))
                )
            for one, other in found:
                if one != other:
                    rates.append(self.links[one, other][0])
                    latency += self.links[one, other][1]
        return min(rates), latency


def _slab(entry: WeightGroup, sizes: Iterable[int]) -> int:
    return sum(math.ceil(size // entry.slices / 256) * 256 for size in sizes)


def _allocated(nbytes: int, *, is_gpu: bool) -> int:
    unit = 1 if not is_gpu else 2 * MIB if nbytes >= 10 * MIB else 512
    return math.ceil(nbytes / unit) * unit


def _sizes(entry: WeightGroup, dtype: str | None) -> list[int]:
    """Return the bytes of every tensor of a group in a precision: matrices' elements, and their scales in float32."""
    found = []
    for tensor in entry.tensors:
        shape = tensor.shape[1:] if entry.slices > 1 else tensor.shape
        elements = math.prod(shape)
        if dtype is None or tensor.buffer or len(shape) < 2 or tensor.dtype not in ("bfloat16", "float32", "float16"):
            found.append(tensor.nbytes)
        elif dtype == "int8":
            found.append(entry.slices * (elements + 4 * shape[0]))
        else:
            found.append(entry.slices * (math.ceil(elements / 2) + 4 * math.ceil(elements / 64)))
    return found


def _chances(entry: WeightGroup) -> list[float]:
    """Return of every slice the chance that one token uses it, the least popular first."""
    if not entry.buckets:
        return [entry.used_slices / entry.slices] * entry.slices
    return sorted(bucket.chance for bucket in entry.buckets for _ in range(bucket.slices))


def _used(chance: float, tokens: int) -> float:
    """Return the chance that any of so many tokens uses a slice, each apart from the others."""
    return 1.0 - (1.0 - chance) ** tokens


def _distinct(entry: WeightGroup, tokens: int) -> float:
    if not entry.buckets:
        return entry.slices * _used(entry.used_slices / entry.slices, tokens)
    # In the order of the buckets, as sums of floats depend on it.
    return sum(bucket.slices * _used(bucket.chance, tokens) for bucket in reversed(entry.buckets))


class Ledger:
    """Weighs and prices every placement of a case at once."""

    def __init__(self, case: Case, *, named: bool = False):
        self.case, self.graph, self.hardware, self.rules = case, case.graph, case.hardware, case.rules
        self.machine = Machine(case)
        self.devices = self.machine.devices
        self.gpus = [name for name in self.devices if self.machine.is_gpu[name]]
        self.places = [pool.name for pool in self.hardware.pools]
        self.hosts = [name for name in self.devices if not self.machine.is_gpu[name]]
        prompt = [entry for entry in self.graph.passes if entry.name.startswith("prefill")]
        decode = tuple(entry for entry in self.graph.passes if entry.name.startswith("decode"))
        steps = case.workload.new_tokens - 1 if decode else 0
        counted = {"ttft": (1, 0), "tpot": (0, 1) if steps else (1, 0)}.get(case.workload.objective, (1, steps))
        self.steps: list[tuple[str, int, tuple[Pass, ...]]] = [("prefill", counted[0], tuple(prompt[:1]))]
        # Of a prompt in chunks: all whole ones but the first at the mean of those traced, then what is left.
        whole = tuple(entry for entry in prompt if entry.name in ("prefill_next", "prefill_last"))
        if whole:
            times = case.workload.prompt_tokens // case.workload.prefill_chunk - 1
            self.steps.append(("prefill_next", counted[0] * times, whole))
        if prompt[-1].name == "prefill_rest":
            self.steps.append(("prefill_rest", counted[0], tuple(prompt[-1:])))
        if steps:
            self.steps.append(("decode", counted[1], decode))
        self.tied = {name: number for number, names in enumerate(self.graph.ties) for name in names}
        self.losses = self._losses()
        self.units = units_of(self.graph, named=named)
        self.options = [self._options(unit) for unit in self.units]
        self.singles = [
            frozenset(chosen)
            for size in range(len(self.gpus) + 1)
            for chosen in itertools.combinations(self.gpus, size)
        ]
        lanes = [(lane, step, name) for lane in "ACEGKSW" for step, _, _ in self.steps for name in self.devices]
        members = [("tie", name) for name in self.tied]
        self.keys = [
            *(("held", name) for name in self.places), *(("pinned", name) for name in self.hosts), *lanes, *members,
            ("loss",), ("devices",), *(("blocks", name) for name in self.devices),
        ]  # fmt: skip
        self.tops = [(what, name) for what in MAXIMA for name in self.devices]
        if self.size <= MOST_COLUMNS:
            self._enumerate()

    @property
    def size(self) -> int:
        return math.prod(len(options) for options in self.options)

    # What may be chosen

    def _losses(self) -> dict[tuple[int, str, str], float]:
        """Return {(kind, group, precision): loss} of one layer's group, from the case's own table."""
        found: dict[tuple[int, str, str], float] = {}
        for dtype in self.rules.dtypes:
            rows = [row for row in self.rules.sensitivity if row.dtype == dtype]
            shared: dict[int, list[tuple[int, str, int, int]]] = {}
            for number, kind in enumerate(self.graph.kinds):
                layers = [layer for layer in self.graph.layers if layer.kind == number]
                for entry in kind.groups:
                    names = {f"{layer.name}.{tensor.name}" for layer in layers for tensor in entry.tensors}
                    smaller = sum(_sizes(entry, dtype)) < sum(_sizes(entry, None))
                    matching = [
                        i for i, row in enumerate(rows) if re.fullmatch(row.groups, f"{kind.name}.{entry.name}")
                    ]
                    if entry.streamable and smaller and layers and matching and not names & self.tied.keys():
                        elements = sum(math.prod(tensor.shape) for tensor in entry.tensors)
                        shared.setdefault(matching[0], []).append((number, entry.name, elements, len(layers)))
            for row, members in shared.items():
                whole = sum(elements * count for _, _, elements, count in members)
                for number, name, elements, _ in members:
                    found[number, name, dtype] = rows[row].loss * elements / whole
        return found

    def _options(self, unit: list[int]) -> list[Option]:
        result = []
        pinned = {self._pin(index) for index in unit} - {None}
        for device in self.devices:
            if pinned and pinned != {device}:
                continue
            if not self.machine.is_gpu[device] and any(s.kv_host_bytes for i in unit for s in self._spans(i)):
                continue
            choices = [
                self._kept(self.graph.layers[index].kind, entry, device)
                for index in unit
                for entry in self.graph.kind_of(index).groups
            ]
            for picked in itertools.product(*choices):
                rest = iter(picked)
                kept = tuple(tuple(next(rest) for _ in self.graph.kind_of(index).groups) for index in unit)
                result.append(Option(device, kept))
        return result

    def _spans(self, index: int) -> list[Span]:
        return [entry.per_layer()[index] for entry in self.graph.passes]

    def _to_and_from_host(self, index: int, passes: tuple[Pass, ...], device: str) -> tuple[int, int]:
        """Return the mean time that a layer waits for its cache, and that its copies up take on the link."""
        host, waited, up = self.machine.beside(device, "cpu"), 0, 0
        for entry in passes:
            one = entry.per_layer()[index]
            times = []
            for nbytes, way in ((one.kv_down_bytes, (device, host)), (one.kv_up_bytes, (host, device))):
                rate, latency = self.machine.way(*way)
                times.append(2 * latency + nbytes * 10**9 // rate if nbytes else 0)
            # Only the first GPU has copies up beside its computing.
            waited += times[0] + (0 if device == self.gpus[0] else times[1])
            up += times[1]
        return waited // len(passes), up // len(passes)

    def _pin(self, index: int) -> str | None:
        found = [pin.device for pin in self.rules.pins if re.fullmatch(pin.layers, self.graph.layers[index].name)]
        return found[-1] if found else None

    def _kept(self, kind: int, entry: WeightGroup, device: str) -> list[Kept]:
        host, disk = self.machine.beside(device, "cpu"), self.machine.beside(device, "disk")
        found = []
        for dtype in (None, *self.rules.dtypes):
            if dtype is not None and (kind, entry.name, dtype) not in self.losses:
                continue
            found.append(Kept(dtype, "", device, entry.slices))
            homes = []
            if self.machine.is_gpu[device] and entry.streamable:
                homes.append(("pinned", host))
                if self.hardware.pinned_limit_bytes is not None:
                    homes.append(("pageable", host))
            as_stored = all(
                t.stored is None or (t.stored.pieces == 1 and t.stored.dtype == t.dtype) for t in entry.tensors
            )
            readable = entry.streamable if self.machine.is_gpu[device] else as_stored or entry.slices > 1
            if readable and dtype is None and not self.rules.never_on_disk:
                homes.append(("disk", disk))
            found += [Kept(dtype, memory, home, stay) for memory, home in homes for stay in range(entry.slices)]
        return found

    # What each choice takes

    def _enumerate(self) -> None:
        sums = np.zeros((len(self.keys), 1), dtype=np.int64)
        tops = np.zeros((len(self.tops), 1), dtype=np.int64)
        for number, options in enumerate(self.options):
            rows = [self._rows(number, option) for option in options]
            added = np.array([[row[0].get(key, 0) for key in self.keys] for row in rows], dtype=np.int64).T
            most = np.array([[row[1].get(key, 0) for key in self.tops] for row in rows], dtype=np.int64).T
            sums = (sums[:, :, None] + added[:, None, :]).reshape(len(sums), -1)
            tops = np.maximum(tops[:, :, None], most[:, None, :]).reshape(len(tops), -1)
        self.sums: dict[tuple[str, ...], Any] = dict(zip(self.keys, sums, strict=True))
        self.most: dict[tuple[str, ...], Any] = dict(zip(self.tops, tops, strict=True))
        self.allowed, moves = self._by_devices()
        self.cost, self.held, self.pinned = {}, {}, {}
        for single in self.singles:
            self._weigh(single)
            self.cost[single] = self._price(single, moves)
            if self.case.workload.objective == "fit":
                disks = {self.machine.beside(name, "disk") for name in self.devices}
                self.cost[single] = sum(held for name, held in self.held[single].items() if name not in disks)

    def _rows(self, number: int, option: Option) -> tuple[dict[tuple[str, ...], int], dict[tuple[str, ...], int]]:
        """Return what adds up, and what is a maximum."""
        adds: dict[tuple[str, ...], int] = {}
        most: dict[tuple[str, ...], int] = {}
        device = option.device

        def add(key: tuple[str, ...], amount: int) -> None:
            adds[key] = adds.get(key, 0) + amount

        def reach(key: tuple[str, ...], amount: int) -> None:
            most[key] = max(most.get(key, 0), amount)

        reach(("used", device), 1)
        add(("devices",), self.devices.index(device) * len(self.devices) ** number)
        if 0 in self.units[number]:
            add(("held", device), sum(tensor.nbytes for tensor in self.graph.loose))
        for index, kept in zip(self.units[number], option.kept, strict=True):
            kind = self.graph.layers[index].kind
            spans = [entry.per_layer()[index] for entry in self.graph.passes]
            add(("held", device), max(s.kv_after_bytes for s in spans))
            alike = [
                span
                for entry in self.graph.passes
                for layer, span in zip(self.graph.layers, entry.per_layer(), strict=True)
                if layer.kind == kind
            ]
            reach(("activations", device), max(s.held_bytes + s.peak_bytes + s.scratch_bytes for s in alike))
            is_block = any(entry.streamable for entry in self.graph.kind_of(index).groups)
            add(("blocks", device), int(is_block))
            for step, _, passes in self.steps:
                add(("C", step, device), self._compute(index, step, passes, device))
                add(("A", step, device), 0 if is_block else self._compute(index, step, passes, device))
                if self.machine.is_gpu[device]:
                    waited, up = self._to_and_from_host(index, passes, device)
                    add(("C", step, device), waited)
                    add(("A", step, device), 0 if is_block else waited)
                    add(("K", step, device), up)
            if self.machine.is_gpu[device] and (there := max(s.kv_host_bytes for s in spans)):
                add(("held", self.machine.beside(device, "cpu")), there)
                add(("pinned", self.machine.beside(device, "cpu")), there)
            for entry, how in zip(self.graph.kind_of(index).groups, kept, strict=True):
                for tensor in entry.tensors:
                    if (name := f"{self.graph.layers[index].name}.{tensor.name}") in self.tied:
                        add(("tie", name), self.places.index(how.home))
                if how.dtype is not None:
                    add(("loss",), round(self.losses[kind, entry.name, how.dtype] * LOSSES_TO_ONE))
                self._group(entry, how, device, add, reach)
        return adds, most

    def _group(self, entry: WeightGroup, how: Kept, device: str, add: Any, reach: Any) -> None:
        is_gpu, away = self.machine.is_gpu[device], entry.slices - how.stay
        slab = _slab(entry, _sizes(entry, how.dtype))
        add(("held", device), how.stay * _allocated(slab, is_gpu=is_gpu))
        if not away:
            return
        waiting = slab
        if how.memory == "disk" and any(tensor.stored is not None for tensor in entry.tensors):
            waiting = sum(t.nbytes if t.stored is None else t.stored.nbytes for t in entry.tensors) // entry.slices
        add(("held", how.home), away * waiting)
        if how.memory == "pinned":
            add(("pinned", how.home), away * waiting)
        what = "experts" if entry.slices > 1 else "groups"
        until = self.cpu_up_to(entry, how, device)
        longest = max(entry.tokens for entry in self.graph.passes) * self.graph.batch_size
        if not self._is_mapped(entry, how, device) and (how.memory == "disk" or longest > until):
            reach((what, device), _allocated(slab, is_gpu=is_gpu))
        if is_gpu and how.memory == "disk":
            reach((f"{what} from disk", device), 1)
        by_rows = entry.by_rows and not is_gpu
        if entry.slices == 1 and not by_rows:
            least = self._copy(entry, how, device, 1)[0]
            if is_gpu:
                rate, latency = self.machine.way(self.machine.beside(device, "cpu"), device)
                least = latency + slab * 10**9 // rate
            reach(("nearness", device), FAR - least)
        for step, _, passes in self.steps:
            tokens = passes[0].tokens * self.graph.batch_size
            if how.memory != "disk" and tokens <= until:
                alone, beside = (sum(self._on_cpu(entry, how, device, tokens, b)[:away]) for b in (False, True))
                add(("C", step, device), alone)
                add(("W", step, device), beside - alone)
            else:
                lane = "C" if by_rows else "G" if entry.slices == 1 else "E"
                add((lane, step, device), sum(self._copy(entry, how, device, tokens)[:away]))
                if is_gpu and lane == "G":
                    alone, beside = self._reads(device)
                    rate = self.machine.way(self.machine.beside(device, "cpu"), device)[0]
                    # While it is copied the CPU goes without what it would have read.
                    add(("S", step, device), slab * 10**9 * (alone - beside) // (rate * beside))

    def cpu_up_to(self, entry: WeightGroup, how: Kept, device: str) -> int:
        """Return up to how many tokens the CPU computes experts that wait: where that makes all slices cost least."""
        if how.memory not in ("pinned", "pageable") or entry.slices == 1 or not self.rules.cpu_experts:
            return 0
        tokens = [passes[0].tokens * self.graph.batch_size for _, _, passes in self.steps]
        totals = {}
        for until in sorted({0, *tokens}):
            totals[until] = sum(
                times * sum((self._on_cpu if now <= until else self._copy)(entry, how, device, now))
                for (_, times, _), now in zip(self.steps, tokens, strict=True)
            )
        return min(totals, key=lambda until: (totals[until], until))

    # Times

    def _compute(self, index: int, step: str, passes: tuple[Pass, ...], device: str) -> int:
        facts = self.hardware.device(device)
        for given in self.graph.measured:
            if (given.layer, given.device) == (index, device):
                return given.prefill_ns if step.startswith("prefill") else given.decode_ns
        total = 0
        for entry in passes:
            work, tokens = entry.per_layer()[index], entry.tokens * self.graph.batch_size
            read = work.moved_bytes
            for part in self.graph.kind_of(index).groups:
                if part.slices > 1:
                    read += int(_distinct(part, tokens) * part.nbytes / part.slices)
            rate = facts.flops_per_s.get("bfloat16", facts.flops_per_s["default"])
            total += max(
                work.flops * 10**9 // rate, read * 10**9 // facts.bytes_per_s, work.operators * facts.operator_ns
            )
        return total // len(passes)

    def _copy(self, entry: WeightGroup, how: Kept, device: str, tokens: int) -> list[int]:
        """Return the expected time of every slice's copy, the least popular first."""
        stops = [how.home, device]
        if how.memory == "disk" and self.machine.is_gpu[device]:
            stops.insert(1, self.machine.beside(device, "cpu"))
        rate, latency = self.machine.way(*stops)
        if how.memory == "pageable":
            rate = int(rate * self.hardware.pageable_fraction)
        if self._is_mapped(entry, how, device):
            # At a rate of its own where that was measured.
            rate = self.machine.mapped[how.home, device] or rate
        nbytes = _slab(entry, _sizes(entry, how.dtype))
        if how.memory == "disk" and any(tensor.stored is not None for tensor in entry.tensors):
            nbytes = sum(t.nbytes if t.stored is None else t.stored.nbytes for t in entry.tensors) // entry.slices
        if entry.by_rows and not self.machine.is_gpu[device]:
            # Linux reads 128 KiB around a page that is not there; tokens are as likely to want any of these.
            whole = max(1, nbytes // 131072)
            touch = latency + min(nbytes, 131072) * 10**9 // self.machine.way(*stops)[0]
            return [int(whole * (1.0 - (1.0 - 1.0 / whole) ** tokens) * touch)]
        if entry.slices == 1:
            return [latency + nbytes * 10**9 // rate]
        return [int((latency + nbytes * 10**9 // rate) * _used(chance, tokens)) for chance in _chances(entry)]

    def _is_mapped(self, entry: WeightGroup, how: Kept, device: str) -> bool:
        """Tell whether the CPU computes straight from the files: with experts only if these are known to lie there."""
        known = all(t.stored and t.stored.pieces == 1 and t.stored.dtype == t.dtype for t in entry.tensors)
        return how.memory == "disk" and not self.machine.is_gpu[device] and (entry.slices == 1 or known)

    def _reads(self, device: str) -> tuple[int, int]:
        """Return what the CPU reads of its memory alone, and its part of what that gives to it and a copy together: 1.2
        times what it reaches alone, or what the fastest link from there or to there reaches.
        """
        name = self.machine.beside(device, "cpu")
        host = self.hardware.device(name)
        both = host.bytes_per_s + self.machine.way(name, device)[0]
        fastest = max(rate for ends, (rate, _) in self.machine.links.items() if name in ends)
        return host.bytes_per_s, host.bytes_per_s * min(max(int(host.bytes_per_s * 1.2), fastest), both) // both

    def _on_cpu(self, entry: WeightGroup, how: Kept, device: str, tokens: int, beside: bool = False) -> list[int]:
        """Return the expected time of every slice there, the least popular first: its weights read or multiplied, and
        two latencies.
        """
        host = self.hardware.device(how.home)
        elements = sum(math.prod(tensor.shape) for tensor in entry.tensors) // entry.slices
        size = _slab(entry, _sizes(entry, how.dtype))
        rate = host.flops_per_s.get("bfloat16", host.flops_per_s["default"])
        read_rate = self._reads(device)[beside]
        there_and_back = self.machine.way(how.home, device)[1] + self.machine.way(device, how.home)[1]
        found = []
        for chance in _chances(entry):
            read = _used(chance, tokens) * size * 1e9 / read_rate
            multiplied = 2.0 * (tokens * chance) * elements * 1e9 / rate
            found.append(int(max(read, multiplied) + _used(chance, tokens) * there_and_back))
        return found

    # All placements

    def _by_devices(self) -> tuple[Any, dict[str, Any]]:
        """Return, for every column, whether its devices may be, and what moves between them takes in each step."""
        count, units = len(self.devices), len(self.units)
        may = np.zeros(count**units, dtype=bool)
        moves = {step: np.zeros(count**units, dtype=np.int64) for step, _, _ in self.steps}
        here, column = np.unique(self.sums["devices",], return_inverse=True)
        unit_of = {index: number for number, unit in enumerate(self.units) for index in unit}
        for code in here:
            at = [self.devices[code // count ** unit_of[i] % count] for i in range(len(self.graph.layers))]
            may[code] = self._may_be(at)
            for step in moves:
                moves[step][code] = self._moved(at, step)
        return may[here][column], {step: values[here][column] for step, values in moves.items()}

    def _may_be(self, at: Sequence[str]) -> bool:
        if any(not edge.may_cut and at[edge.source] != at[edge.target] for edge in self.graph.edges):
            return False
        if self.rules.never_across_nodes and len({self.machine.beside(name, "cpu") for name in at}) > 1:
            return False
        changes = sum(one != other for one, other in itertools.pairwise(at))
        return not self.rules.contiguous or changes == len(set(at)) - 1

    def _moved(self, at: Sequence[str], step: str) -> int:
        """Return the time of what moves: each tensor once to each device, its latency where something waits for it."""
        awaited: dict[int, tuple[int, int, str]] = {}
        for edge in self.graph.edges:
            entry = (edge.source, edge.prefill_bytes + edge.decode_bytes, edge.tensor)
            awaited[edge.target] = max(awaited.get(edge.target, (-1, 0, "")), entry)
        total = 0
        for source, tensor in {(edge.source, edge.tensor) for edge in self.graph.edges}:
            edges = [edge for edge in self.graph.edges if (edge.source, edge.tensor) == (source, tensor)]
            for device in {at[edge.target] for edge in edges} - {at[source]}:
                taken = [edge for edge in edges if at[edge.target] == device]
                nbytes = max(edge.prefill_bytes if step.startswith("prefill") else edge.decode_bytes for edge in taken)
                rate, latency = self.machine.way(at[source], device)
                waits = any(awaited[edge.target][0::2] == (source, tensor) for edge in taken)
                total += -(-nbytes * 10**9 // rate) + (latency if waits else 0)
        return total

    def _weigh(self, single: frozenset[str]) -> None:
        held = {name: self.sums["held", name].copy() for name in self.places}
        pinned = {name: self.sums["pinned", name].copy() for name in self.hosts}
        for name in self.devices:
            facts, is_gpu = self.hardware.device(name), self.machine.is_gpu[name]
            fixed = facts.context_bytes + facts.workspace_bytes
            fixed += max(self.graph.allocator_bytes, 22 * MIB) if is_gpu else 0
            held[name] += self.most["activations", name] + self.most["used", name] * fixed
            for what, times in (("groups", 1 if name in single else 2), ("experts", 2)):
                slots = times * self.most[what, name]
                held[name] += slots
                host = self.machine.beside(name, "cpu")
                held[host] += slots * self.most[f"{what} from disk", name]
                pinned[host] += slots * self.most[f"{what} from disk", name]
        for names in self.graph.ties:
            sizes = {name: self._tied_sizes(name) for name in names}
            for number, place in enumerate(self.places):
                is_disk = place.endswith("disk")
                there = sum((self.sums["tie", name] == number).astype(np.int64) for name in names)
                held[place] -= sizes[names[0]][is_disk] * np.maximum(there - 1, 0)
        self.held[single], self.pinned[single] = held, pinned

    def _tied_sizes(self, name: str) -> tuple[int, int]:
        for layer in self.graph.layers:
            for entry in self.graph.kinds[layer.kind].groups:
                for tensor in entry.tensors:
                    if f"{layer.name}.{tensor.name}" == name:
                        size = math.ceil(tensor.nbytes / 256) * 256
                        return size, size if tensor.stored is None else tensor.stored.nbytes
        raise KeyError(name)

    def _price(self, single: frozenset[str], moves: dict[str, Any]) -> Any:
        total = np.zeros(self.size, dtype=np.int64)
        for step, times, _ in self.steps:
            taken, floor = moves[step].copy(), np.zeros(self.size, dtype=np.int64)
            for name in self.devices:
                computing, demand, groups = (self.sums[lane, step, name] for lane in "CEG")
                nearness = self.most["nearness", name]
                least = np.where(nearness > 0, FAR - nearness, 0)
                # A CPU reads files ahead in each pass anew: none was begun before, and the first is waited for.
                begun = (1 if name in single else 2) if self.machine.is_gpu[name] and step != "prefill" else 0
                slower = np.minimum(self.sums["S", step, name], self.sums["W", step, name])
                exposed = np.maximum(groups + slower - begun * least, 0)
                apart = (demand > 0) & (groups > 0) if name not in single else np.ones(self.size, dtype=bool)
                serial = computing + demand + slower
                first = serial + (0 if self.machine.is_gpu[name] else least)
                # Beside the copies run the layers without anything to copy, and the mean of the others.
                ends = self.sums["A", step, name]
                beside = ends + np.ceil((serial - ends) / np.maximum(self.sums["blocks", name], 1)).astype(np.int64)
                cache = self.sums["K", step, name]
                together = np.where(exposed > 0, np.maximum(first, exposed + cache + beside), serial)
                taken += np.where(apart, serial + exposed, together)
                alone = groups + slower + demand + cache + (np.where(groups > 0, computing, 0) if name in single else 0)
                floor = np.maximum(floor, alone)
            total += times * np.maximum(taken, floor)
        return total

    # Answers

    def _usable(self, name: str) -> int:
        pool = self.hardware.pool(name)
        return max(0, pool.capacity_bytes - pool.reserved_bytes)

    def fits(self, single: frozenset[str], *, but: str | None = None) -> Any:
        """Tell of every placement whether it is allowed and fits, one memory (`but`) left out of account."""
        found = self.allowed & (self.sums["loss",] <= self.rules.quality_budget * LOSSES_TO_ONE)
        for name in self.places:
            if name != but:
                found &= self.held[single][name] <= self._usable(name)
        limit = self.hardware.pinned_limit_bytes
        for name in self.hosts if limit is not None else ():
            found &= self.pinned[single][name] <= limit
        return found

    def best(self) -> int | None:
        """Return the least cost of a placement that fits, or None where none does."""
        found = []
        for single in self.singles:
            fits = self.fits(single)
            if fits.any():
                found.append(int(self.cost[single][fits].min()))
        return min(found, default=None)

    def missing(self) -> dict[str, int]:
        """Return for each place the least growth with which something fits, where growing it alone helps."""
        found: dict[str, int] = {}
        for name in self.places:
            for single in self.singles:
                fits = self.fits(single, but=name)
                if fits.any():
                    lacking = int(self.held[single][name][fits].min()) - self._usable(name)
                    found[name] = min(found.get(name, lacking), lacking)
        return found

    def placements(self, column: int) -> tuple[Placement, ...]:
        """Return one enumerated placement in the planner's words."""
        picked = []
        for options in reversed(self.options):
            column, choice = divmod(column, len(options))
            picked.append(options[choice])
        result = []
        for unit, option in zip(self.units, reversed(picked), strict=True):
            for index, kept in zip(unit, option.kept, strict=True):
                for entry, how in zip(self.graph.kind_of(index).groups, kept, strict=True):
                    own = "device" if self.machine.is_gpu[option.device] else "pageable"
                    result.append(
                        Placement(
                            layer=self.graph.layers[index].name, group=entry.name, home=how.home,
                            memory=how.memory or own, run_on=option.device,  # type: ignore[arg-type]
                            nbytes=sum(_sizes(entry, how.dtype)),
                            resident_slices=how.stay if entry.slices > 1 else None,
                            cpu_up_to_tokens=self.cpu_up_to(entry, how, option.device),
                            dtype=how.dtype,  # type: ignore[arg-type]
                        )
                    )  # fmt: skip
        return tuple(result)
