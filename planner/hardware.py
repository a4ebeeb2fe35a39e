"""The machine a plan is made for: devices, the memory they draw on, and the links between them.

With `Hardware.from_options` nothing is read from the machine at hand: what the caller does not say is a stated
assumption, listed in `Hardware.assumptions`.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from planner.errors import InputError
from planner.units import GB, GIB, MB, TB, format_bytes, parse_bytes

# Achieved / datasheet: a large bf16 matmul 788 of 989 TFLOP/s and a device copy 4.3 of 4.8 TB/s, both measured on
# an H200. Taken for every GPU until this machine is calibrated.
MATMUL_FRACTION = 0.80
BANDWIDTH_FRACTION = 0.90
# Achieved host-to-device rate of large pinned copies over 16 lanes, by PCIe generation (published measurements:
# 12.4, 22.5 to 24, and 51 to 55 GB/s).
PCIE_BYTES_PER_S = {3: 12_400 * MB, 4: 22_500 * MB, 5: 51_000 * MB}
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
# A desktop with two channels of DDR5: 60 GB/s read by all cores, 1 TFLOP/s of matmul.
CPU_BYTES_PER_S = 60 * GB
CPU_FLOPS_PER_S = 1_000_000_000_000
DISK_BYTES_PER_S = 3 * GB
DISK_LATENCY_NS = 100_000
# Left to the operating system, the interpreter and the libraries.
HOST_RESERVED_BYTES = 4 * GB
MAX_GPUS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Somewhere a layer can run. Rates are achieved ones, not datasheet peaks.

    flops_per_s: matmul rate by torch dtype name; "default" serves the dtypes that are not named.
    operator_ns: host time per operator; a layer takes at least its operators times this.
    context_bytes, workspace_bytes: taken by the driver and the matmul library before any tensor.
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

    def flops_for(self, dtype: str) -> int:
        """Return the achieved matmul rate for a torch dtype name such as "bfloat16", in FLOP/s."""
        return self.flops_per_s.get(dtype, self.flops_per_s["default"])


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
    """A one-way path between two places: achieved rate of large copies, and latency of one copy."""

    source: str
    target: str
    bytes_per_s: int
    latency_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Devices in order (GPUs first, then "cpu"), their pools ("disk" is a pool without a device), and links.

    pinned_limit_bytes: how much of the host's memory may be pinned for GPUs to copy from; None where only its size
        limits that.
    """

    devices: tuple[Device, ...]
    pools: tuple[MemoryPool, ...]
    links: tuple[Link, ...]
    assumptions: tuple[str, ...] = ()
    pinned_limit_bytes: int | None = None

    def device(self, name: str) -> Device:
        return next(device for device in self.devices if device.name == name)

    def pool(self, name: str) -> MemoryPool:
        return next(pool for pool in self.pools if pool.name == name)

    def link(self, source: str, target: str) -> Link:
        """Return the link from `source` to `target`.

        Raises:
            KeyError: the two are not joined directly.
        """
        for link in self.links:
            if (link.source, link.target) == (source, target):
                return link
        raise KeyError(f"no link from {source} to {target}")

    def host(self, name: str) -> str:
        """Return the CPU of the node that a device or memory is in: "cpu", or "node0/cpu"."""
        return f"{_node(name)}cpu"

    def disk(self, name: str) -> str:
        """Return the disk of the node that a device or memory is in: "disk", or "node0/disk"."""
        return f"{_node(name)}disk"

    @property
    def hosts(self) -> tuple[Device, ...]:
        """The CPU of every node."""
        return tuple(device for device in self.devices if device.kind == "cpu")

    @property
    def pageable_fraction(self) -> float:
        return 0.6

    def node(self, name: str) -> str:
        """Return the node that a device or memory is in; "" where there is only one."""
        return _node(name).removesuffix("/")

    @property
    def gpus(self) -> tuple[Device, ...]:
        return tuple(device for device in self.devices if device.kind != "cpu")

    @classmethod
    def from_options(
        cls,
        gpus: str | int | None = None,
        *,
        ram: str | int | None = None,
        disk: str | int | None = None,
        max_memory: Mapping[str, str | int] | None = None,
    ) -> Hardware:
        """Return the machine that the options describe: `gpus` as "2x24GB", "2xrtx4090,1xl4" or 0.

        Raises:
            InputError: an option cannot be read, names no known product, or is zero where it must not be.
        """
        notes = ["GB = 10^9 bytes, GiB = 2^30 bytes"]
        if gpus is None:
            notes.append("no GPU: --gpus was not given (assumed)")
        specs = parse_gpus(gpus or 0, notes)
        devices = [_gpu(index, capacity, product) for index, (capacity, product) in enumerate(specs)]
        pools = [MemoryPool(name=f"cuda:{i}", capacity_bytes=c, reserved_bytes=0) for i, (c, _) in enumerate(specs)]
        links = _gpu_links(specs, notes)
        devices.append(_CPU)
        ram_bytes = DEFAULT_RAM_BYTES if ram is None else parse_bytes(ram, what="--ram")
        disk_bytes = DEFAULT_DISK_BYTES if disk is None else parse_bytes(disk, what="--disk")
        if ram_bytes == 0:
            raise InputError("--ram must not be zero: the program itself lives there; give the RAM of the machine")
        notes.append(
            f"host RAM {format_bytes(ram_bytes)}{' (assumed)' if ram is None else ''}, of which "
            f"{format_bytes(HOST_RESERVED_BYTES)} is left to the system and the program (assumed)"
        )
        notes.append(
            f"CPU {_CPU.product}: {CPU_BYTES_PER_S // GB} GB/s from memory, "
            f"{CPU_FLOPS_PER_S / 1e12:.1f} TFLOP/s (assumed)"
        )
        notes.append(f"{OPERATOR_NS / 1e3:.0f} µs of host time for an operator (assumed)")
        notes.append(
            f"disk {format_bytes(disk_bytes)}{' (assumed)' if disk is None else ''}, read at "
            f"{DISK_BYTES_PER_S / GB:.1f} GB/s (assumed)"
        )
        pools.append(MemoryPool(name="cpu", capacity_bytes=ram_bytes, reserved_bytes=HOST_RESERVED_BYTES))
        pools.append(MemoryPool(name="disk", capacity_bytes=disk_bytes, reserved_bytes=0))
        links.append(Link(source="disk", target="cpu", bytes_per_s=DISK_BYTES_PER_S, latency_ns=DISK_LATENCY_NS))
        hardware = cls(devices=tuple(devices), pools=tuple(pools), links=tuple(links), assumptions=tuple(notes))
        return hardware.with_max_memory(max_memory or {})

    def with_max_memory(self, max_memory: Mapping[str, str | int]) -> Hardware:
        """Return this machine with pools capped: {"cuda:0": "20GiB", "cpu": "64GB", "pinned": "16GB"}; a cap never
        raises a capacity.

        Raises:
            InputError: a name that this machine does not have, or a size that cannot be read.
        """
        caps = {_device_name(key): parse_bytes(value, what=f"max_memory of {key}") for key, value in max_memory.items()}
        names = [*(pool.name for pool in self.pools), "pinned"]
        for name in caps:
            if name not in names:
                raise InputError(f"max_memory names {name!r}, which is not planned for; there are {', '.join(names)}")
        pools = tuple(
            MemoryPool(
                name=pool.name,
                capacity_bytes=min(pool.capacity_bytes, caps.get(pool.name, pool.capacity_bytes)),
                reserved_bytes=0 if pool.name in caps else pool.reserved_bytes,
            )
            for pool in self.pools
        )
        notes = tuple(f"{name} limited to {format_bytes(size)} by max_memory" for name, size in sorted(caps.items()))
        limits = [limit for limit in (self.pinned_limit_bytes, caps.get("pinned")) if limit is not None]
        return Hardware(
            devices=self.devices,
            pools=pools,
            links=self.links,
            assumptions=self.assumptions + notes,
            pinned_limit_bytes=min(limits, default=None),
        )


def _node(name: str) -> str:
    """Return "node0/" for "node0/cuda:1", and nothing for a name without a node."""
    node, slash, _ = name.rpartition("/")
    return node + slash


_CPU = Device(
    name="cpu",
    kind="cpu",
    product="desktop with two channels of DDR5",
    pool="cpu",
    flops_per_s={"default": CPU_FLOPS_PER_S},
    bytes_per_s=CPU_BYTES_PER_S,
    operator_ns=OPERATOR_NS,
    context_bytes=0,
    workspace_bytes=0,
)


@functools.cache
def products() -> dict[str, Any]:
    """Return the bundled product facts (`products.json`)."""
    text = importlib.resources.files("planner").joinpath("products.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def parse_gpus(text: str | int, notes: list[str]) -> list[tuple[int, str]]:
    """Return (capacity in bytes, product key) for each GPU of "2x24GB,1xl4"; what is assumed goes to `notes`."""
    if str(text).strip() in ("0", "none", ""):
        return []
    specs: list[tuple[int, str]] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(?:(\d+)\s*[x\u00d7]\s*)?(\S+)\s*", part, flags=re.IGNORECASE)
        if match is None:
            raise InputError(_gpus_help(text))
        count = int(match[1]) if match[1] is not None else 1
        if not 1 <= count <= MAX_GPUS:
            raise InputError(f"--gpus {text}: {count} GPUs cannot be planned for; give 1 to {MAX_GPUS}, or --gpus 0")
        specs += [_one_gpu(match[2], text, notes)] * count
    if len(specs) > MAX_GPUS:
        raise InputError(f"--gpus {text}: {len(specs)} GPUs; at most {MAX_GPUS} are carried")
    return specs


def _one_gpu(word: str, text: str | int, notes: list[str]) -> tuple[int, str]:
    catalogue = products()["products"]
    key = word.lower().replace("_", "-")
    if key in catalogue:
        facts = catalogue[key]
        notes.append(f"GPU {facts['name']}: {facts['usable_gib']} GiB usable")
        return int(facts["usable_gib"] * GIB), key
    if not re.match(r"[\d.]", word):
        raise InputError(_gpus_help(text))
    try:
        capacity = parse_bytes(word if re.search(r"[a-zA-Z]", word) else "", what="--gpus")
    except InputError as exc:
        raise InputError(_gpus_help(text)) from exc
    if capacity == 0:
        raise InputError(f"--gpus {text}: a GPU with no memory; write --gpus 0 to plan without GPUs")
    table = products()["assumed_for_gb"]
    size = min(table, key=lambda gb: (abs(int(gb) * GB - capacity), int(gb)))
    facts = catalogue[table[size]]
    notes.append(
        f"GPU of {format_bytes(capacity)} taken as {facts['name']} (assumed; usable there "
        f"{format_bytes(int(facts['usable_gib'] * GIB))}): {facts['half_tflops']:.0f} TFLOP/s and "
        f"{facts['memory_gb_per_s']:.0f} GB/s on its datasheet, "
        f"{MATMUL_FRACTION:.0%} and {BANDWIDTH_FRACTION:.0%} achieved"
    )
    return capacity, table[size]


def _gpus_help(text: str | int) -> str:
    known = ", ".join(products()["products"])
    return f"--gpus {text}: write COUNTxSIZE such as 2x24GB, COUNTxPRODUCT such as 2xrtx4090, or 0; products: {known}"


def _gpu(index: int, capacity_bytes: int, product: str) -> Device:
    facts = products()["products"][product]
    half = int(facts["half_tflops"] * 1e12 * MATMUL_FRACTION)
    single = int(facts["fp32_tflops"] * 1e12 * MATMUL_FRACTION)
    return Device(
        name=f"cuda:{index}",
        kind="cuda",
        product=facts["name"],
        pool=f"cuda:{index}",
        flops_per_s={"bfloat16": half, "float16": half, "default": single},
        bytes_per_s=int(facts["memory_gb_per_s"] * GB * BANDWIDTH_FRACTION),
        operator_ns=OPERATOR_NS,
        context_bytes=CUDA_CONTEXT_BYTES,
        workspace_bytes=CUBLAS_WORKSPACE_BYTES[facts["workspace"]],
    )


def _gpu_links(specs: list[tuple[int, str]], notes: list[str]) -> list[Link]:
    catalogue = products()["products"]
    rates = [PCIE_BYTES_PER_S[catalogue[product]["pcie"]] for _, product in specs]
    links = []
    for i, rate in enumerate(rates):
        for source, target in (("cpu", f"cuda:{i}"), (f"cuda:{i}", "cpu")):
            links.append(Link(source=source, target=target, bytes_per_s=rate, latency_ns=COPY_LATENCY_NS))
        for j, other in enumerate(rates):
            if i != j:
                # Without NVLink or P2P a copy goes through host memory: two copies, one after the other.
                through = min(rate, other) // 2
                links.append(
                    Link(source=f"cuda:{i}", target=f"cuda:{j}", bytes_per_s=through, latency_ns=2 * COPY_LATENCY_NS)
                )
    if specs:
        words = ", ".join(sorted({f"{rate / GB:.1f} GB/s" for rate in rates}))
        notes.append(f"host to GPU {words} from pinned memory; GPU to GPU through the host (assumed)")
        notes.append(f"{format_bytes(CUDA_CONTEXT_BYTES)} of CUDA context on each GPU (assumed)")
    return links


def _device_name(key: str | int) -> str:
    text = str(key)
    return f"cuda:{text}" if text.isdigit() else text
