"""Machines as people describe them → Hardware. What is not said is assumed, and listed.

Nothing is read from the machine at hand. Names and rates are settled here, for options and for files.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from planner.errors import InputError
from planner.gpus import Gpu, parse_nodes
from planner.hardware import (
    COPY_LATENCY_NS,
    CPU_BYTES_PER_S,
    CPU_FLOPS_PER_S,
    CPU_PRODUCT,
    CUBLAS_WORKSPACE_BYTES,
    CUDA_CONTEXT_BYTES,
    DEFAULT_DISK_BYTES,
    DEFAULT_RAM_BYTES,
    DISK_BYTES_PER_S,
    DISK_LATENCY_NS,
    HOST_RESERVED_BYTES,
    MAX_GPUS,
    MAX_NODES,
    NETWORK_BYTES_PER_S,
    NETWORK_LATENCY_NS,
    NVLINK_FRACTION,
    OPERATOR_NS,
    PAGEABLE_FRACTION,
    Device,
    Hardware,
    Link,
    MemoryPool,
)
from planner.hosts import Host, behind, disk_rate, memory_rate
from planner.hosts import host as host_of
from planner.products import catalogue
from planner.units import GB, format_bytes, format_ns, parse_bytes, parse_flops, parse_rate

Ways = Literal["host", "p2p", "nvlink"]
WAYS: tuple[Ways, ...] = ("host", "p2p", "nvlink")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine, GPUs by number; what is None is assumed.

    ways: how GPUs reach each other: through host memory, by peer-to-peer copies over PCIe, or over NVLink.
    wires: (GPU, GPU, bytes per second) of pairs that are joined otherwise, both ways.
    switches: GPUs that share one way to the host.
    gpu_notes: what was assumed of its GPUs.
    host: the kind of host, for what is not said of it.
    """

    gpus: tuple[Gpu, ...] = ()
    gpu_notes: tuple[str, ...] = ()
    ways: Ways = "host"
    wires: tuple[tuple[int, int, int], ...] = ()
    switches: tuple[tuple[int, ...], ...] = ()
    ram_bytes: int | None = None
    disk_bytes: int | None = None
    disk_bytes_per_s: int | None = None
    cpu_flops_per_s: int | None = None
    cpu_bytes_per_s: int | None = None
    host: Host | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One node or several on a network; what is None is assumed.

    network_bytes_per_s: what copies reach out of a node, to all others together.
    pinned_limit_bytes: of each node's memory.
    """

    nodes: tuple[Node, ...]
    notes: tuple[str, ...] = ()
    network_bytes_per_s: int | None = None
    network_latency_ns: int | None = None
    pinned_limit_bytes: int | None = None
    pageable_fraction: float | None = None

    def hardware(self) -> Hardware:
        """Return the machine with every rate settled, what was assumed in its `assumptions`.

        Raises:
            InputError: too many GPUs or nodes, or links that these GPUs do not have.
        """
        total = sum(len(node.gpus) for node in self.nodes)
        if total > MAX_GPUS or len(self.nodes) > MAX_NODES:
            raise InputError(
                f"--gpus: {total} GPUs in {len(self.nodes)} nodes; at most {MAX_GPUS} GPUs in {MAX_NODES} nodes are "
                "carried"
            )
        if len(self.nodes) == 1 and (self.network_bytes_per_s or self.network_latency_ns) is not None:
            raise InputError("a network joins nodes, and there is one; two are written --gpus 4x80GB/4x80GB")
        _check_nvlink(self.nodes)
        names = [f"node{i}/" for i in range(len(self.nodes))] if len(self.nodes) > 1 else [""]
        parts = [_Parts(node, name) for node, name in zip(self.nodes, names, strict=True)]
        links = [link for part in parts for link in part.links]
        notes = [*self.notes]
        if len(self.nodes) > 1:
            links += self._network(names, notes)
        notes += _by_node(parts)
        fraction = PAGEABLE_FRACTION if self.pageable_fraction is None else self.pageable_fraction
        if total:
            assumed = " (assumed)" if self.pageable_fraction is None else ""
            notes.append(f"copies from pageable memory at {fraction:.0%} of the rate from pinned memory{assumed}")
        hardware = Hardware(
            devices=tuple(device for part in parts for device in part.devices),
            pools=tuple(pool for part in parts for pool in part.pools),
            links=tuple(links),
            assumptions=tuple(notes),
            pinned_limit_bytes=self.pinned_limit_bytes,
            pageable_fraction=fraction,
        )
        hardware.check()
        return hardware

    def _network(self, names: Sequence[str], notes: list[str]) -> list[Link]:
        rate = self.network_bytes_per_s or NETWORK_BYTES_PER_S
        latency = NETWORK_LATENCY_NS if self.network_latency_ns is None else self.network_latency_ns
        notes.append(
            f"{len(names)} nodes on a network: {rate / GB:.2f} GB/s out of each node, shared by all it sends"
            f"{_assumed(self.network_bytes_per_s)}, {format_ns(latency)} a copy{_assumed(self.network_latency_ns)}; "
            "between GPUs of two nodes through both hosts, in pieces, as fast as the slowest part (assumed)"
        )
        return [
            Link(
                source=f"{source}cpu", target=f"{target}cpu", bytes_per_s=rate, latency_ns=latency,
                lane=f"{source.rstrip('/')}→network copy",
            )
            for source, target in itertools.permutations(names, 2)
        ]  # fmt: skip


class _Parts:
    """Devices, pools, links and notes of one node, whose names begin with `prefix`."""

    def __init__(self, node: Node, prefix: str):
        self.node, self.prefix = node, prefix
        self.notes: list[str] = [*node.gpu_notes]
        self.links = self._gpu_links()
        self.devices = [_gpu(gpu, f"{prefix}cuda:{i}") for i, gpu in enumerate(node.gpus)]
        self.pools = [
            MemoryPool(name=device.pool, capacity_bytes=gpu.capacity_bytes, reserved_bytes=0)
            for device, gpu in zip(self.devices, node.gpus, strict=True)
        ]
        self._host()

    def _host(self) -> None:
        node, prefix = self.node, self.prefix
        ram = DEFAULT_RAM_BYTES if node.ram_bytes is None else node.ram_bytes
        disk = DEFAULT_DISK_BYTES if node.disk_bytes is None else node.disk_bytes
        read = node.disk_bytes_per_s or DISK_BYTES_PER_S
        rate = node.cpu_bytes_per_s or (CPU_BYTES_PER_S if node.host is None else node.host.bytes_per_s)
        flops = node.cpu_flops_per_s or CPU_FLOPS_PER_S
        said = (node.cpu_bytes_per_s, node.cpu_flops_per_s)
        product = "CPU as described" if None not in said else CPU_PRODUCT
        if node.host is not None:
            product = node.host.name
            self.notes.append(node.host.note())
        self.notes.append(
            f"host RAM {format_bytes(ram)}{_assumed(node.ram_bytes)}, of which "
            f"{format_bytes(HOST_RESERVED_BYTES)} is left to the system and the program (assumed)"
        )
        first = "" if said == (None, None) else _assumed(said[0])
        about = "CPU" if None not in said and node.host is None else f"CPU {product}"
        self.notes.append(
            f"{about}: {rate / GB:.4g} GB/s from memory{first}, {flops / 1e12:.1f} TFLOP/s{_assumed(said[1])}"
        )
        self.notes.append(f"{OPERATOR_NS / 1e3:.0f} µs of host time for an operator (assumed)")
        self.notes.append(
            f"disk {format_bytes(disk)}{_assumed(node.disk_bytes)}, read at {read / GB:.1f} GB/s"
            f"{_assumed(node.disk_bytes_per_s)}"
        )
        self.devices.append(
            Device(
                name=f"{prefix}cpu", kind="cpu", product=product, pool=f"{prefix}cpu",
                flops_per_s={"default": flops}, bytes_per_s=rate, operator_ns=OPERATOR_NS, context_bytes=0,
                workspace_bytes=0,
            )
        )  # fmt: skip
        self.pools.append(MemoryPool(name=f"{prefix}cpu", capacity_bytes=ram, reserved_bytes=HOST_RESERVED_BYTES))
        self.pools.append(MemoryPool(name=f"{prefix}disk", capacity_bytes=disk, reserved_bytes=0))
        self.links.append(
            Link(source=f"{prefix}disk", target=f"{prefix}cpu", bytes_per_s=read, latency_ns=DISK_LATENCY_NS)
        )

    def _gpu_links(self) -> list[Link]:
        gpus, prefix, host = self.node.gpus, self.prefix, f"{self.prefix}cpu"
        behind = {gpu: number for number, members in enumerate(self.node.switches) for gpu in members}
        between = self._between()
        links = []
        for i, gpu in enumerate(gpus):
            name, rate = f"{prefix}cuda:{i}", gpu.pcie_bytes_per_s
            switch = f"{prefix}switch{behind[i]}" if i in behind else None
            for source, target in ((host, name), (name, host)):
                ends = (host, switch) if source == host else (switch, host)
                lane = f"{ends[0]}→{ends[1]} copy" if switch is not None else None
                links.append(
                    Link(source=source, target=target, bytes_per_s=rate, latency_ns=COPY_LATENCY_NS, lane=lane)
                )
            for j in range(len(gpus)):
                if i != j:
                    way, latency = between[min(i, j), max(i, j)]
                    links.append(Link(source=name, target=f"{prefix}cuda:{j}", bytes_per_s=way, latency_ns=latency))
        self._tell(between)
        return links

    def _between(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Return {(GPU, later GPU): (bytes per second, latency in ns)} within the node."""
        node, gpus = self.node, self.node.gpus
        wires = {(min(i, j), max(i, j)): rate for i, j, rate in node.wires}
        nvlinks = _nvlinks(gpus) if node.ways == "nvlink" else {}
        result = {}
        for i, j in itertools.combinations(range(len(gpus)), 2):
            slower = min(gpus[i].pcie_bytes_per_s, gpus[j].pcie_bytes_per_s)
            direct = wires.get((i, j)) or nvlinks.get((i, j)) or (slower if node.ways == "p2p" else None)
            # Through host memory a copy is two copies, one after the other.
            result[i, j] = (direct, COPY_LATENCY_NS) if direct is not None else (slower // 2, 2 * COPY_LATENCY_NS)
        return result

    def _tell(self, between: dict[tuple[int, int], tuple[int, int]]) -> None:
        node, gpus = self.node, self.node.gpus
        if not gpus:
            return
        words = ", ".join(sorted({f"{gpu.pcie_bytes_per_s / GB:.1f} GB/s" for gpu in gpus}))
        nvlinks = _nvlinks(gpus) if node.ways == "nvlink" else {}
        way = "through the host"
        if node.ways == "p2p":
            way = "peer to peer over PCIe"
            if any("GeForce" in gpu.facts.name for gpu in gpus):
                way += ", which NVIDIA's driver refuses on GeForce (see nvidia-smi topo -p2p r)"
        elif nvlinks:
            rates = ", ".join(sorted({f"{rate / GB:.1f} GB/s" for rate in nvlinks.values()}))
            way = f"{rates} over NVLink, {NVLINK_FRACTION:.0%} of the datasheet's"
            if len(nvlinks) < len(between):
                way += f", for {len(nvlinks)} of {len(between)} pairs and through the host for others"
        self.notes.append(f"host to GPU {words} from pinned memory; GPU to GPU {way} (assumed)")
        for i, j, rate in node.wires:
            self.notes.append(f"cuda:{i} and cuda:{j} joined at {rate / GB:.1f} GB/s each way")
        for members in node.switches:
            if len(members) > 1:
                names = ", ".join(f"cuda:{i}" for i in members)
                self.notes.append(f"{names} share one way to the host, and it copies for one at a time")
        self.notes.append(f"{format_bytes(CUDA_CONTEXT_BYTES)} of CUDA context on each GPU (assumed)")


def _check_nvlink(nodes: Sequence[Node]) -> None:
    """Raise InputError where NVLink is asked for and joins nothing."""
    asked = [node.gpus for node in nodes if node.ways == "nvlink" and len(node.gpus) > 1]
    if asked and not any(_nvlinks(gpus) for gpus in asked):
        names = ", ".join(dict.fromkeys(gpu.facts.name for gpus in asked for gpu in gpus))
        having = ", ".join(key for key, facts in catalogue().items() if facts.nvlink is not None)
        raise InputError(
            f"--links nvlink: no two of {names} can be joined by NVLink; name products that have it ({having}), or "
            "say --links p2p or host"
        )


def _nvlinks(gpus: Sequence[Gpu]) -> dict[tuple[int, int], int]:
    """Return {(GPU, later GPU): achieved bytes per second each way} of GPUs of one product that NVLink joins."""
    result: dict[tuple[int, int], int] = {}
    paired: set[int] = set()
    for i, j in itertools.combinations(range(len(gpus)), 2):
        facts = gpus[i].facts.nvlink
        if facts is None or gpus[i].product != gpus[j].product:
            continue
        if facts.joins == "pairs":
            if {i, j} & paired:
                continue
            paired |= {i, j}
        result[i, j] = int(facts.gb_per_s * GB * NVLINK_FRACTION)
    return result


def _by_node(parts: Sequence[_Parts]) -> list[str]:
    """Return the nodes' notes, each once, with the nodes it is about where that is not all."""
    about: dict[str, dict[str, None]] = {}
    for part in parts:
        for note in part.notes:
            about.setdefault(note, {})[part.prefix.rstrip("/")] = None
    return [note if len(nodes) == len(parts) else f"{', '.join(nodes)}: {note}" for note, nodes in about.items()]


def _assumed(said: object) -> str:
    return " (assumed)" if said is None else ""


def _gpu(gpu: Gpu, name: str) -> Device:
    facts = gpu.facts
    flops = facts.flops_per_s()
    if gpu.half_flops_per_s is not None:
        flops |= {"bfloat16": gpu.half_flops_per_s, "float16": gpu.half_flops_per_s}
    return Device(
        name=name,
        kind="cuda",
        product=facts.name,
        pool=name,
        flops_per_s=flops,
        bytes_per_s=gpu.bytes_per_s or facts.bytes_per_s,
        operator_ns=OPERATOR_NS,
        context_bytes=CUDA_CONTEXT_BYTES,
        workspace_bytes=CUBLAS_WORKSPACE_BYTES[facts.workspace],
    )


def from_options(
    gpus: str | int | None = None,
    *,
    ram: str | int | None = None,
    disk: str | int | None = None,
    pinned: str | int | None = None,
    links: Ways | None = None,
    gpus_per_switch: int | None = None,
    network: str | int | None = None,
    disk_speed: str | int | None = None,
    cpu_flops: str | int | None = None,
    cpu_bandwidth: str | int | None = None,
    host: str | None = None,
) -> Hardware:
    """Return the machine that the options describe: all of them but `gpus` and `network` are about each node.

    links: "host", "p2p" or "nvlink" between the GPUs of a node. gpus_per_switch: so many neighbours share one way to
    the host. Rates as "3GB/s" or "100Gbit/s", cpu_flops as "2TFLOP/s"; cpu_bandwidth also as "2xddr5-5600", disk_speed
    also as "nvme4". host: a kind of host, "epyc-9004", for its memory and PCIe slots.

    Raises:
        InputError: an option cannot be read, names no known product, or is zero where it must not be.
    """
    notes = ["GB = 10^9 bytes, GiB = 2^30 bytes"]
    if gpus is None:
        notes.append("no GPU: --gpus was not given (assumed)")
    if links is not None and links not in WAYS:
        raise InputError(f"--links must be one of {', '.join(WAYS)}; got {links!r}")
    if gpus_per_switch is not None and gpus_per_switch < 1:
        raise InputError(f"--gpus-per-switch must be at least 1, and is {gpus_per_switch}")
    where = None if host is None else host_of(host)
    nodes = [
        Node(
            gpus=behind(found, where),
            gpu_notes=told,
            ways=links or "host",
            switches=_switches(len(found), gpus_per_switch),
            ram_bytes=parse_ram("--ram", ram),
            disk_bytes=None if disk is None else parse_bytes(disk, what="--disk"),
            disk_bytes_per_s=None if disk_speed is None else disk_rate(disk_speed, what="--disk-speed"),
            cpu_flops_per_s=None if cpu_flops is None else parse_flops(cpu_flops, what="--cpu-flops"),
            cpu_bytes_per_s=None if cpu_bandwidth is None else memory_rate(cpu_bandwidth, what="--cpu-bandwidth"),
            host=where,
        )
        for found, told in parse_nodes(gpus or 0)
    ]
    return Machine(
        nodes=tuple(nodes),
        notes=tuple(notes),
        network_bytes_per_s=None if network is None else parse_rate(network, what="--network"),
        pinned_limit_bytes=None if pinned is None else parse_bytes(pinned, what="--pinned"),
    ).hardware()


def _switches(gpus: int, each: int | None) -> tuple[tuple[int, ...], ...]:
    if each is None or each == 1:
        return ()
    return tuple(tuple(range(first, min(first + each, gpus))) for first in range(0, gpus, each))


def parse_ram(what: str, size: str | int | None) -> int | None:
    nbytes = None if size is None else parse_bytes(size, what=what)
    if nbytes == 0:
        raise InputError(f"{what} must not be zero: the program itself lives there; give the RAM of the machine")
    return nbytes
