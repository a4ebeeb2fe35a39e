"""GPUs as people write them, "2x24GB,1xl4", with slashes between nodes, and what a size is taken for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from planner.errors import InputError
from planner.hardware import MAX_GPUS, MAX_NODES, products
from planner.products import Product, catalogue, find, product, unknown
from planner.units import GB, format_bytes, parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU of a node. product: a key of the catalogue; rates that are None are the product's."""

    capacity_bytes: int
    product: str
    half_flops_per_s: int | None = None
    bytes_per_s: int | None = None
    host_bytes_per_s: int | None = None

    @property
    def facts(self) -> Product:
        return catalogue()[self.product]

    @property
    def pcie_bytes_per_s(self) -> int:
        return self.host_bytes_per_s or self.facts.host_bytes_per_s


def parse_nodes(text: str | int) -> list[tuple[tuple[Gpu, ...], tuple[str, ...]]]:
    """Return (GPUs, what is assumed of them) of each node of "4x80GB/2x24GB", "8*(4x80GB)" or "2x24GB,1xl4"."""
    nodes: list[tuple[tuple[Gpu, ...], tuple[str, ...]]] = []
    parts = str(text).split("/")
    for part in parts:
        match = re.fullmatch(r"\s*([0-9]+)\s*\*\s*(?:\((.*)\)|(.*[^)\s]))\s*", part)
        count, inner = (1, part) if match is None else (int(match[1]), match[2] or match[3])
        if not 1 <= count <= MAX_NODES:
            raise InputError(f"--gpus {text}: {count} nodes cannot be planned for; give 1 to {MAX_NODES}")
        if len(parts) * count > 1 and not (inner or "").strip():
            raise InputError(_gpus_help(text))
        notes: list[str] = []
        nodes += [(tuple(parse_gpus(inner or "", text, notes)), tuple(dict.fromkeys(notes)))] * count
    total = sum(len(gpus) for gpus, _ in nodes)
    if total > MAX_GPUS or len(nodes) > MAX_NODES:
        raise InputError(
            f"--gpus {text}: {total} GPUs in {len(nodes)} nodes; at most {MAX_GPUS} GPUs in {MAX_NODES} nodes are "
            "carried"
        )
    return nodes


def parse_gpus(part_of: str, text: str | int, notes: list[str]) -> list[Gpu]:
    """Return the GPUs of one node, `part_of` the `text` that was given; what is assumed goes to `notes`."""
    if part_of.strip() in ("0", "none", ""):
        return []
    found: list[Gpu] = []
    for part in part_of.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)\s*[x\u00d7]\s*)?(\S+)\s*", part, flags=re.IGNORECASE)
        if match is None:
            raise InputError(_gpus_help(text))
        count = int(match[1]) if match[1] is not None else 1
        if not 1 <= count <= MAX_GPUS:
            raise InputError(f"--gpus {text}: {count} GPUs cannot be planned for; give 1 to {MAX_GPUS}, or --gpus 0")
        found += [_one_gpu(match[2], text, notes)] * count
    return found


def _one_gpu(word: str, text: str | int, notes: list[str]) -> Gpu:
    if find(word) is not None:
        try:
            facts = product(word)
        except InputError as exc:
            raise InputError(f"--gpus {text}: {exc}") from exc
        notes += [f"GPU {facts.name}: {facts.usable_gib} GiB usable", *facts.notes()]
        return Gpu(capacity_bytes=facts.usable_bytes, product=facts.key)
    if not re.match(r"[\d.]", word):
        raise InputError(f"--gpus {text}: {unknown(word)}; or write a size such as 24GB")
    try:
        capacity = parse_bytes(word if re.search(r"[a-zA-Z]", word) else "", what="--gpus")
    except InputError as exc:
        raise InputError(_gpus_help(text)) from exc
    if capacity == 0:
        raise InputError(f"--gpus {text}: a GPU with no memory; write --gpus 0 to plan without GPUs")
    return Gpu(capacity_bytes=capacity, product=taken_for(capacity, notes))


def taken_for(capacity_bytes: int, notes: list[str]) -> str:
    """Return the product that a GPU of a size is taken for."""
    table = products()["assumed_for_gb"]
    size = min(table, key=lambda gb: (abs(int(gb) * GB - capacity_bytes), int(gb)))
    facts = catalogue()[table[size]]
    notes.append(
        f"GPU of {format_bytes(capacity_bytes)} taken as {facts.name} (assumed; usable there "
        f"{format_bytes(facts.usable_bytes)}): {facts.half_tflops:.0f} TFLOP/s and "
        f"{facts.memory_gb_per_s:.0f} GB/s on its datasheet, "
        f"{facts.achieved.matmul:.0%} and {facts.achieved.bandwidth:.0%} achieved"
    )
    return facts.key


def _gpus_help(text: str | int) -> str:
    return (
        f"--gpus {text}: write COUNTxSIZE such as 2x24GB, COUNTxPRODUCT such as 2xrtx4090, or 0; several nodes as "
        "4x80GB/4x80GB or 8*(4x80GB); plan gpus lists the products"
    )
