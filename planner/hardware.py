"""The machine a plan is made for: devices, the memory they draw on, and the links between them.

Values alone; `planner.machines` makes them from options and files.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from planner.errors import InputError
from planner.serial import OMITTED, canonical, write_text
from planner.units import GB, MB, TB, format_bytes, parse_bytes

# Achieved host-to-device rate of large pinned copies over 16 lanes, by PCIe generation (published measurements:
# 12.4, 22.5 to 24, and 51 to 55 GB/s).
PCIE_BYTES_PER_S = {3: 12_400 * MB, 4: 22_500 * MB, 5: 51_000 * MB}
# Achieved / datasheet over NVLink, one way: 376 of 450 GB/s between two H100s, the least of those published (48 of 50
# between two V100s), by p2pBandwidthLatencyTest.
NVLINK_FRACTION = 0.83
# From pageable memory, of the rate from pinned: 13 to 18 GB/s against 22.5 to 24 over PCIe 4 (published measurements).
PAGEABLE_FRACTION = 0.65
COPY_LATENCY_NS = 10_000
# Host time of one eager PyTorch operator with the Python around it: what bounds small layers on any device. An
# assumption until calibrated.
OPERATOR_NS = 8_000
# CUDA context with lazy module loading (the default since CUDA 12.2): about 0.3 GB.
CUDA_CONTEXT_BYTES = 300 * MB
# cuBLAS workspace, taken through the caching allocator at the first matmul: compute capability 9, 10 and 12
# against all others (aten/src/ATen/cuda/CUDABlas.cpp).
CUBLAS_WORKSPACE_BYTES = {"large": 32 * 2**20, "small": 8_519_680}

DEFAULT_RAM_BYTES = 128 * GB
DEFAULT_DISK_BYTES = 1 * TB
# What a host's memory gives to its CPU and to copies together, against what its CPU alone reaches: an assumption, 90 %
# of the wire rate against the 75 % that cores reach (`products.json`). `plan calibrate` measures it.
MEMORY_TOGETHER = 1.2
# A desktop with two channels of DDR5: 60 GB/s read by all cores, 1 TFLOP/s of matmul.
CPU_PRODUCT = "desktop with two channels of DDR5"
CPU_BYTES_PER_S = 60 * GB
CPU_FLOPS_PER_S = 1_000_000_000_000
DISK_BYTES_PER_S = 3 * GB
DISK_LATENCY_NS = 100_000
# 100 Gbit/s Ethernet at 90 %, and TCP inside one room: assumptions.
NETWORK_BYTES_PER_S = 11_250 * MB
NETWORK_LATENCY_NS = 30_000
# Left to the operating system, the interpreter and the libraries.
HOST_RESERVED_BYTES = 4 * GB
MAX_GPUS = 64
MAX_NODES = 64
# Names that a message lists before it says how many more there are.
_NAMES_LISTED = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulRate:
    """What products of so many rows in one torch dtype reach, measured; weights are read from memory, not from a cache.

    kind: with weights as torch.nn.Linear keeps them, or as transformers' Conv1D does, transposed; "slice" is a Linear
        of each prompt's last token alone, taken from all of them, for which torch may rearrange the weights each time;
        "attention", whose rate counts every pair of a row and a token of the context.
    width, inputs: outputs and inputs of the product; None: of any.
    """

    dtype: str
    rows: int
    flops_per_s: int
    kind: Literal["linear", "conv1d", "slice", "attention"] = field(default="linear", metadata=OMITTED)
    width: int | None = field(default=None, metadata=OMITTED)
    inputs: int | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Somewhere a layer can run. Rates are achieved ones, not datasheet peaks.

    flops_per_s: matmul rate by torch dtype name; "default" serves the dtypes that are not named.
    operator_ns: host time per operator; a layer takes at least its operators times this.
    context_bytes, workspace_bytes: taken by the driver and the matmul library before any tensor.
    matmuls: measured rates by rows, where the device was calibrated; used instead of `flops_per_s`.
    activation_bytes_per_s: measured of operators on activations, what they read and write together; 0: not measured.
    spread: of its rates: 9 of 10 measurements took at most so much more or less time, as a fraction.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    product: str
    pool: str
    flops_per_s: dict[str, int]
    bytes_per_s: int
    operator_ns: int
    context_bytes: int
    workspace_bytes: int
    matmuls: tuple[MatmulRate, ...] = field(default=(), metadata=OMITTED)
    activation_bytes_per_s: int = field(default=0, metadata=OMITTED)
    spread: float = field(default=0.0, metadata=OMITTED)

    def flops_for(self, dtype: str) -> int:
        """Return the achieved matmul rate for a torch dtype name such as "bfloat16", in FLOP/s."""
        return self.flops_per_s.get(dtype, self.flops_per_s["default"])

    def times(self, factor: float) -> Device:
        """Return this device with `factor` times all its rates, and times so much shorter."""

        if factor == 1:
            return self

        def scaled(rate: int) -> int:
            return max(1, int(rate * factor))

        return replace(
            self,
            flops_per_s={key: scaled(rate) for key, rate in self.flops_per_s.items()},
            bytes_per_s=scaled(self.bytes_per_s),
            operator_ns=int(self.operator_ns / factor),
            matmuls=tuple(replace(each, flops_per_s=scaled(each.flops_per_s)) for each in self.matmuls),
            activation_bytes_per_s=int(self.activation_bytes_per_s * factor),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPool:
    """Memory that devices draw on. `reserved_bytes` of `capacity_bytes` belong to others and are never planned."""

    name: str
    capacity_bytes: int
    reserved_bytes: int

    @property
    def usable_bytes(self) -> int:
        return max(0, self.capacity_bytes - self.reserved_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A one-way path between two places: achieved rate of large copies, and latency of one copy.

    lane: links of the same lane share one resource, and copy one after the other; None: a resource of its own.
    spread: as of a device.
    mapped_bytes_per_s: from a disk, what is reached beside computing straight from a mapped file; 0: as `bytes_per_s`.
    cached_bytes_per_s, cached_mapped_bytes_per_s: both where the page cache holds the files; 0: not measured.
    """

    source: str
    target: str
    bytes_per_s: int
    latency_ns: int
    lane: str | None = None
    spread: float = field(default=0.0, metadata=OMITTED)
    mapped_bytes_per_s: int = field(default=0, metadata=OMITTED)
    cached_bytes_per_s: int = field(default=0, metadata=OMITTED)
    cached_mapped_bytes_per_s: int = field(default=0, metadata=OMITTED)

    def times(self, factor: float) -> Link:
        """Return this link with `factor` times all its rates."""
        return replace(
            self,
            bytes_per_s=max(1, int(self.bytes_per_s * factor)),
            mapped_bytes_per_s=int(self.mapped_bytes_per_s * factor),
            cached_bytes_per_s=int(self.cached_bytes_per_s * factor),
            cached_mapped_bytes_per_s=int(self.cached_mapped_bytes_per_s * factor),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What several take from at once: `bytes_per_s` together at most; where they ask for more, each is slowed alike.

    users: devices, whose computing reads and writes there, and links, "cpu→cuda:0".
    """

    name: str
    bytes_per_s: int
    users: tuple[str, ...]


# No slots: what is looked up by name is indexed once, beside the fields.
@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Devices in order (GPUs first, then "cpu"), their pools ("disk" is a pool without a device), and links.

    With several nodes all names begin with their node, node after node: "node0/cuda:0", "node0/cpu", "node0/disk".
    Links then join the hosts of any two nodes; `link` finds the way between other devices of different nodes.

    pinned_limit_bytes: how much of a host's memory may be pinned for GPUs to copy from; None where only its size
        limits that.
    pageable_fraction: of a link's rate, what copies between pageable host memory and a GPU reach.
    shared: roots that links have in common, and memories ("cpu memory"); one that is not named is `memory_of` its host.
    """

    devices: tuple[Device, ...]
    pools: tuple[MemoryPool, ...]
    links: tuple[Link, ...]
    assumptions: tuple[str, ...] = ()
    pinned_limit_bytes: int | None = None
    pageable_fraction: float = PAGEABLE_FRACTION
    shared: tuple[Shared, ...] = field(default=(), metadata=OMITTED)

    def device(self, name: str) -> Device:
        return self._devices[name]

    def pool(self, name: str) -> MemoryPool:
        return self._pools[name]

    def link(self, source: str, target: str) -> Link:
        """Return the way from `source` to `target`: a link, or between devices of different nodes the links over
        their hosts as one, as fast as the slowest, with all their latencies, on the network's lane.

        Raises:
            KeyError: the two are not joined.
        """
        found = self._links.get((source, target))
        if found is None:
            found = self._links[source, target] = self._over_hosts(source, target)
        return found

    def way(self, source: str, target: str) -> tuple[Link, ...]:
        """Return the links that a copy goes over: one, or between devices of different nodes those over their hosts.

        Raises:
            KeyError: the two are not joined.
        """
        found = self._own_links.get((source, target))
        if found is not None:
            return (found,)
        stops = (source, self.host(source), self.host(target), target)
        ways = [pair for pair in itertools.pairwise(stops) if pair[0] != pair[1]]
        joined = self.node(source) != self.node(target) and {source, target} <= self._devices.keys()
        if not joined or any(pair not in self._own_links for pair in ways):
            raise KeyError(f"no link from {source} to {target}")
        return tuple(self._own_links[pair] for pair in ways)

    def memory_of(self, host: str) -> Shared:
        """Return what a host's CPU shares with all links that begin or end there."""
        name, links = f"{host} memory", [link for link in self.links if host in (link.source, link.target)]
        # What one link reaches, memory gives.
        least = max((link.bytes_per_s for link in links), default=0)
        return next((entry for entry in self.shared if entry.name == name), None) or Shared(
            name=name,
            bytes_per_s=max(int(self.device(host).bytes_per_s * MEMORY_TOGETHER), least),
            users=(host, *(f"{link.source}→{link.target}" for link in links)),
        )

    def cpu_bytes_per_s(self, name: str) -> int:
        """Return what the CPU of a device's host reads from memory while weights are copied from it to the device."""
        host = self.device(self.host(name))
        asked = host.bytes_per_s + self.link(host.name, name).bytes_per_s
        return host.bytes_per_s * min(self._together[host.name], asked) // asked

    @functools.cached_property
    def _together(self) -> dict[str, int]:
        return {host.name: self.memory_of(host.name).bytes_per_s for host in self.hosts}

    def host(self, name: str) -> str:
        """Return the CPU of the node that a device or memory is in: "cpu", or "node0/cpu"."""
        return f"{_prefix(name)}cpu"

    def disk(self, name: str) -> str:
        """Return the disk of the node that a device or memory is in: "disk", or "node0/disk"."""
        return f"{_prefix(name)}disk"

    def node(self, name: str) -> str:
        """Return the node that a device or memory is in; "" where there is only one."""
        return _prefix(name).removesuffix("/")

    @functools.cached_property
    def nodes(self) -> tuple[str, ...]:
        """The nodes in order; one "" where there is only one."""
        return tuple(dict.fromkeys(self.node(device.name) for device in self.devices))

    @functools.cached_property
    def hosts(self) -> tuple[Device, ...]:
        """The CPU of every node."""
        return tuple(device for device in self.devices if device.kind == "cpu")

    @functools.cached_property
    def gpus(self) -> tuple[Device, ...]:
        return tuple(device for device in self.devices if device.kind != "cpu")

    @functools.cached_property
    def _devices(self) -> dict[str, Device]:
        return {device.name: device for device in self.devices}

    @functools.cached_property
    def _pools(self) -> dict[str, MemoryPool]:
        return {pool.name: pool for pool in self.pools}

    @functools.cached_property
    def _own_links(self) -> dict[tuple[str, str], Link]:
        return {(link.source, link.target): link for link in self.links}

    @functools.cached_property
    def _links(self) -> dict[tuple[str, str], Link]:
        return dict(self._own_links)

    def _over_hosts(self, source: str, target: str) -> Link:
        links = self.way(source, target)
        return Link(
            source=source,
            target=target,
            bytes_per_s=min(link.bytes_per_s for link in links),
            latency_ns=sum(link.latency_ns for link in links),
            lane=self._links[self.host(source), self.host(target)].lane,
        )

    @classmethod
    def from_options(
        cls,
        gpus: str | int | None = None,
        *,
        ram: str | int | None = None,
        disk: str | int | None = None,
        max_memory: Mapping[str, str | int] | None = None,
        **more: Any,
    ) -> Hardware:
        """Return the machine that the options describe: `gpus` as "2x24GB", "2xrtx4090,1xl4", 0, or nodes with slashes
        between them. `more` are the other options of `planner.machines.from_options`.

        Nothing is read from the machine at hand: what is not said is a stated assumption, in `assumptions`.

        Raises:
            InputError: an option cannot be read, names no known product, or is zero where it must not be.
        """
        # What makes Hardware imports this module.
        from planner.machines import from_options

        return from_options(gpus, ram=ram, disk=disk, **more).with_max_memory(max_memory or {})

    @classmethod
    def load(cls, path: str | Path) -> Hardware:
        """Read a machine from a JSON file, written by hand or by `save` (docs/hardware.md).

        Raises:
            InputError: the file cannot be read, or what it says cannot be; the message says where.
        """
        from planner.machine_file import load

        return load(path)

    @classmethod
    def local(cls) -> Hardware:
        """Return the machine at hand: its GPUs, what is free of its memories now, and what is assumed of its rates."""
        from planner.local import machine

        return machine().hardware()

    def save(self, path: str | Path) -> None:
        """Write all of this machine as JSON, as plans hold it.

        Raises:
            InputError: the path cannot be written.
        """
        write_text(path, canonical(self))

    def with_max_memory(self, max_memory: Mapping[str, str | int]) -> Hardware:
        """Return this machine with pools capped: {"cuda:0": "20GiB", "cpu": "64GB", "pinned": "16GB"}; a cap never
        raises a capacity. With several nodes "cpu" caps every host, and "node0/cpu" one.

        Raises:
            InputError: a name that this machine does not have, or a size that cannot be read.
        """
        caps = {_device_name(key): parse_bytes(value, what=f"max_memory of {key}") for key, value in max_memory.items()}
        names = {name for pool in self.pools for name in (pool.name, own_name(pool.name))} | {"pinned"}
        for name in caps:
            if name not in names:
                there = listed([*(pool.name for pool in self.pools), "pinned"])
                raise InputError(f"max_memory names {name!r}, which is not planned for; there are {there}")
        pools = []
        for pool in self.pools:
            limits = [caps[name] for name in {pool.name, own_name(pool.name)} if name in caps]
            if limits:
                pool = replace(pool, capacity_bytes=min(pool.capacity_bytes, *limits), reserved_bytes=0)
            pools.append(pool)
        notes = tuple(f"{name} limited to {format_bytes(size)} by max_memory" for name, size in sorted(caps.items()))
        pinned = [limit for limit in (self.pinned_limit_bytes, caps.get("pinned")) if limit is not None]
        return replace(
            self,
            pools=tuple(pools),
            assumptions=self.assumptions + notes,
            pinned_limit_bytes=min(pinned, default=None),
        )

    def with_page_cache(self) -> Hardware:
        """Return this machine with the page cache holding all files: its disks as fast as was measured then.

        Raises:
            InputError: that was not measured (`plan calibrate` does).
        """
        disks = {self.disk(host.name) for host in self.hosts}
        if not any(link.cached_bytes_per_s for link in self.links if link.source in disks):
            raise InputError(
                "what reads from the page cache reach is not known of this machine; measure it with plan calibrate "
                "--out FILE, and give --hardware FILE"
            )
        return replace(
            self,
            links=tuple(
                replace(
                    link,
                    bytes_per_s=link.cached_bytes_per_s,
                    mapped_bytes_per_s=link.cached_mapped_bytes_per_s,
                    latency_ns=0,
                )
                if link.source in disks and link.cached_bytes_per_s
                else link
                for link in self.links
            ),
            assumptions=(*self.assumptions, "the page cache holds every file that is read"),
        )

    @property
    def is_spread(self) -> bool:
        """Whether any rate was measured with a spread, so that predictions have a range."""
        return any(device.spread for device in self.devices) or any(link.spread for link in self.links)

    def slower(self) -> Hardware:
        """Return this machine with every rate lower, and every time longer, by its spread."""
        return self._spread(-1)

    def faster(self) -> Hardware:
        """Return this machine with every rate higher, and every time shorter, by its spread."""
        return self._spread(1)

    def _spread(self, sign: int) -> Hardware:
        """Return it with rates times 1 + spread, or divided by it; what is shared by the largest of its users'."""
        spreads = {device.name: device.spread for device in self.devices}
        spreads |= {f"{link.source}→{link.target}": link.spread for link in self.links}

        def factor(*names: str) -> float:
            return float((1 + max((spreads[name] for name in names), default=0.0)) ** sign)

        return replace(
            self,
            devices=tuple(device.times(factor(device.name)) for device in self.devices),
            links=tuple(
                replace(link.times(by), latency_ns=int(link.latency_ns / by))
                for link in self.links
                for by in [factor(f"{link.source}→{link.target}")]
            ),
            shared=tuple(
                replace(entry, bytes_per_s=max(1, int(entry.bytes_per_s * factor(*entry.users))))
                for entry in self.shared
            ),
        )

    def check(self) -> None:
        """Check that names are unique, that everything named is there, and that what plans need is.

        Raises:
            InputError: the first fault found.
        """
        # It imports this module.
        from planner.soundness import check

        check(self)


def listed(names: Iterable[str]) -> str:
    """Return names as text, so many that a message stays one: "cuda:0, cuda:1, cpu, ... (70 in all)"."""
    known = list(names)
    if len(known) <= _NAMES_LISTED:
        return ", ".join(known)
    return f"{', '.join(known[:_NAMES_LISTED])}, ... ({len(known)} in all)"


def _prefix(name: str) -> str:
    """Return "node0/" for "node0/cuda:1", and nothing for a name without a node."""
    node, slash, _ = name.rpartition("/")
    return node + slash


def own_name(name: str) -> str:
    """Return a name without its node: "cuda:1" for "node0/cuda:1"."""
    return name.rpartition("/")[2]


def _device_name(key: str | int) -> str:
    text = str(key)
    return f"cuda:{text}" if text.isdigit() else text


@functools.cache
def products() -> dict[str, Any]:
    """Return the bundled product facts (`products.json`)."""
    text = importlib.resources.files("planner").joinpath("products.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data
