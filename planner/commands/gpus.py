"""`plan gpus`: the products of the catalogue, all, some, or one with every figure and its source."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from planner.commands import options
from planner.commands.layout import Page
from planner.errors import InputError
from planner.hardware import NVLINK_FRACTION, PCIE_BYTES_PER_S, products
from planner.hosts import disk_rate, hosts
from planner.products import Product, catalogue, find, unknown
from planner.units import GB

_LABEL = 14


def run(argv: Sequence[str]) -> int:
    """Print the known products with the facts that plans use, or one of them with where each figure comes from."""
    parser = options.Parser(prog="plan gpus", description="List the GPU products that --gpus knows.")
    parser.add_argument("text", nargs="?", default="", help="a product, or a text in the names of some")
    parser.add_argument("--hosts", action="store_true", help="list hosts, links and disks instead of GPUs")
    options.add_output_options(parser)
    args = parser.parse_args(argv)
    if args.hosts:
        return _hosts(args)
    one = find(args.text)
    found = [one] if one is not None else [each for each in catalogue().values() if _matches(each, args.text)]
    if not found:
        raise InputError(unknown(args.text))
    if args.json:
        options.say_json(json.dumps({each.key: _facts(each) for each in found}, indent=1))
        return 0
    page = Page(color=False)
    if one is not None:
        _details(page, one)
    else:
        _table(page, found)
    options.say(page.text().lstrip("\n"))
    return 0


def _matches(each: Product, text: str) -> bool:
    return any(text.lower() in word.lower() for word in (each.key, each.name))


def _facts(each: Product) -> dict[str, Any]:
    """Return everything of a product as JSON-ready data: peaks, and what plans take of them."""
    facts = dataclasses.asdict(each)
    del facts["key"], facts["maker"]
    if each.refused is None:
        facts["planned"] = {
            "capacity_bytes": each.usable_bytes,
            "flops_per_s": each.flops_per_s(),
            "bytes_per_s": each.bytes_per_s,
            "host_bytes_per_s": each.host_bytes_per_s,
        }
    return facts


def _table(page: Page, found: Iterable[Product]) -> None:
    taken: dict[str, list[str]] = {}
    for size, key in products()["assumed_for_gb"].items():
        taken.setdefault(key, []).append(f"{size}GB")
    rows = list(found)
    for refused in (False, True):
        group = [each for each in rows if (each.refused is not None) == refused]
        if not group:
            continue
        if refused:
            page.heading("Known, and not planned for (plan gpus NAME says why)")
        else:
            page.line(f"{'':48}   usable   16-bit         taken")
            page.line(f"{'--gpus':14}  {'product':32}       GB  TFLOP/s   GB/s  for")
        for each in group:
            page.line(
                f"{each.key:14}  {_bare(each):32}  {each.usable_bytes / GB:7.2f}  {each.half_tflops:7.0f}  "
                f"{each.memory_gb_per_s:5.0f}  {', '.join(taken.get(each.key, ()))}"
            )
    page.line()
    page.paragraph(
        "TFLOP/s (dense, 16 bit) and GB/s of memory are peaks of datasheets, of which plans take a part; "
        "plan gpus NAME prints it, every other figure, and the sources. plan gpus --hosts lists hosts, links and disks."
    )


def _hosts(args: argparse.Namespace) -> int:
    """Print hosts, links and disks: peaks, and what is achieved of them."""
    data = products()
    if args.text:
        raise InputError("--hosts lists all hosts; leave the name out")
    if args.json:
        sections = ("hosts", "links", "disks", "host_achieved")
        options.say_json(json.dumps({name: data[name] for name in sections}, indent=1))
        return 0
    page = Page(color=False)
    page.line("--host                 memory                   GB/s  achieved  PCIe")
    for each in hosts().values():
        memory = f"{each.channels}x{each.memory}-{each.mega_transfers_per_s}"
        rates = f"{each.peak_bytes_per_s / GB:7.1f}  {each.bytes_per_s / GB:8.1f}"
        page.line(f"{each.key:21}  {memory:20}  {rates}  {each.pcie:4}")
    page.line()
    page.line("--disk-speed                                    GB/s  achieved")
    for key, disk in data["disks"].items():
        achieved = disk_rate(key, what="--disk-speed") / GB
        page.line(f"{key:21}  {'':20}  {disk['peak_gb_per_s']:7.2f}  {achieved:8.2f}")
    page.line()
    page.line("links, each way                                 GB/s  achieved")
    for key, link in data["links"].items():
        peak = link["peak_gb_per_s"]
        pcie = PCIE_BYTES_PER_S.get(int(key[-1])) if key.startswith("pcie") else None
        achieved = peak * NVLINK_FRACTION if pcie is None else pcie / GB
        page.line(f"{key:21}  {'one link' if pcie is None else '16 lanes':20}  {peak:7.2f}  {achieved:8.2f}")
    page.heading("Sources")
    for key, source in _host_sources(data):
        _say(page, key, source)
    options.say(page.text().lstrip("\n"))
    return 0


def _host_sources(data: dict[str, Any]) -> list[tuple[str, str]]:
    told: dict[str, list[str]] = {}
    for section in ("hosts", "disks", "links"):
        for key, entry in data[section].items():
            told.setdefault(entry["source"], []).append(key if section == "hosts" else section)
    for key, entry in data["host_achieved"].items():
        told.setdefault(entry["source"], []).append(f"of {key}")
    return [("", f"{', '.join(dict.fromkeys(keys))}: {source}") for source, keys in told.items()]


def _bare(each: Product) -> str:
    return each.name.removesuffix(f" {each.label_gb}GB")


def _details(page: Page, each: Product) -> None:
    page.line(f"{each.name} (--gpus {each.key})" if each.refused is None else f"{each.name} ({each.key})")
    if each.refused is not None:
        _say(page, "refused", f"cannot be planned for: {each.refused}")
    _say(page, "usable", f"{each.usable_gib} GiB ({each.usable_bytes / GB:.2f} GB)")
    page.heading("Peaks of the datasheet, dense")
    rates = ", ".join(f"{dtype} {rate:g}" for dtype, rate in each.peak_tflops.items())
    _say(page, "TFLOP/s", f"{rates}{' (TOP/s)' if 'int8' in each.peak_tflops else ''}")
    _say(page, "memory", f"{each.memory_gb_per_s:g} GB/s")
    if each.units is not None:
        units = each.units
        _say(
            page, "fp32", f"{units.count} units x {units.lanes} lanes x 2 x {units.clock_mhz} MHz = "
            f"{units.fp32_tflops:.1f} TFLOP/s",
        )  # fmt: skip
    if each.refused is None:
        _planned(page, each)
    page.heading("Sources")
    told: dict[str, list[str]] = {}
    for what, source in each.sources.items():
        told.setdefault(source, []).append(what)
    for source, whats in told.items():
        _say(page, ", ".join(whats), source)
    if each.refused is None:
        _say(page, "achieved", each.achieved.source)
        if each.host_link is not None:
            _say(page, "host", each.host_link.source)


def _planned(page: Page, each: Product) -> None:
    page.heading("What plans take")
    flops = ", ".join(f"{dtype} {rate / 1e12:.1f}" for dtype, rate in each.flops_per_s().items())
    _say(page, "TFLOP/s", f"{flops} ({each.achieved.matmul:.0%} achieved)")
    _say(page, "memory", f"{each.bytes_per_s / GB:.0f} GB/s ({each.achieved.bandwidth:.0%} achieved)")
    way = each.host_link.name if each.host_link is not None else f"PCIe {each.pcie}, {each.pcie_lanes} lanes"
    _say(page, "host", f"{each.host_bytes_per_s / GB:.1f} GB/s over {way}")
    if each.nvlink is not None:
        joins = "all of a node" if each.nvlink.joins == "all" else "pairs"
        _say(
            page, "NVLink", f"{each.nvlink.gb_per_s:g} GB/s each way on the datasheet, joining {joins}; "
            f"{NVLINK_FRACTION:.0%} achieved (--links nvlink)",
        )  # fmt: skip
    for note in each.notes():
        _say(page, "assumed", note)


def _say(page: Page, label: str, text: str) -> None:
    page.paragraph(text, first=f"  {label:{_LABEL}}" if label else "  - ")
