"""Machines with one thing changed: those that are described with the change, made by other means."""

from __future__ import annotations

import dataclasses
import random

import pytest

from planner import changes
from planner.hardware import Hardware


def facts(hardware: Hardware) -> tuple[object, ...]:
    links = sorted(dataclasses.astuple(link) for link in hardware.links)
    return hardware.devices, sorted(hardware.pools, key=lambda pool: pool.name), links


@pytest.mark.parametrize(
    ("gpus", "like", "count", "then"),
    [
        ("1x24GB", "cuda:0", 1, "2x24GB"),
        ("1x24GB", "cuda:0", 3, "4x24GB"),
        ("2xrtx4090", "cuda:1", 2, "4xrtx4090"),
        ("1xrtx4090,1xl4", "cuda:1", 1, "1xrtx4090,2xl4"),
        ("2x24GB,3x16GB", "cuda:4", 2, "2x24GB,5x16GB"),
    ],
)
def test_more_gpus_are_those_of_a_larger_machine(gpus: str, like: str, count: int, then: str) -> None:
    grown = changes.with_more_gpus(Hardware.from_options(gpus), like, count)
    assert facts(grown) == facts(Hardware.from_options(then))


def test_more_gpus_of_a_node_stay_in_it() -> None:
    plain = Hardware.from_options("2x24GB")
    text = {device.name: f"node1/{device.name}" for device in plain.devices} | {"disk": "node1/disk"}
    links = tuple(dataclasses.replace(k, source=text[k.source], target=text[k.target]) for k in plain.links)
    devices = tuple(dataclasses.replace(d, name=text[d.name], pool=text[d.pool]) for d in plain.devices)
    pools = tuple(dataclasses.replace(pool, name=text[pool.name]) for pool in plain.pools)
    node = dataclasses.replace(plain, devices=devices, pools=pools, links=links)
    grown = changes.with_more_gpus(node, "node1/cuda:0", 1)
    assert [device.name for device in grown.devices] == [f"node1/{n}" for n in ("cuda:0", "cuda:1", "cuda:2", "cpu")]
    assert {link.target for link in grown.links if link.source == "node1/cuda:2"} == {
        f"node1/{name}" for name in ("cuda:0", "cuda:1", "cpu")
    }


def test_memory_grows_where_it_is_said() -> None:
    hardware = Hardware.from_options("2x24GB")
    grown = changes.with_memory(hardware, ("cuda:1", "cpu"), 5)
    sizes = {pool.name: pool.capacity_bytes - hardware.pool(pool.name).capacity_bytes for pool in grown.pools}
    assert sizes == {"cuda:0": 0, "cuda:1": 5, "cpu": 5, "disk": 0}


def test_links_grow_where_it_is_said() -> None:
    hardware = Hardware.from_options("2x24GB")
    chosen = [link for link in hardware.links if link.target == "cuda:0"]
    grown = changes.with_faster_links(hardware, chosen, 2)
    for before, after in zip(hardware.links, grown.links, strict=True):
        assert after.bytes_per_s == before.bytes_per_s * (2 if before.target == "cuda:0" else 1)


def test_alike_are_memories_of_equal_devices() -> None:
    def of(gpus: str, **caps: str) -> tuple[tuple[str, ...], ...]:
        return changes.alike(Hardware.from_options(gpus, max_memory={f"cuda:{k[1:]}": v for k, v in caps.items()}))

    assert of("3x24GB") == (("cuda:0", "cuda:1", "cuda:2"), ("cpu",), ("disk",))
    assert of("2x24GB,2x16GB") == (("cuda:0", "cuda:1"), ("cuda:2", "cuda:3"), ("cpu",), ("disk",))
    assert of("3x24GB", g1="20GB") == (("cuda:0", "cuda:2"), ("cuda:1",), ("cpu",), ("disk",))
    assert of("0") == (("cpu",), ("disk",))


def test_alike_needs_equal_links_whatever_their_order() -> None:
    hardware = Hardware.from_options("3x24GB")
    links = random.Random(0).sample(hardware.links, len(hardware.links))
    assert changes.alike(dataclasses.replace(hardware, links=tuple(links)))[0] == ("cuda:0", "cuda:1", "cuda:2")
    one = next(link for link in hardware.links if (link.source, link.target) == ("cpu", "cuda:1"))
    assert changes.alike(changes.with_faster_links(hardware, [one], 2))[:2] == (("cuda:0", "cuda:2"), ("cuda:1",))
