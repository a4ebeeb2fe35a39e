"""Products as vendors describe them, from `products.json`: peaks, what is achieved of them, usable memory, and the
source of each. Read only when it is asked for.
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from typing import Any

from planner.errors import InputError
from planner.hardware import PCIE_BYTES_PER_S, products
from planner.units import GB, GIB

PCIE_LANES = 16
_NEAREST = 3
_LEAST_ALIKE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Achieved:
    """What is reached of a product's peaks, as fractions, and where that comes from."""

    matmul: float
    bandwidth: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NvLink:
    """GB/s each way by the datasheet, and whether it joins "all" GPUs of a node or "pairs"."""

    gb_per_s: float
    joins: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLink:
    """A product's own way to its host, in GB/s each way, in place of PCIe."""

    name: str
    peak_gb_per_s: float
    achieved_gb_per_s: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """What computes fp32: `count` units of `lanes` multiply-adds a clock."""

    count: int
    lanes: int
    clock_mhz: int

    @property
    def fp32_tflops(self) -> float:
        return self.count * self.lanes * 2 * self.clock_mhz / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One product. Peaks are dense datasheet rates; plans use what is achieved of them.

    name: with its memory, as plans print it. key: as --gpus takes it.
    maker: the table it is in: "products" (NVIDIA), "rocm" (AMD), "others" (never planned for).
    peak_tflops: TFLOP/s of matrix products by type: fp32, tf32, bf16, fp16, fp8, int8 (TOP/s), fp4.
    usable_gib: what the driver leaves.
    refused: why plans are not made for it; None where they are.
    sources: in words, of "peak", "memory" (bandwidth) and "usable".
    """

    key: str
    maker: str
    name: str
    label_gb: int
    usable_gib: float
    memory_gb_per_s: float
    peak_tflops: dict[str, float]
    achieved: Achieved
    units: Units | None
    pcie: int | None
    pcie_lanes: int
    host_link: HostLink | None
    nvlink: NvLink | None
    workspace: str
    torch_names: tuple[str, ...]
    refused: str | None
    sources: dict[str, str]

    @property
    def usable_bytes(self) -> int:
        return int(self.usable_gib * GIB)

    @property
    def bytes_per_s(self) -> int:
        """The achieved rate of its memory."""
        return int(self.memory_gb_per_s * GB * self.achieved.bandwidth)

    @property
    def host_bytes_per_s(self) -> int:
        """The achieved rate of large pinned copies to it or from it."""
        return self.host_bytes_at(max(PCIE_BYTES_PER_S))

    def host_bytes_at(self, slot: int) -> int:
        """Return the achieved rate of large pinned copies in a slot of a PCIe generation, in bytes a second."""
        if self.host_link is not None:
            return int(self.host_link.achieved_gb_per_s * GB)
        return PCIE_BYTES_PER_S[min(slot, self.pcie or slot)] * self.pcie_lanes // PCIE_LANES

    def flops_per_s(self) -> dict[str, int]:
        """Return achieved matmul rates by torch dtype name, "default" for others.

        Without bf16 in hardware its products are taken to run at fp32's rate.
        """
        rates = {
            "bfloat16": self.peak_tflops.get("bf16", self.peak_tflops["fp32"]),
            "float16": self.peak_tflops["fp16"],
            "default": self.peak_tflops["fp32"],
        }
        return {dtype: int(peak * 1e12 * self.achieved.matmul) for dtype, peak in rates.items()}

    @property
    def half_tflops(self) -> float:
        """The peak in 16 bits."""
        return max(self.peak_tflops.get("bf16", 0.0), self.peak_tflops["fp16"])

    def notes(self) -> list[str]:
        """Return what is assumed of it in a plan, beside its rates."""
        notes = []
        if "bf16" not in self.peak_tflops:
            notes.append(f"{self.name} has no bfloat16 in hardware: computed at float32's rate (assumed)")
        if self.maker == "rocm":
            notes.append(
                f"{self.name}: context, library workspace and kernels' scratch are taken as on NVIDIA's GPUs (assumed)"
            )
        return notes


@functools.cache
def catalogue() -> dict[str, Product]:
    """Return all products by key, those that plans are made for first."""
    data = products()
    return {key: _product(key, maker, data) for maker in ("products", "rocm", "others") for key in data[maker]}


def find(text: str) -> Product | None:
    """Return the product that a name means, whatever its case, spaces, dashes and maker; None where it means none."""
    return _by_plain_name().get(_plain(text))


def product(text: str) -> Product:
    """Return the product that a name means, where plans are made for it.

    Raises:
        InputError: no product is called so (with the nearest that are), or plans are not made for it, and why.
    """
    found = find(text)
    if found is None:
        raise InputError(unknown(text))
    if found.refused is not None:
        raise InputError(f"{found.name} ({found.key}) cannot be planned for: {found.refused}")
    return found


def unknown(text: str) -> str:
    """Return a message about a name that no product has, with the nearest that are."""
    near = nearest(text)
    like = f"; nearest: {', '.join(near)}" if near else ""
    return f"the GPU product {text!r} is not known{like}; plan gpus lists all"


def nearest(text: str) -> list[str]:
    """Return the keys most like a name: those that begin with it, then those spelt alike."""
    plain = _plain(text)
    names = {_plain(key): key for key in catalogue()}
    found = [key for name, key in names.items() if plain and name.startswith(plain)]
    alike = difflib.get_close_matches(plain, names, n=_NEAREST, cutoff=_LEAST_ALIKE)
    return list(dict.fromkeys([*found, *(names[name] for name in alike)]))[: max(_NEAREST, len(found))]


def called_by_torch(name: str, total_bytes: int) -> Product | None:
    """Return the product that torch calls `name` and whose memory is nearest to `total_bytes`, at most a tenth off."""
    alike = [each for each in catalogue().values() if name in each.torch_names]
    best = min(alike, key=lambda each: abs(each.usable_bytes - total_bytes), default=None)
    if best is None or abs(best.usable_bytes - total_bytes) > best.usable_bytes // 10:
        return None
    return best


def kernels_of(name: str) -> str:
    """Return whose kernels are modelled where a plan names a product: its own, for AMD's an RTX 4090's."""
    foreign = any(each.name == name and each.maker == "rocm" for each in catalogue().values())
    return f"{catalogue()['rtx4090'].name} (assumed: {name} has other kernels)" if foreign else name


def _product(key: str, maker: str, data: dict[str, Any]) -> Product:
    entry = data[maker][key]
    bare = entry["name"].removesuffix(f" {entry['label_gb']}GB")
    return Product(
        key=key,
        maker=maker,
        name=entry["name"],
        label_gb=entry["label_gb"],
        usable_gib=entry["usable_gib"],
        memory_gb_per_s=entry["memory_gb_per_s"],
        peak_tflops=entry["peak_tflops"],
        achieved=Achieved(**data["achieved"][entry.get("achieved", "default")]),
        units=Units(**entry["units"]) if "units" in entry else None,
        pcie=entry.get("pcie"),
        pcie_lanes=entry.get("pcie_lanes", PCIE_LANES),
        host_link=HostLink(**entry["host_link"]) if "host_link" in entry else None,
        nvlink=NvLink(**entry["nvlink"]) if "nvlink" in entry else None,
        workspace=entry.get("workspace", "small"),
        torch_names=tuple(entry.get("torch_names", (bare,))),
        refused=entry.get("refused"),
        sources={what: _source(source, entry, data) for what, source in entry["sources"].items()},
    )


def _source(source: str, entry: dict[str, Any], data: dict[str, Any]) -> str:
    if source != "rule":
        return str(data["sources"][source])
    rule = data["usable_rules"][entry["usable_rule"]]
    return f"{data['sources'][source]}: {rule['missing_gib']} GiB less than its label ({rule['why']})"


@functools.cache
def _by_plain_name() -> dict[str, Product]:
    return {_plain(key): each for key, each in catalogue().items()}


def _plain(text: str) -> str:
    """Return "rtx4090" for "NVIDIA GeForce RTX-4090"."""
    return re.sub(r"nvidia|geforce|amd|instinct|intel|apple|[\s_-]", "", text.lower())
