"""This machine → Machine, for `--hardware local`: what is free now, and what had to be assumed.

Read are torch's GPUs, /proc and the control group, and the disk of the working folder. Rates are not measured.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from planner.gpus import Gpu, taken_for
from planner.hardware import CPU_BYTES_PER_S, CUDA_CONTEXT_BYTES
from planner.machines import Machine, Node, Ways
from planner.products import Product, called_by_torch, catalogue
from planner.units import GB, format_bytes

# What one core reads from memory at best: an assumption; all together at most what is assumed of a desktop.
CORE_BYTES_PER_S = 15 * GB
# fp32 operations a core does in a clock, by what /proc/cpuinfo names: two multiply-adds of 8 lanes with AVX2 (AVX-512
# is taken as the same: many cores do half as many of twice the width), of 4 lanes on ARM; else two of 2 lanes.
_FLOPS_PER_CLOCK = {"avx512f": 32, "avx2": 32, "asimd": 16}
_PLAIN_FLOPS_PER_CLOCK = 8
_ASSUMED_MHZ = 2500.0
# Of that, what a large matmul reaches: an assumption.
_MATMUL_FRACTION = 0.8
# Where drivers show themselves on Linux; without any, torch need not be loaded to know that there is no GPU.
_DRIVERS = ("dev/nvidiactl", "dev/dxg", "dev/kfd")


def machine(root: Path = Path("/")) -> Machine:
    """Return this machine, its memories as large as what is free of them; /proc is read under `root`."""
    notes = [
        "GB = 10^9 bytes, GiB = 2^30 bytes",
        "read from this machine; what is free may change before the plan runs",
    ]
    gpus, gpu_notes, ways = _gpus(root)
    cpu = _Cpu(root)
    ram, ram_note = free_ram(root)
    folder = Path.cwd()
    disk = shutil.disk_usage(folder).free
    notes += [
        *ram_note,
        f"disk: free where {folder} is; what reading reaches is not measured",
        f"CPU of this machine: {cpu.note()}",
    ]
    node = Node(
        gpus=gpus,
        gpu_notes=gpu_notes,
        ways=ways,
        ram_bytes=ram,
        disk_bytes=disk,
        cpu_flops_per_s=cpu.flops_per_s,
        cpu_bytes_per_s=cpu.bytes_per_s,
    )
    return Machine(nodes=(node,), notes=tuple(notes))


def free_ram(root: Path) -> tuple[int | None, list[str]]:
    """Return the bytes that this process may still take, and how that is known; None where nothing says so.

    The least of MemAvailable and of what each memory control group above the process leaves.
    """
    limits = [
        (int(line.split()[1]) * 1024, "/proc/meminfo")
        for line in _lines(root / "proc/meminfo")
        if line.startswith("MemAvailable:")
    ]
    limits += [(size, "its control group") for size in _group_limits(root)]
    if not limits:
        return None, ["free host memory is not known here"]
    size, source = min(limits)
    return size, [f"{format_bytes(size)} of host memory are free by {source}"]


def _group_limits(root: Path) -> list[int]:
    """Return what the memory control groups of this process leave, in bytes; version 2 and 1, those above included."""
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        names = ("memory.max", "memory.current") if not controllers else (
            "memory.limit_in_bytes", "memory.usage_in_bytes",
        )  # fmt: skip
        here = Path(path.strip("/"))
        for group in (here, *here.parents):
            limit, used = (_number(mount / group / name) for name in names)
            if limit is not None and used is not None:
                found.append(max(0, limit - used + _reclaimable(mount / group / "memory.stat")))
    return found


def _reclaimable(path: Path) -> int:
    """Return bytes of cached files that a control group gives back under pressure."""
    sizes = dict(line.split(" ", 1) for line in _lines(path) if " " in line)
    return int(sizes.get("total_inactive_file", sizes.get("inactive_file", "0")))


class _Cpu:
    """The cores that this process may use, by /proc/cpuinfo."""

    def __init__(self, root: Path) -> None:
        entries = [line.split(":", 1) for line in _lines(root / "proc/cpuinfo") if ":" in line]
        facts = [(key.strip(), value.strip()) for key, value in entries]
        self.name = next((value for key, value in facts if key == "model name"), "a CPU without a name")
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = len(set(_cores(facts)))
        self.cores = max(1, min(threads, cores or threads))
        flags = {word for key, value in facts if key in ("flags", "Features") for word in value.split()}
        self.per_clock = next((n for flag, n in _FLOPS_PER_CLOCK.items() if flag in flags), _PLAIN_FLOPS_PER_CLOCK)
        self.mhz = max((float(value) for key, value in facts if key == "cpu MHz"), default=_ASSUMED_MHZ)
        self.flops_per_s = int(self.cores * self.per_clock * self.mhz * 1e6 * _MATMUL_FRACTION)
        self.bytes_per_s = min(CPU_BYTES_PER_S, self.cores * CORE_BYTES_PER_S)

    def note(self) -> str:
        return (
            f"{self.name}, {self.cores} cores x {self.per_clock} FLOP x {self.mhz:.0f} MHz, {_MATMUL_FRACTION:.0%} "
            f"achieved, and {CORE_BYTES_PER_S / GB:.0f} GB/s a core, at most {CPU_BYTES_PER_S / GB:.0f} (assumed)"
        )


def _cores(facts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return (socket, core) of each thread."""
    found, socket = [], ""
    for key, value in facts:
        if key == "physical id":
            socket = value
        elif key == "core id":
            found.append((socket, value))
    return found


def _gpus(root: Path) -> tuple[tuple[Gpu, ...], tuple[str, ...], Ways]:
    """Return this machine's GPUs, what is assumed of them, and how they reach each other."""
    if sys.platform == "linux" and not any((root / name).exists() for name in _DRIVERS):
        return (), ("no GPU driver is loaded",), "host"
    import torch

    notes: list[str] = []
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        notes.append("its GPU shares one memory with the CPU, which is not planned for yet: left out")
    if not torch.cuda.is_available():
        return (), (*notes, "torch sees no GPU that plans can use"), "host"
    count = torch.cuda.device_count()
    gpus = tuple(_gpu(torch, index, notes) for index in range(count))
    peers = [torch.cuda.can_device_access_peer(i, j) for i in range(count) for j in range(count) if i != j]
    if peers:
        notes.append("whether GPUs are joined by NVLink is not read: peer-to-peer copies are taken to go over PCIe")
    return gpus, tuple(dict.fromkeys(notes)), "p2p" if peers and all(peers) else "host"


def _gpu(torch: Any, index: int, notes: list[str]) -> Gpu:
    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    # Asking made a CUDA context, which the plan counts too.
    capacity = min(total, free + CUDA_CONTEXT_BYTES)
    known = called_by_torch(facts.name, total) or _alike(facts.multi_processor_count, total)
    if known is None:
        notes.append(f"cuda:{index} is {facts.name}, which the catalogue does not have")
        key = taken_for(total, notes)
    else:
        key = known.key
        named = "" if facts.name in known.torch_names else " (assumed, by its multiprocessors and memory)"
        notes += [f"cuda:{index} is {facts.name}, taken as {known.name}{named}", *known.notes()]
    notes.append(
        f"cuda:{index}: {format_bytes(capacity)} of {format_bytes(total)} are free, a CUDA context of "
        f"{format_bytes(CUDA_CONTEXT_BYTES)} included"
    )
    return Gpu(capacity_bytes=capacity, product=key)


def _alike(multiprocessors: int, total_bytes: int) -> Product | None:
    """Return the product of so many multiprocessors whose memory is nearest, at most a tenth off."""
    found = [
        each for each in catalogue().values()
        if each.refused is None and each.units is not None and each.units.count == multiprocessors
        and abs(each.usable_bytes - total_bytes) <= each.usable_bytes // 10
    ]  # fmt: skip
    return min(found, key=lambda each: abs(each.usable_bytes - total_bytes), default=None)


def _number(path: Path) -> int | None:
    """Return the number that a file holds; None where it holds none ("max"), or there is no file."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
