"""Any number of slots: the same bits, nothing overwritten while it is used, and as many copies under way as can be."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dispatch
from dispatch.stores import HostStore, Layout, new_slab
from dispatch.stream import GroupStream, StreamedGroup
from late_ring import LateRing
from planner.errors import InputError
from tiny_models import on_cpu, spread_over_two, streamed, with_slots

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 40])
@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_same_bits(make_case: Any, monkeypatch: pytest.MonkeyPatch, name: str, home: str, count: int) -> None:
    rings: list[LateRing] = []

    def make(*args: Any, **kwargs: Any) -> LateRing:
        rings.append(LateRing(*args, **kwargs))
        return rings[-1]

    monkeypatch.setattr("dispatch.preparation.SlotRing", make)
    case = make_case(name)
    plan = with_slots(spread_over_two(streamed(case.plan(gpus="2x24GB"), home)), count)
    case.run_like(plan)
    want, tokens = case.logits(case.reference), case.generate(case.reference)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    for _ in range(2):
        assert torch.equal(case.logits(model), want)
        assert torch.equal(case.generate(model), tokens)

    handle = model.model.layers[1].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        case.logits(model)
    handle.remove()
    assert torch.equal(case.logits(model), want)
    assert {len(ring) for ring in rings} == {count}
    assert all(ring.most <= count - 1 for ring in rings)
    assert torch.equal(case.logits(dispatch.remove(model)), want)


def row_of_groups(number: int) -> list[StreamedGroup]:
    """Return so many groups of one matrix each, filled with the number of its group."""
    groups = []
    for index in range(number):
        layout = Layout.of([("weight", (4, 4), torch.float32)])
        store = HostStore(layout, new_slab(layout.nbytes, CPU))
        store.views()["weight"].fill_(index)
        groups.append(StreamedGroup(str(index), {"weight": (torch.nn.Linear(4, 4, bias=False), "weight")}, store))
        groups[-1].leave()
    return groups


def weight(group: StreamedGroup) -> torch.Tensor:
    module, leaf = group._owners["weight"]
    return getattr(module, leaf)  # type: ignore[no-any-return]


@settings(deadline=None, max_examples=200)
@given(
    number=st.integers(1, 6),
    count=st.integers(1, 5),
    walk=st.lists(st.integers(0, 5), max_size=30),
    each=st.integers(0, 3),
)
def test_groups_in_any_order_are_what_they_should_be(number: int, count: int, walk: list[int], each: int) -> None:
    """Passes in order, with modules called out of order and twice between them; layers of so many groups, or none."""
    groups = row_of_groups(number)
    for index, group in enumerate(groups):
        group.layer = str(index // each) if each else None
    ring = LateRing(CPU, count, groups[0].store.layout.nbytes)
    stream = GroupStream(ring, groups)
    stream.prefetch()
    for index in itertools.chain(range(number), (step % number for step in walk), range(number)):
        group = groups[index]
        stream.acquire(group)
        assert torch.equal(weight(group), torch.full((4, 4), float(index)))
        stream.release(group)
        assert all(weight(other).is_meta for other in groups)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_all_slots_but_the_one_in_use_are_filled_ahead(count: int) -> None:
    groups = row_of_groups(6)
    ring = LateRing(CPU, count, groups[0].store.layout.nbytes)
    stream = GroupStream(ring, groups)
    stream.prefetch()
    for group in groups * 3:
        stream.acquire(group)
        assert len(ring.in_flight) == count - 1
        stream.release(group)
    assert ring.copies == 18 + count, "each once a pass, and those ahead"


def test_whole_layers_that_are_passed_over_stay_in_the_circle() -> None:
    groups = row_of_groups(8)
    for number, group in enumerate(groups):
        group.layer = str(number // 2)
    ring = LateRing(CPU, 2, groups[0].store.layout.nbytes)
    stream = GroupStream(ring, groups)
    for walk in ([0, 1, 4, 5, 6, 7], [0, 1, 2], range(8), range(8)):
        for index in walk:
            stream.acquire(groups[index])
            assert torch.equal(weight(groups[index]), torch.full((4, 4), float(index)))
            stream.release(groups[index])
    assert stream._on_demand == set()
    for walk in ([0, 1, 2, 4, 5, 6], [0, 1, 2, 4, 5, 6]):
        for index in walk:
            stream.acquire(groups[index])
            assert torch.equal(weight(groups[index]), torch.full((4, 4), float(index)))
            stream.release(groups[index])
    assert stream._on_demand == {3, 7}


def test_steps_of_a_decoder_do_not_copy_its_encoder() -> None:
    groups = row_of_groups(10)
    for number, group in enumerate(groups):
        group.layer = str(number // 2)
    ring = LateRing(CPU, 2, groups[0].store.layout.nbytes)
    stream = GroupStream(ring, groups)
    copies = []
    for _ in range(3):
        for walk in (range(4), *[range(4, 10)] * 6):
            before = ring.copies
            for index in walk:
                stream.acquire(groups[index])
                assert torch.equal(weight(groups[index]), torch.full((4, 4), float(index)))
                stream.release(groups[index])
            copies.append(ring.copies - before)
    assert stream._on_demand == set()
    # Two are ahead of the last group of a pass; what is ahead is wrong where the encoder runs, and once after it.
    for encoder, first, *steps in (copies[:7], copies[7:14], copies[14:]):
        assert encoder <= 4 + 2
        assert first <= 6 + 2
        assert sum(steps) <= 5 * 6 + 2


@pytest.mark.parametrize("count", [1, 2])
def test_groups_inside_each_other_need_a_slot_each(count: int) -> None:
    groups = row_of_groups(4)
    stream = GroupStream(LateRing(CPU, count, groups[0].store.layout.nbytes), groups)
    stream.prefetch()
    outer, inner = groups[:count], groups[count]
    for group in outer:
        stream.acquire(group)
    with pytest.raises(InputError, match=f"{count} slots of cpu: plan with {count + 1} slots"):
        stream.acquire(inner)
    for group in reversed(outer):
        assert torch.equal(weight(group), torch.full((4, 4), float(group.name)))
        stream.release(group)
    stream.acquire(inner)
    assert torch.equal(weight(inner), torch.full((4, 4), float(inner.name)))


def test_pageable_homes_are_not_pinned(make_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that waits in ordinary memory takes none that is pinned, and the bits are the same."""
    case = make_case("mixtral")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    pageable = {(p.layer, p.group) for p in plan.placements if p.home != p.run_on and p.layer.endswith("1")}
    assert any(group == "mlp.experts" for _, group in pageable)
    assert any(group == "self_attn" for _, group in pageable)
    placements = tuple(
        dataclasses.replace(p, memory="pageable") if (p.layer, p.group) in pageable else p for p in plan.placements
    )
    pinned: list[int] = []

    def host_slab(nbytes: int, target: torch.device) -> torch.Tensor:
        pinned.append(nbytes)
        return new_slab(nbytes, CPU)

    monkeypatch.setattr("dispatch.weights.host_slab", host_slab)
    model = dispatch.apply(
        case.meta(), dataclasses.replace(plan, placements=placements), checkpoint=case.folder, devices=on_cpu(plan)
    )
    sizes = {
        (layer.name, group.name): group.slice_slab_bytes * (group.slices if group.slices == 1 else group.slices - 3)
        for layer in plan.graph.layers
        for group in plan.graph.kinds[layer.kind].groups
    }
    waiting = {(p.layer, p.group) for p in plan.placements if p.home != p.run_on}
    assert sum(pinned) == sum(sizes[key] for key in waiting - pageable)
    case.run_like(plan)
    assert torch.equal(case.generate(model), case.generate(case.reference))
