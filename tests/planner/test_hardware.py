"""Machines: several nodes, their links and lanes, files that describe them, and the options of the command.

What one node's GPUs, sizes and caps are is in test_values.py.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner import hardware as values
from planner.commands import options
from planner.commands.main import main
from planner.errors import InputError, PlanFormatError
from planner.hardware import Hardware, Link, Shared, products
from planner.serial import canonical, decode
from planner.units import parse_flops, parse_rate

PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DOCS = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```json\n(.*?)```", DOCS, flags=re.DOTALL)
PRODUCTS = products()["products"]
GBPS = 10**9

MACHINES: dict[str, dict[str, Any]] = {
    "cpu": {},
    "one": {"gpus": "2x24GB", "pinned": "8GB"},
    "nvlink": {"gpus": "4xh100", "links": "nvlink", "gpus_per_switch": 2},
    "bridge": {"gpus": "5xrtx3090,1xt4", "links": "nvlink"},
    "p2p": {"gpus": "1xl4,2xt4", "links": "p2p"},
    "nodes": {"gpus": "2xh100/3x24GB,1xt4/0", "links": "nvlink", "network": "100Gbit/s", "gpus_per_switch": 3},
    "capped": {"gpus": "2*(2x24GB)", "max_memory": {"node1/cuda:0": "10GB", "disk": "1GB", "pinned": "4GB"}},
}


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> Hardware:
    return Hardware.from_options(**MACHINES[request.param])


def write(folder: Path, data: object) -> Path:
    path = folder / "machine.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


# Rates as people write them


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("12.5GB/s", 12_500_000_000), ("12.5GB", 12_500_000_000), ("100Gbit/s", 12_500_000_000),
        ("100Gbit", 12_500_000_000), ("1GiB/s", 2**30), (" 3 MB/s ", 3_000_000), ("1B", 1), (7, 7),
    ],
)  # fmt: skip
def test_rates(text: str | int, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["100Gb", "100gb", "100Gbps", "12.5", "GB/s", "-1GB/s", "0GB/s", "1GB/h", "", 0, -1, True, None, 1.5]
)
def test_hostile_rates(text: Any) -> None:
    with pytest.raises(InputError, match=r"^network must be"):
        parse_rate(text, what="network")


@pytest.mark.parametrize(
    ("text", "rate"),
    [("2TFLOP/s", 2 * 10**12), ("1.5TFLOPS", 15 * 10**11), ("500G", 5 * 10**11), ("1P", 10**15), (9, 9)],
)
def test_flops(text: str | int, rate: int) -> None:
    assert parse_flops(text) == rate


@pytest.mark.parametrize("text", ["2", "2TB/s", "fast", "-1T", "0T", "", 0, True, None, 2.0])
def test_hostile_flops(text: Any) -> None:
    with pytest.raises(InputError, match=r"^cpu must be"):
        parse_flops(text, what="cpu")


# Names


@PROPERTY
@given(st.lists(st.lists(st.sampled_from(["24GB", "80GB", "l4"]), max_size=4), min_size=2, max_size=8))
def test_nodes_are_named_in_order(nodes: list[list[str]]) -> None:
    hardware = Hardware.from_options("/".join(",".join(node) or "0" for node in nodes))
    devices, pools = [], []
    for number, node in enumerate(nodes):
        gpus = [f"node{number}/cuda:{i}" for i in range(len(node))]
        devices += [*gpus, f"node{number}/cpu"]
        pools += [*gpus, f"node{number}/cpu", f"node{number}/disk"]
    assert [device.name for device in hardware.devices] == devices
    assert [device.pool for device in hardware.devices] == devices
    assert [pool.name for pool in hardware.pools] == pools
    assert hardware.nodes == tuple(f"node{number}" for number in range(len(nodes)))
    assert [host.name for host in hardware.hosts] == [f"{node}/cpu" for node in hardware.nodes]
    assert len(hardware.gpus) == sum(map(len, nodes))
    for name in pools:
        node, _, _ = name.partition("/")
        assert (hardware.node(name), hardware.host(name), hardware.disk(name)) == (node, f"{node}/cpu", f"{node}/disk")


def test_one_node_has_no_name() -> None:
    for gpus in ("2x24GB", "1*(2x24GB)", "1 * 2x24GB"):
        hardware = Hardware.from_options(gpus)
        assert hardware == Hardware.from_options("2x24GB")
    assert [device.name for device in hardware.devices] == ["cuda:0", "cuda:1", "cpu"]
    assert (hardware.node("cuda:1"), hardware.host("cuda:1"), hardware.disk("cuda:1")) == ("", "cpu", "disk")
    assert hardware.nodes == ("",)


@pytest.mark.parametrize("gpus", ["8*(4x80GB)", "8*4x80GB", "/".join(["4x80GB"] * 8), "4x80GB/7*(2x80GB,2x80GB)"])
def test_repeated_nodes_are_nodes(gpus: str) -> None:
    assert Hardware.from_options(gpus).devices == Hardware.from_options("2*(4x80GB)/6*4x80GB").devices


@pytest.mark.parametrize(
    "gpus",
    ["2x24GB/", "/2x24GB", "/", "2x24GB//1xl4", "0*(2x24GB)", "65*(1x1GB)", "9*(8x80GB)", "8*(8x80GB)/1x24GB",
     "99999999999*(0)", "2*(2x24GB", "2*2x24GB)", "2*()", "*(2x24GB)", "2*(2x24GB/1xl4)", "-2*(2x24GB)", "2*3*1x24GB"],
)  # fmt: skip
def test_hostile_nodes_are_refused(gpus: str) -> None:
    with pytest.raises(InputError, match="--gpus"):
        Hardware.from_options(gpus)


@PROPERTY
@given(st.text(alphabet="0123*()/x, GBl4", max_size=15))
def test_any_nodes_are_read_or_an_input_error(text: str) -> None:
    try:
        hardware = Hardware.from_options(text)
    except InputError:
        return
    assert len(hardware.gpus) <= 64
    assert 1 <= len(hardware.nodes) <= 64


@pytest.mark.parametrize("name", ["cuda:7", "tpu", ""])
def test_what_is_not_there_is_a_key_error(machine: Hardware, name: str) -> None:
    for ask in (machine.device, machine.pool, lambda name: machine.link("cpu", name)):
        with pytest.raises(KeyError):
            ask(name)


def test_names_give_back_what_they_name(machine: Hardware) -> None:
    assert [machine.device(device.name) for device in machine.devices] == list(machine.devices)
    assert [machine.pool(pool.name) for pool in machine.pools] == list(machine.pools)
    assert [machine.link(link.source, link.target) for link in machine.links] == list(machine.links)


# Links


def steps_between(hardware: Hardware, source: str, target: str) -> list[Link]:
    """Return the links of the fewest steps from one device to another, by searching all ways over devices."""
    known = {(link.source, link.target): link for link in hardware.links}
    names = [device.name for device in hardware.devices]
    front: list[tuple[str, ...]] = [(source,)]
    for _ in range(4):
        found = [way for way in front if way[-1] == target]
        if found:
            assert len(found) == 1, "the way must be the only one as short"
            return [known[pair] for pair in itertools.pairwise(found[0])]
        front = [(*way, name) for way in front for name in names if (way[-1], name) in known and name not in way]
    raise AssertionError(f"no way from {source} to {target}")


def test_every_device_reaches_every_other_by_the_shortest_way(machine: Hardware) -> None:
    for source, target in itertools.permutations([device.name for device in machine.devices], 2):
        steps, link = steps_between(machine, source, target), machine.link(source, target)
        assert (link.source, link.target) == (source, target)
        assert link.bytes_per_s == min(step.bytes_per_s for step in steps)
        assert link.latency_ns == sum(step.latency_ns for step in steps)
        if machine.node(source) != machine.node(target):
            assert link.lane == f"{machine.node(source)}→network copy"
        else:
            assert steps == [link]


def test_disks_are_read_in_their_own_node_alone() -> None:
    hardware = Hardware.from_options("2*(1x24GB)")
    assert hardware.link("node1/disk", "node1/cpu").bytes_per_s == values.DISK_BYTES_PER_S
    for target in ("node0/cpu", "node0/cuda:0", "node1/cuda:0"):
        with pytest.raises(KeyError):
            hardware.link("node1/disk", target)


def test_within_a_node_only_links_join() -> None:
    hardware = Hardware.from_options("2*(2x24GB)")
    missing = ("node0/cuda:0", "node0/cuda:1")
    links = tuple(link for link in hardware.links if (link.source, link.target) != missing)
    other = Hardware(devices=hardware.devices, pools=hardware.pools, links=links)
    for ends in (missing, ("node0/cuda:0", "node0/cuda:0")):
        with pytest.raises(KeyError, match="no link from node0/cuda:0"):
            other.link(*ends)


def test_the_order_of_links_is_nothing() -> None:
    hardware = Hardware.from_options("2xh100/2x24GB", links="nvlink")
    for seed in range(3):
        links = random.Random(seed).sample(hardware.links, len(hardware.links))
        other = Hardware(devices=hardware.devices, pools=hardware.pools, links=tuple(links))
        for source, target in itertools.permutations([device.name for device in hardware.devices], 2):
            assert other.link(source, target) == hardware.link(source, target)


def test_a_link_of_its_own_between_nodes_wins() -> None:
    hardware = Hardware.from_options("2*(1xh100)")
    direct = Link(source="node0/cuda:0", target="node1/cuda:0", bytes_per_s=40 * GBPS, latency_ns=5)
    other = Hardware(devices=hardware.devices, pools=hardware.pools, links=(*hardware.links, direct))
    other.check()
    assert other.link("node0/cuda:0", "node1/cuda:0") == direct
    assert other.link("node1/cuda:0", "node0/cuda:0") == hardware.link("node1/cuda:0", "node0/cuda:0")


def test_asking_changes_nothing() -> None:
    asked, other = Hardware.from_options("2*(2x24GB)"), Hardware.from_options("2*(2x24GB)")
    asked.link("node0/cuda:0", "node1/cuda:1")
    assert asked == other
    assert canonical(asked) == canonical(other)


@pytest.mark.parametrize("product", sorted(PRODUCTS))
def test_ways_between_two_gpus_of_a_product(product: str) -> None:
    facts = PRODUCTS[product]
    pcie = {3: 12.4, 4: 22.5, 5: 51.0}[facts["pcie"]] * GBPS * facts.get("pcie_lanes", 16) / 16
    if "host_link" in facts:
        pcie = facts["host_link"]["achieved_gb_per_s"] * GBPS
    rates = {"host": pcie / 2, "p2p": pcie}
    if "nvlink" in facts:
        rates["nvlink"] = facts["nvlink"]["gb_per_s"] * GBPS * 0.83
    else:
        with pytest.raises(InputError, match=r"--links nvlink: no two of .* can be joined by NVLink"):
            Hardware.from_options(f"2x{product}", links="nvlink")
    for way, rate in rates.items():
        hardware = Hardware.from_options(f"2x{product}", links=way)
        for source, target in (("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")):
            link = hardware.link(source, target)
            assert link.bytes_per_s == pytest.approx(rate, rel=1e-9)
            assert link.latency_ns == (20_000 if way == "host" else 10_000)
        assert hardware.link("cpu", "cuda:0").bytes_per_s == pcie


def test_nvlink_is_as_fast_as_datasheets_say() -> None:
    """Both ways together, as vendors print it: A100 600, H100 and H200 900, B200 and B300 1800, bridges of Ampere
    112.5 (A30 200), of Turing 100 (RTX 2080 50), of Hopper's cards 600.
    """
    printed = {"a100-40gb": 600, "a100-80gb": 600, "h100": 900, "h200": 900, "rtx3090": 112.5, "a5000": 112.5,
               "a6000": 112.5, "titanrtx": 100, "v100-16gb": 100, "v100-32gb": 100,
               "rtx2080": 50, "rtx2080ti": 100, "rtx3090ti": 112.5, "a30": 200, "a40": 112.5,
               "h100-pcie": 600, "h100-nvl": 600, "b200": 1800, "b300": 1800}  # fmt: skip
    assert {key: 2 * facts["nvlink"]["gb_per_s"] for key, facts in PRODUCTS.items() if "nvlink" in facts} == printed


def fast_pairs(hardware: Hardware) -> set[tuple[int, int]]:
    names = [gpu.name for gpu in hardware.gpus]
    pairs = itertools.combinations(range(len(names)), 2)
    return {(i, j) for i, j in pairs if hardware.link(names[i], names[j]).latency_ns == values.COPY_LATENCY_NS}


@pytest.mark.parametrize(
    ("gpus", "pairs"),
    [
        ("4xh100", {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}),
        ("4xrtx3090", {(0, 1), (2, 3)}),
        ("5xa6000", {(0, 1), (2, 3)}),
        ("1xrtx3090,1xt4,2xrtx3090", {(0, 2)}),
        ("1xh100,2xh200", {(1, 2)}),
        ("2x80GB", {(0, 1)}),
        ("1xt4", set()),
        ("2xh100/2xt4", {(0, 1)}),
    ],
)
def test_which_gpus_nvlink_joins(gpus: str, pairs: set[tuple[int, int]]) -> None:
    hardware = Hardware.from_options(gpus, links="nvlink")
    assert fast_pairs(hardware) == pairs
    if len(hardware.nodes) > 1:
        return
    total = len(hardware.gpus) * (len(hardware.gpus) - 1) // 2
    said = any(f"for {len(pairs)} of {total} pairs" in note for note in hardware.assumptions)
    assert said == (0 < len(pairs) < total)


def test_links_must_be_known() -> None:
    with pytest.raises(InputError, match="--links must be one of host, p2p, nvlink"):
        Hardware.from_options("2x24GB", links="infiniband")
    with pytest.raises(InputError, match="--gpus-per-switch"):
        Hardware.from_options("2x24GB", gpus_per_switch=0)


@pytest.mark.parametrize("each", [1, 2, 3, 4, 9])
def test_gpus_behind_one_switch_share_a_lane_each_way(each: int) -> None:
    hardware = Hardware.from_options("5x24GB/2x24GB", gpus_per_switch=each)
    for ends in (("host", "gpu"), ("gpu", "host")):
        lanes: dict[str | None, list[str]] = {}
        for gpu in hardware.gpus:
            host = hardware.host(gpu.name)
            link = hardware.link(host, gpu.name) if ends == ("host", "gpu") else hardware.link(gpu.name, host)
            lanes.setdefault(link.lane, []).append(gpu.name)
        if each == 1:
            assert set(lanes) == {None}
            continue
        assert None not in lanes
        wanted = [
            [f"node{node}/cuda:{i}" for i in range(first, min(first + each, count))]
            for node, count in enumerate((5, 2))
            for first in range(0, count, each)
        ]
        assert list(lanes.values()) == wanted
    into = {link.lane for link in hardware.links if link.source == "node0/cpu" and "cuda" in link.target}
    out = {link.lane for link in hardware.links if link.target == "node0/cpu" and "cuda" in link.source}
    assert each == 1 or not into & out


def test_the_network_is_as_fast_as_said() -> None:
    hardware = Hardware.from_options("2xh100/2xt4", network="100Gbit/s")
    assert hardware.link("node0/cpu", "node1/cpu").bytes_per_s == 12_500_000_000
    # A T4's PCIe 3 is slower than the network.
    assert hardware.link("node0/cuda:0", "node1/cuda:1").bytes_per_s == 12_400_000_000
    assert any("12.50 GB/s out of each node, shared by all it sends, " in note for note in hardware.assumptions)
    assumed = Hardware.from_options("1x24GB/1x24GB")
    assert any("11.25 GB/s out of each node, shared by all it sends (assumed)" in note for note in assumed.assumptions)
    with pytest.raises(InputError, match="one"):
        Hardware.from_options("2x24GB", network="100Gbit/s")


# The host


def test_the_host_is_as_said_on_every_node() -> None:
    said = {"ram": "64GB", "disk": "2TB", "disk_speed": "7GB/s", "cpu_flops": "2TFLOP/s", "cpu_bandwidth": "200GB/s"}
    hardware = Hardware.from_options("1x24GB/1x24GB", **said, pinned="16GB")
    for host in hardware.hosts:
        assert (host.bytes_per_s, host.flops_for("bfloat16")) == (200 * GBPS, 2 * 10**12)
        assert hardware.pool(host.pool).capacity_bytes == 64 * GBPS
        assert hardware.pool(hardware.disk(host.name)).capacity_bytes == 2 * 10**12
        assert hardware.link(hardware.disk(host.name), host.name).bytes_per_s == 7 * GBPS
    assert hardware.pinned_limit_bytes == 16 * GBPS
    text = "\n".join(hardware.assumptions)
    assert "64.00 GB, of" in text
    assert "disk 2.00 TB, read at 7.0 GB/s\n" in text
    assert "CPU: 200 GB/s from memory, 2.0 TFLOP/s\n" in text


def test_each_thing_not_said_about_the_host_is_assumed() -> None:
    def notes(**said: str) -> str:
        return "\n".join(Hardware.from_options("1x24GB", **said).assumptions)  # type: ignore[arg-type]

    assert "60 GB/s from memory (assumed), 2.0 TFLOP/s\n" in notes(cpu_flops="2TFLOP/s")
    assert "80 GB/s from memory, 1.0 TFLOP/s (assumed)\n" in notes(cpu_bandwidth="80GB/s")
    assert "disk 1.00 TB (assumed), read at 7.0 GB/s\n" in notes(disk_speed="7GB/s")
    assert "65% of the rate from pinned memory (assumed)" in notes()


@pytest.mark.parametrize(
    ("option", "value"),
    [("disk_speed", "0GB/s"), ("disk_speed", "7Gb"), ("cpu_flops", "2TB"), ("cpu_bandwidth", "-1GB/s"),
     ("network", "100"), ("pinned", "much"), ("pinned", -1), ("ram", "0GB")],
)  # fmt: skip
def test_hostile_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')} must"):
        Hardware.from_options("1x24GB/1x24GB", **{option: value})


def test_alike_notes_stand_once_and_others_name_their_nodes() -> None:
    notes = Hardware.from_options("1x24GB/1xl4/1xl4").assumptions
    assert len(notes) == len(set(notes))
    assert "node1, node2: GPU NVIDIA L4 24GB: 22.03 GiB usable" in notes
    assert any(note.startswith("node0: GPU of 24.00 GB taken as") for note in notes)
    assert any(note.startswith("host RAM 128.0 GB") for note in notes)


# Caps


def test_caps_of_nodes() -> None:
    caps = {"node1/cuda:0": "10GB", "cpu": "64GB", "node0/cpu": "32GB", 1: "20GB", "pinned": "8GB"}
    hardware = Hardware.from_options("2*(2x24GB)", max_memory=caps)  # type: ignore[arg-type]
    assert {pool.name: pool.capacity_bytes // GBPS for pool in hardware.pools} == {
        "node0/cuda:0": 24, "node0/cuda:1": 20, "node0/cpu": 32, "node0/disk": 1000,
        "node1/cuda:0": 10, "node1/cuda:1": 20, "node1/cpu": 64, "node1/disk": 1000,
    }  # fmt: skip
    assert all(hardware.pool(host.pool).reserved_bytes == 0 for host in hardware.hosts)
    assert hardware.pinned_limit_bytes == 8 * GBPS


@pytest.mark.parametrize("name", ["node2/cuda:0", "node0/cuda:2", "cuda:2", "node0", "node0/", "/cpu", "node0/pinned"])
def test_caps_of_what_no_node_has_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="max_memory names"):
        Hardware.from_options("2*(2x24GB)", max_memory={name: "1GB"})


def test_a_message_lists_few_of_many_names() -> None:
    with pytest.raises(InputError) as caught:
        Hardware.from_options("8*(8x80GB)", max_memory={"tpu": "1GB"})
    assert "(81 in all)" in str(caught.value)
    assert len(str(caught.value)) < 400


# Files


def test_a_saved_machine_loads_as_it_was(machine: Hardware, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    machine.save(path)
    assert Hardware.load(path) == machine
    assert path.read_text(encoding="utf-8") == canonical(machine)
    assert decode(Hardware, json.loads(canonical(machine))) == machine


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({}, {"gpus": 0}),
        ({"gpus": "2x24GB,1xl4"}, {"gpus": "2x24GB,1xl4"}),
        ({"gpus": ["2x24GB", "1xl4"], "ram": 64 * GBPS, "pinned": "8GB"},
         {"gpus": "2x24GB,1xl4", "ram": "64GB", "pinned": "8GB"}),
        ({"nodes": [{"gpus": "2x24GB"}]}, {"gpus": "2x24GB"}),
        ({"nodes": [{"gpus": "4xh100", "count": 2, "links": "nvlink", "ram": "1TB", "disk": "2TB",
                     "disk_speed": "7GB/s", "cpu_flops": "2TFLOPS", "cpu_bandwidth": "200GB/s",
                     "switches": [[0, 1], [2, 3]]}], "network": "100Gbit/s"},
         {"gpus": "2*(4xh100)", "links": "nvlink", "ram": "1TB", "disk": "2TB", "disk_speed": "7GB/s",
          "cpu_flops": "2TFLOPS", "cpu_bandwidth": "200GB/s", "gpus_per_switch": 2, "network": "100Gbit/s"}),
        ({"gpus": [{"product": "h100", "count": 2}, {"memory": "24GB"}], "links": "p2p"},
         {"gpus": "2xh100,24GB", "links": "p2p"}),
    ],
)  # fmt: skip
def test_a_description_is_what_the_options_say(described: dict[str, Any], said: dict[str, Any], tmp_path: Path) -> None:
    found, wanted = Hardware.load(write(tmp_path, described)), Hardware.from_options(**said)
    for field in ("devices", "pools", "links", "pinned_limit_bytes", "pageable_fraction"):
        assert getattr(found, field) == getattr(wanted, field)


def test_what_only_files_say(tmp_path: Path) -> None:
    gpu = {"product": "l4", "memory": "20GiB", "flops": "100TFLOP/s", "bandwidth": "250GB/s", "host_link": "6GB/s"}
    data = {
        "nodes": [{"gpus": [gpu, "1xl4"], "gpu_links": [{"gpus": [1, 0], "rate": "15GB/s"}]}, {"gpus": "1xt4"}],
        "network_latency_ns": 1234,
        "pageable_fraction": 0.5,
    }
    hardware = Hardware.load(write(tmp_path, data))
    first, second = hardware.device("node0/cuda:0"), hardware.device("node0/cuda:1")
    assert (first.product, first.bytes_per_s) == (second.product, 250 * GBPS)
    assert (first.flops_for("float16"), first.flops_for("float32")) == (100 * 10**12, second.flops_for("float32"))
    assert hardware.pool("node0/cuda:0").capacity_bytes == 20 * 2**30
    assert hardware.link("node0/cpu", "node0/cuda:0").bytes_per_s == 6 * GBPS
    for ends in (("node0/cuda:0", "node0/cuda:1"), ("node0/cuda:1", "node0/cuda:0")):
        assert hardware.link(*ends).bytes_per_s == 15 * GBPS
    assert hardware.link("node0/cpu", "node1/cpu").latency_ns == 1234
    assert hardware.pageable_fraction == 0.5
    assert any("50% of the rate" in note and "assumed" not in note for note in hardware.assumptions)


def test_the_documented_examples_load(tmp_path: Path) -> None:
    one, several = (Hardware.load(write(tmp_path, text)) for text in EXAMPLES)
    assert [gpu.product for gpu in one.gpus][:2] == [PRODUCTS["rtx3090"]["name"]] * 2
    assert one.link("cpu", "cuda:1").lane == one.link("cpu", "cuda:2").lane is not None
    assert one.link("cpu", "cuda:0").lane is None
    assert fast_pairs(one) == {(0, 1)}
    assert several.nodes == ("node0", "node1", "node2")
    assert len(several.gpus) == 10
    assert several.pinned_limit_bytes == 256 * GBPS


def test_the_documented_keys_are_those_that_are_read(tmp_path: Path) -> None:
    tables = [
        set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?`) \|", table, flags=re.MULTILINE))))
        for table in re.split(r"\n(?:Of the machine|Of a node|Of a GPU in a list)", DOCS)[1:]
    ]
    known = []
    for data in (
        {"nodes": [{}], "odd": 1},
        {"nodes": [{"odd": 1}]},
        {"nodes": [{"gpus": [{"memory": "8GB", "odd": 1}]}]},
    ):
        with pytest.raises(InputError, match="unknown odd; known are ") as caught:
            Hardware.load(write(tmp_path, data))
        known.append(set(str(caught.value).rpartition("known are ")[2].split(", ")))
    assert tables == known


def test_the_documented_options_are_those_of_the_command() -> None:
    parser = argparse.ArgumentParser()
    options.add_machine_options(parser)
    known = {word for action in parser._actions for word in action.option_strings} - {"-h", "--help"}
    table = DOCS.partition("## Options")[2].partition("\n\nA size")[0]
    assert set(re.findall(r"`(--[a-z-]+)", table)) == known


# Files that cannot be


DESCRIPTIONS: list[tuple[Any, str]] = [
    ("", "not JSON"),
    ("{", "not JSON"),
    ("[" * 100_000, "not a description"),
    ('{"ram": ' + "9" * 5000 + "}", "not a description"),
    ('{"ram": "1GB", "ram": "2GB"}', "'ram' stands twice"),
    ([], "must be an object, and is list"),
    (None, "must be an object, and is null"),
    ({"gpu": "2x24GB"}, "unknown gpu; known are .*gpus"),
    ({"count": 2}, "unknown count"),
    ({"nodes": [{}], "gpus": "2x24GB"}, "unknown gpus"),
    ({"nodes": []}, "nodes is empty"),
    ({"nodes": {}}, "nodes must be a list"),
    ({"nodes": [3]}, r"nodes\[0\] must be an object, and is int"),
    ({"nodes": [{"count": 0}]}, r"nodes\[0\].count must be a whole number of at least 1"),
    ({"nodes": [{"count": 65}]}, "at most 64"),
    ({"nodes": [{"count": 64}, {}]}, "65 nodes"),
    ({"nodes": [{"gpus": "8x80GB", "count": 9}]}, "72 GPUs"),
    ({"gpus": "2x24GB/2x24GB"}, 'list them under "nodes"'),
    ({"gpus": 2}, "gpus must be a list"),
    ({"gpus": True}, "gpus must be a list"),
    ({"gpus": "2xvoodoo"}, "--gpus 2xvoodoo"),
    ({"gpus": [3]}, r"gpus\[0\] must be an object"),
    ({"gpus": [{}]}, r"gpus\[0\] must have a product, or a memory"),
    ({"gpus": [{"memory": 0}]}, "more than nothing"),
    ({"gpus": [{"product": "voodoo"}]}, "'voodoo' is not known"),
    ({"gpus": [{"product": ["l4"]}]}, "is not known"),
    ({"gpus": [{"product": "l4", "count": 65}]}, "at most 64"),
    ({"gpus": [{"product": "l4", "flops": "0T"}]}, "flops must be more than nothing"),
    ({"gpus": [{"product": "l4", "host_link": -1}]}, "host_link must be more than nothing"),
    ({"ram": "0GB"}, "ram must not be zero"),
    ({"ram": -1}, "ram must not be negative"),
    ({"ram": 1.5}, "ram must be text such as 24GB"),
    ({"ram": ["1GB"]}, "ram must be text"),
    ({"ram": True}, "ram must be a size"),
    ({"disk": "lots"}, "disk must be a number and a unit"),
    ({"disk_speed": "7Gb"}, "disk_speed must be bytes a second"),
    ({"disk_speed": 0}, "disk_speed must be more than nothing"),
    ({"cpu_flops": {}}, "cpu_flops must be text"),
    ({"cpu_bandwidth": None, "pinned": "-1GB"}, "pinned must not be negative"),
    ({"pageable_fraction": 0}, "pageable_fraction must lie in"),
    ({"pageable_fraction": 1.01}, "pageable_fraction must lie in"),
    ('{"pageable_fraction": NaN}', "pageable_fraction must lie in"),
    ({"pageable_fraction": "half"}, "pageable_fraction must be a number"),
    ({"network": "100Gbit/s"}, "a network joins nodes"),
    ({"network_latency_ns": 0}, "a network joins nodes"),
    ({"nodes": [{}, {}], "network_latency_ns": -1}, "network_latency_ns must be a whole number"),
    ({"nodes": [{}, {}], "network_latency_ns": 1.5}, "network_latency_ns must be a whole number"),
    ({"links": "infiniband"}, "links must be one of"),
    ({"links": []}, "links must be one of"),
    ({"gpus": "2xl4", "links": "nvlink"}, "can be joined by NVLink"),
    ({"gpus": "2xl4", "gpu_links": [{"gpus": [0, 2], "rate": "1GB/s"}]}, "numbers of GPUs.*0 to 1"),
    ({"gpus": "2xl4", "gpu_links": [{"gpus": [0, 0], "rate": "1GB/s"}]}, "each once"),
    ({"gpus": "2xl4", "gpu_links": [{"gpus": [0], "rate": "1GB/s"}]}, "two different GPUs"),
    ({"gpus": "2xl4", "gpu_links": [{"gpus": [0, 1]}]}, "and a rate"),
    ({"gpus": "2xl4", "gpu_links": [{"gpus": [0, 1], "rate": "1GB/s"}, {"gpus": [1, 0], "rate": 1}]}, "second time"),
    ({"gpus": "2xl4", "gpu_links": [{"gpus": [0, 1], "rate": "1GB/s", "way": 1}]}, "unknown way"),
    ({"switches": [[0]]}, "there are none"),
    ({"gpus": "2xl4", "switches": [[0, 1], [1]]}, "GPU 1 is behind two"),
    ({"gpus": "2xl4", "switches": [0, 1]}, "must list numbers"),
    ({"gpus": "2xl4", "switches": [["0"]]}, "must list numbers"),
    ({"gpus": "2xl4", "switches": [[True]]}, "must list numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "words"), DESCRIPTIONS, ids=range(len(DESCRIPTIONS)))
def test_hostile_descriptions_are_refused_by_name(data: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Hardware.load(write(tmp_path, data))
    assert "machine.json" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "nowhere.json", tmp_path / "bytes.json", tmp_path / "a\0b"):
        with pytest.raises(InputError, match="cannot read the hardware file"):
            Hardware.load(path)


def set_at(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


def link_to(target: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["links"].append({**data["links"][0], "target": target})


ROOT: dict[str, Any] = {"name": "root", "bytes_per_s": 1, "users": ["node0/cpu→node0/cuda:0"]}
CHANGES: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (drop("links"), "lacks links"),
    (drop("devices", 0, "pool"), r"devices\[0\] lacks pool"),
    (set_at("surplus", to=1), "unknown surplus"),
    (set_at("devices", to={}), "must be a list"),
    (set_at("devices", 0, "name", to=3), "must be str"),
    (set_at("devices", 0, "kind", to="tpu"), "must be one of"),
    (set_at("devices", 0, "name", to="gpu0"), "no cuda device can be called 'gpu0'"),
    (set_at("devices", 0, "name", to="cuda:00"), "can be called"),
    (set_at("devices", 0, "kind", to="cpu"), "no cpu device can be called 'node0/cuda:0'"),
    (set_at("devices", 0, "name", to="cuda:0"), "its node|others are not"),
    (set_at("devices", 0, "name", to="node0/cuda:1"), "two devices are called 'node0/cuda:1'"),
    (set_at("devices", 0, "pool", to="node9/cuda:0"), "no pool of its node"),
    (set_at("devices", 0, "pool", to="node1/cuda:0"), "no pool of its node"),
    (set_at("devices", 0, "flops_per_s", to={"bfloat16": 1}), 'lacks "default"'),
    (set_at("devices", 0, "flops_per_s", "default", to=0), "at least 1, and is 0"),
    (set_at("devices", 0, "bytes_per_s", to=-1), "at least 1, and is -1"),
    (set_at("devices", 0, "context_bytes", to=-1), "context_bytes of node0/cuda:0 must be at least 0"),
    (set_at("pools", 0, "capacity_bytes", to=-1), "capacity_bytes of node0/cuda:0"),
    (set_at("pools", 0, "capacity_bytes", to=1.5), "must be int"),
    (set_at("pools", 0, "name", to="node0/cuda:1"), "two pools are called"),
    (drop("pools", 3), "there is no 'node0/disk'"),
    (drop("devices", 2), "no 'node0/cpu'"),
    (set_at("devices", 2, "pool", to="node0/disk"), "must draw on the pool of its own name"),
    (link_to("node7/cuda:0"), "there is no 'node7/cuda:0'"),
    (link_to("node0/disk2"), "there is no 'node0/disk2'"),
    (link_to("node0/cpu"), "twice, or leads nowhere"),
    (lambda data: data["links"].append(data["links"][3]), "twice"),
    (set_at("links", 0, "bytes_per_s", to=0), "must be at least 1"),
    (set_at("links", 0, "latency_ns", to=-1), "latency_ns from"),
    (set_at("links", 0, "lane", to=3), "lane must be str"),
    (drop("links", 0), "no link from node0/cpu to node0/cuda:0"),
    (drop("links", -1), "no link from node1/cpu to node0/cpu"),
    (set_at("pinned_limit_bytes", to=-1), "pinned_limit_bytes must be at least 0"),
    (set_at("pageable_fraction", to=0.0), "pageable_fraction"),
    (set_at("shared", to=[ROOT | {"users": ["node0/cuda:7"]}]), "shared by 'node0/cuda:7', which is no device"),
    (set_at("shared", to=[ROOT | {"users": ["node0/cpu->cuda:0"]}]), "write a link as node0/cpu→node0/cuda:0"),
    (set_at("shared", to=[ROOT, ROOT]), "two of what is shared are called 'root'"),
    (set_at("shared", to=[ROOT | {"bytes_per_s": 0}]), "bytes_per_s of root must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=range(len(CHANGES)))
def test_hostile_machines_are_refused_by_name(
    change: Callable[[dict[str, Any]], None], words: str, tmp_path: Path
) -> None:
    data = json.loads(canonical(Hardware.from_options("2*(2x24GB)")))
    change(data)
    with pytest.raises(InputError, match=words):
        Hardware.load(write(tmp_path, data))


def test_what_is_shared_is_slower_with_the_worst_of_its_users() -> None:
    machine = Hardware.from_options("24GB")
    links = tuple(replace(link, spread=0.25 if link.target == "cuda:0" else 0.0) for link in machine.links)
    up, down = (
        Shared(name="up", bytes_per_s=10**9, users=("cpu", "cpu→cuda:0")),
        Shared(name="down", bytes_per_s=10**9, users=("cuda:0→cpu",)),
    )
    slower = replace(machine, links=links, shared=(up, down)).slower()
    assert [entry.bytes_per_s for entry in slower.shared] == [8 * 10**8, 10**9]


def test_every_link_of_a_machine_is_needed(machine: Hardware, tmp_path: Path) -> None:
    whole = json.loads(canonical(machine))
    for index, link in enumerate(whole["links"]):
        less = copy.deepcopy(whole)
        del less["links"][index]
        with pytest.raises(InputError, match=f"no link from {link['source']} to {link['target']}"):
            Hardware.load(write(tmp_path, less))


def spots(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(spot for key, value in entries for spot in spots(value, (*path, key)))]


@PROPERTY
@given(data=st.data())
def test_a_damaged_machine_is_refused_or_sound(data: st.DataObject, tmp_path: Path) -> None:
    whole = json.loads(data.draw(st.sampled_from([canonical(Hardware.from_options("2*(1xl4)")), *EXAMPLES])))
    spot = data.draw(st.sampled_from(spots(whole)[1:]))
    odd = st.sampled_from([None, -1, 0, 1.5, "", "cpu", "node1/cpu", "1GB", True, [], {}, [[0]]])
    set_at(*spot, to=data.draw(odd))(whole)
    try:
        hardware = Hardware.load(write(tmp_path, whole))
    except InputError:
        return
    hardware.check()
    for source, target in itertools.permutations([device.name for device in hardware.devices], 2):
        assert hardware.link(source, target).bytes_per_s > 0


# The command's options


def asked(*words: str) -> Hardware:
    parser = argparse.ArgumentParser()
    options.add_machine_options(parser)
    return options.hardware(parser.parse_args(words))


def test_options_are_what_from_options_takes() -> None:
    found = asked(
        "--gpus", "4xh100/4xh100", "--ram", "1TB", "--pinned", "64GB", "--disk", "2TB", "--disk-speed", "7GB/s",
        "--cpu-flops", "2TFLOP/s", "--cpu-bandwidth", "200GB/s", "--links", "nvlink", "--gpus-per-switch", "2",
        "--network", "100Gbit/s", "--max-memory", "node1/cuda:0=20GiB,cpu=512GB",
    )  # fmt: skip
    assert found == Hardware.from_options(
        "2*(4xh100)", ram="1TB", pinned="64GB", disk="2TB", disk_speed="7GB/s", cpu_flops="2TFLOP/s",
        cpu_bandwidth="200GB/s", links="nvlink", gpus_per_switch=2, network="100Gbit/s",
        max_memory={"node1/cuda:0": "20GiB", "cpu": "512GB"},
    )  # fmt: skip
    assert asked() == Hardware.from_options()


def test_pinned_is_the_cap_of_that_name() -> None:
    for words in (
        ("--pinned", "8GB"),
        ("--max-memory", "pinned=8GB"),
        ("--pinned", "8GB", "--max-memory", "pinned=9GB"),
    ):
        assert asked("--gpus", "2x24GB", *words).pinned_limit_bytes == 8 * GBPS


def test_a_file_takes_the_place_of_options_but_caps(tmp_path: Path) -> None:
    path = str(write(tmp_path, EXAMPLES[1]))
    assert asked("--hardware", path) == Hardware.load(path)
    assert asked("--hardware", path, "--max-memory", "node2/cpu=9GB").pool("node2/cpu").capacity_bytes == 9 * GBPS
    for words in (("--gpus", "2x24GB"), ("--disk-speed", "7GB/s"), ("--gpus-per-switch", "2")):
        with pytest.raises(InputError, match=f"--hardware and {words[0]} both"):
            asked("--hardware", path, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--network", "100Gb", "--gpus", "2*1xl4"), "--network must be bytes a second"),
        (("--links", "usb"), "--links"),
        (("--gpus-per-switch", "0"), "--gpus-per-switch"),
        (("--hardware", "nowhere.json"), "cannot read the hardware file nowhere.json"),
        (("--cpu-flops", "-1"), "--cpu-flops"),
    ],
)
def test_the_command_refuses_with_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "gpt2", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_plan_is_not_written_over_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, EXAMPLES[0])
    assert main(["--model", "gpt2", "--hardware", str(path), "--out", str(path)]) == 2
    assert "overwrite" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == EXAMPLES[0]


def test_a_plan_holds_its_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine, plan = write(tmp_path, EXAMPLES[0]), tmp_path / "plan.json"
    assert main(["--model", "gpt2", "--hardware", str(machine), "--out", str(plan), "--quiet"]) == 0
    held = json.loads(plan.read_text(encoding="utf-8"))["hardware"]
    assert Hardware.load(write(tmp_path, held)) == Hardware.load(write(tmp_path, EXAMPLES[0]))
    assert "which NVIDIA" not in capsys.readouterr().out
    with pytest.raises(PlanFormatError):
        decode(Hardware, {**held, "links": 3}, where="hardware")
