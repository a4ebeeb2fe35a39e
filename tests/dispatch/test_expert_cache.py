"""Experts that a slot still holds are not copied again: the right bytes, no fewer copies than can be, the policy."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.expert_cache import ExpertCache
from dispatch.stores import HostStore, Layout, new_slab
from late_ring import LateRing

CPU = torch.device("cpu")
LAYOUT = Layout.of([("weight", (8,), torch.float32)])
# (layer, the experts that it asks for) of one call after another.
Calls = Sequence[tuple[int, tuple[int, ...]]]


def store(layer: int, expert: int) -> HostStore:
    found = HostStore(LAYOUT, new_slab(LAYOUT.nbytes, CPU))
    found.views()["weight"].fill_(100 * layer + expert)
    return found


def run(cache: ExpertCache, calls: Calls) -> list[int]:
    """Return the copies of each call; every expert must be what it should be."""
    copies = []
    for layer, experts in calls:
        before = cache.copies
        cache.begin(layer, [(expert, store(layer, expert)) for expert in experts])
        for expert in experts:
            view = LAYOUT.views(cache.fetch(layer, expert))["weight"]
            assert torch.equal(view, torch.full((8,), float(100 * layer + expert)))
        cache.end()
        copies.append(cache.copies - before)
    return copies


def cache_of(count: int) -> ExpertCache:
    return ExpertCache(LateRing(CPU, count, LAYOUT.nbytes))


def fewest_copies(calls: Calls, count: int) -> int:
    """Return Belady's answer: give up what is asked for last of all."""
    asked = [(layer, expert) for layer, experts in calls for expert in experts]
    kept: set[tuple[int, int]] = set()
    copies = 0
    for now, key in enumerate(asked):
        if key in kept:
            continue
        copies += 1
        if len(kept) == count:
            rest = asked[now + 1 :]
            kept.remove(max(kept, key=lambda each: rest.index(each) if each in rest else len(rest)))
        kept.add(key)
    return copies


def rounds(
    draw: random.Random, layers: int, experts: int, routed: int, times: int
) -> Iterator[tuple[int, tuple[int, ...]]]:
    for _ in range(times):
        for layer in range(layers):
            yield layer, tuple(sorted(draw.sample(range(experts), k=routed)))


@settings(deadline=None, max_examples=200)
@given(
    count=st.integers(1, 9),
    calls=st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 5)).map(sorted).map(tuple)), max_size=25),
)
def test_any_calls(count: int, calls: list[tuple[int, tuple[int, ...]]]) -> None:
    cache = cache_of(count)
    copies = sum(run(cache, calls))
    assert copies >= fewest_copies(calls, count)
    assert copies + cache.hits == sum(len(experts) for _, experts in calls)
    assert cache.copied_bytes == copies * LAYOUT.nbytes
    different = {(layer, expert) for layer, experts in calls for expert in experts}
    if count >= len(different):
        assert copies == len(different), "what fits is copied once"


@pytest.mark.parametrize("count", [2, 3, 4, 6, 8, 11])
def test_rounds_that_ask_for_more_than_fits_keep_some(count: int) -> None:
    """Four layers of three experts each, always the same: least recently used over all of them would keep nothing."""
    calls = [(layer, (1, 3, 5)) for _ in range(40) for layer in range(4)]
    copies = sum(run(cache_of(count), calls))
    best = fewest_copies(calls, count)
    everything = len(calls) * 3
    assert best <= copies <= everything
    if count > 3:
        assert everything - copies >= (everything - best) / 3


@pytest.mark.parametrize("count", [4, 8, 16])
def test_a_drawn_routing_hits_about_as_often_as_slots_are_kept(count: int) -> None:
    """A slot that is kept is as good as a resident expert: used with the chance k / E in each of its layer's calls."""
    layers, experts, routed, times = 4, 8, 2, 400
    cache = cache_of(count)
    copies = sum(run(cache, list(rounds(random.Random(1), layers, experts, routed, times))))
    asked = layers * routed * times
    assert asked - copies > 0.6 * (count - 2) * times * routed / experts
    assert asked - copies <= count * times * routed / experts * 1.2


def test_a_layer_gives_up_its_own_least_recently_used() -> None:
    cache = cache_of(4)
    assert run(cache, [(0, (0, 1)), (1, (0, 1))]) == [2, 2]
    assert run(cache, [(0, (0,)), (0, (2,))]) == [0, 1]
    assert run(cache, [(0, (0, 2)), (1, (0, 1)), (0, (1,))]) == [0, 0, 1]


def test_a_layer_with_two_more_gives_one_up() -> None:
    cache = cache_of(4)
    assert run(cache, [(0, (0, 1, 2, 3)), (1, (0,)), (1, (1,))]) == [4, 1, 1]
    assert run(cache, [(0, (2, 3)), (1, (0, 1))]) == [0, 0]
    assert run(cache, [(2, (0,)), (0, (2, 3)), (1, (0,))]) == [1, 0, 1], "layer 1 ran last, so it gave up its expert 0"


def test_a_layer_with_one_more_keeps_it() -> None:
    cache = cache_of(5)
    assert run(cache, [(0, (0, 1, 2)), (1, (0, 1)), (1, (2,)), (0, (0, 1, 2)), (1, (1, 2))]) == [3, 2, 1, 0, 0]


def test_what_a_call_still_wants_is_kept_while_another_slot_comes_free() -> None:
    cache = cache_of(2)
    assert run(cache, [(0, (3, 4)), (0, (0, 3, 4))]) == [2, 2], "3 is used before 4, so 4 is given up for 0"


def test_a_copy_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(2)
    run(cache, [(0, (0, 1))])
    with monkeypatch.context() as patch:
        patch.setattr(LateRing, "copy", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.begin(0, [(5, store(0, 5))])
    assert run(cache, [(0, (5,)), (0, (5,)), (0, (1,))]) == [1, 0, 0]


def test_a_call_that_was_broken_off_is_begun_anew() -> None:
    cache = cache_of(3)
    cache.begin(0, [(expert, store(0, expert)) for expert in range(5)])
    cache.fetch(0, 0)
    assert run(cache, [(1, (0, 1, 2, 3)), (0, (0, 1, 2))])[0] == 4
