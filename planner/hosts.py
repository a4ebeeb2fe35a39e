"""Hosts and disks by name, from `products.json`: "epyc-9004", "12xddr5-4800", "nvme4"."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.errors import InputError
from planner.gpus import Gpu
from planner.hardware import products
from planner.units import GB, parse_rate

# A channel is 64 bits wide, DDR5's two halves together.
_CHANNEL_BYTES = 8
_MEMORY = re.compile(r"\s*(\d{1,3})\s*x\s*ddr[345]-(\d{3,5})\s*", flags=re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What a kind of host brings: channels of memory, of one socket, and the PCIe generation of its slots."""

    key: str
    name: str
    channels: int
    memory: str
    mega_transfers_per_s: int
    pcie: int
    source: str

    @property
    def peak_bytes_per_s(self) -> int:
        return self.channels * self.mega_transfers_per_s * 10**6 * _CHANNEL_BYTES

    @property
    def bytes_per_s(self) -> int:
        """What all cores together reach of it."""
        return int(self.peak_bytes_per_s * memory_fraction())

    def note(self) -> str:
        return (
            f"host {self.name}: {self.channels} channels of {self.memory.upper()}-{self.mega_transfers_per_s}, "
            f"{self.peak_bytes_per_s / GB:.1f} GB/s of which {memory_fraction():.0%} achieved; PCIe {self.pcie}"
        )


@functools.cache
def hosts() -> dict[str, Host]:
    """Return all kinds of host by key."""
    return {key: Host(key=key, **entry) for key, entry in products()["hosts"].items()}


def host(text: str, *, what: str = "--host") -> Host:
    """Return the kind of host that a name means.

    Raises:
        InputError: there is none of that name.
    """
    key = text.strip().lower().replace("_", "-").replace(" ", "-")
    if key not in hosts():
        raise InputError(f"{what} {text!r} is not known; {_alike(key, hosts())}plan gpus --hosts lists all")
    return hosts()[key]


def behind(gpus: Sequence[Gpu], where: Host | None) -> tuple[Gpu, ...]:
    """Return the GPUs as they are in a host: none is reached faster than its slots allow; what was said stays."""
    if where is None:
        return tuple(gpus)
    return tuple(
        gpu if gpu.host_bytes_per_s is not None else dataclasses.replace(gpu, host_bytes_per_s=rate)
        for gpu in gpus
        for rate in [gpu.facts.host_bytes_at(where.pcie)]
    )


def memory_rate(text: str | int, *, what: str) -> int:
    """Return bytes a second of "200GB/s" (as it stands) or "2xddr5-5600" (what is achieved of it).

    Raises:
        InputError: neither a rate nor channels of memory.
    """
    match = _MEMORY.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return parse_rate(text, what=what)
    rate = int(int(match[1]) * int(match[2]) * 10**6 * _CHANNEL_BYTES * memory_fraction())
    if rate == 0:
        raise InputError(f"{what} {text!r}: no memory at all; write such as 2xddr5-5600")
    return rate


def disk_rate(text: str | int, *, what: str) -> int:
    """Return bytes a second of "3GB/s" (as it stands) or "nvme4" (what is achieved of it).

    Raises:
        InputError: neither a rate nor a kind of disk.
    """
    kind = products()["disks"].get(text.strip().lower()) if isinstance(text, str) and _word(text) else None
    if kind is None:
        if isinstance(text, str) and _word(text):
            raise InputError(f"{what} {text!r} is not known; write {', '.join(products()['disks'])}, or such as 3GB/s")
        return parse_rate(text, what=what)
    return int(kind["peak_gb_per_s"] * GB * products()["host_achieved"]["disk"]["fraction"])


def memory_fraction() -> float:
    """Return what is achieved of the rate of a host's memory, as a fraction."""
    return float(products()["host_achieved"]["memory"]["fraction"])


def _word(text: str) -> bool:
    return re.match(r"\s*(nvme|sata)", text, flags=re.IGNORECASE) is not None


def _alike(text: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(text, list(names), n=3, cutoff=0.5)
    return f"nearest: {', '.join(found)}; " if found else ""
