"""Hosts, links and disks by name, and what plans take of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.commands.main import main
from planner.errors import InputError
from planner.hardware import PCIE_BYTES_PER_S, Hardware, products
from planner.hosts import host, hosts
from planner.products import catalogue

GBPS = 10**9
DATA = products()
LINKS = DATA["links"]


@pytest.mark.parametrize("key", hosts())
def test_a_host_has_its_channels_and_slots(key: str) -> None:
    each = hosts()[key]
    hardware = Hardware.from_options("1xrtx5090,1xt4", host=key)
    cpu = hardware.device("cpu")
    peak = each.channels * each.mega_transfers_per_s * 64 / 8 * 1e6
    assert cpu.bytes_per_s == pytest.approx(0.75 * peak)
    assert cpu.product == each.name
    # Slots bind cards that are newer, and cards slots that are newer.
    slots = {3: 12.4, 4: 22.5, 5: 51.0}
    assert hardware.link("cpu", "cuda:0").bytes_per_s == slots[each.pcie] * GBPS
    assert hardware.link("cuda:1", "cpu").bytes_per_s == 12.4 * GBPS
    assert each.note() in hardware.assumptions
    assert len(each.source) > 20


def test_known_hosts_have_the_bandwidth_that_their_makers_print() -> None:
    printed = {"epyc-7003": 204.8, "epyc-9004": 460.8, "xeon-4th": 307.2, "desktop-ddr4": 51.2, "desktop-ddr5": 89.6}
    assert {key: hosts()[key].peak_bytes_per_s / 1e9 for key in printed} == printed


def test_pcie_rates_are_those_of_the_specification() -> None:
    for generation, giga_transfers in ((3, 8), (4, 16), (5, 32)):
        peak = LINKS[f"pcie{generation}"]["peak_gb_per_s"]
        assert peak == pytest.approx(16 * giga_transfers * 128 / 130 / 8, rel=1e-3)
        assert 0.6 * peak < PCIE_BYTES_PER_S[generation] / GBPS < peak


def test_nvlink_rates_of_products_are_whole_links() -> None:
    links = {
        "v100": ("nvlink2", 2), "titanrtx": ("nvlink2", 2), "rtx2080ti": ("nvlink2", 2), "a100": ("nvlink3", 12),
        "h100-": ("nvlink4", 12), "h200": ("nvlink4", 18), "b200": ("nvlink5", 18), "b300": ("nvlink5", 18),
    }  # fmt: skip
    for start, (kind, count) in links.items():
        found = [each for key, each in catalogue().items() if key.startswith(start)]
        assert found
        for each in found:
            assert each.nvlink is not None
            assert each.nvlink.gb_per_s == count * LINKS[kind]["peak_gb_per_s"]


def test_what_is_said_stands_above_the_host() -> None:
    hardware = Hardware.from_options("1xrtx4090", host="epyc-9004", cpu_bandwidth="100GB/s")
    assert hardware.device("cpu").bytes_per_s == 100 * GBPS


def test_a_host_leaves_ways_of_its_own_alone(tmp_path: Path) -> None:
    assert Hardware.from_options("gh200", host="xeon-2nd").link("cpu", "cuda:0").bytes_per_s == 411 * GBPS
    path = tmp_path / "box.json"
    path.write_text(json.dumps({"gpus": [{"product": "rtx5090", "host_link": "6GB/s"}, "rtx5090"], "host": "xeon-2nd"}))
    hardware = Hardware.load(path)
    assert hardware.link("cpu", "cuda:0").bytes_per_s == 6 * GBPS
    assert hardware.link("cpu", "cuda:1").bytes_per_s == 12.4 * GBPS


@pytest.mark.parametrize(
    ("text", "rate"),
    [("2xddr5-5600", 67.2), ("12xDDR5-4800", 345.6), ("8xddr4-3200", 153.6), ("200GB/s", 200.0), ("80GB", 80.0)],
)
def test_memory_of_the_cpu(text: str, rate: float, tmp_path: Path) -> None:
    assert Hardware.from_options(0, cpu_bandwidth=text).device("cpu").bytes_per_s == pytest.approx(rate * GBPS)
    path = tmp_path / "box.json"
    path.write_text(json.dumps({"cpu_bandwidth": text}))
    assert Hardware.load(path).device("cpu").bytes_per_s == pytest.approx(rate * GBPS)


@pytest.mark.parametrize(("text", "rate"), [("nvme4", 5.6), ("NVMe3", 2.8), ("sata", 0.44), ("7GB/s", 7.0)])
def test_disks(text: str, rate: float, tmp_path: Path) -> None:
    assert Hardware.from_options(0, disk_speed=text).link("disk", "cpu").bytes_per_s == pytest.approx(rate * GBPS)
    path = tmp_path / "box.json"
    path.write_text(json.dumps({"disk_speed": text}))
    assert Hardware.load(path).link("disk", "cpu").bytes_per_s == pytest.approx(rate * GBPS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "epyc9004"}, r"^--host 'epyc9004' is not known; nearest: epyc-9004"),
        ({"host": "voodoo"}, r"^--host 'voodoo' is not known; plan gpus --hosts lists all"),
        ({"host": ""}, "^--host '' is not known"),
        ({"disk_speed": "nvme9"}, "^--disk-speed 'nvme9' is not known; write sata, nvme3"),
        ({"cpu_bandwidth": "2xddr5"}, "^--cpu-bandwidth must be"),
        ({"cpu_bandwidth": "0xddr5-5600"}, "no memory at all"),
        ({"cpu_bandwidth": "2xddr9-5600"}, "^--cpu-bandwidth must be"),
    ],
)
def test_hostile_names_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Hardware.from_options(0, **options)


@pytest.mark.parametrize("value", [3, ["epyc-9004"], "epyc"])
def test_hostile_hosts_in_files_are_refused(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "box.json"
    path.write_text(json.dumps({"host": value}))
    with pytest.raises(InputError, match=r"hardware\.host"):
        Hardware.load(path)


def test_spelling_of_hosts() -> None:
    assert host("EPYC 9004") is host("epyc_9004") is hosts()["epyc-9004"]


def test_the_command_lists_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpus", "--hosts"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for key in (*hosts(), *DATA["disks"], *LINKS):
        assert f"\n{key} " in f"\n{out}"
    assert main(["gpus", "--hosts", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"hosts", "links", "disks", "host_achieved"}
    assert main(["gpus", "rtx4090", "--hosts"]) == 2
