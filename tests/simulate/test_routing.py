"""Experts that are drawn: as often as their popularity says, and alike for the same seed."""

from __future__ import annotations

from collections import Counter

import pytest

from planner.graph import Bucket, Tensor, WeightGroup
from simulate.routing import TOKENS_DRAWN_ONE_BY_ONE, Routing

SKEWED = (Bucket(slices=1, chance=0.9), Bucket(slices=2, chance=0.4), Bucket(slices=3, chance=0.1))
DRAWS = 4000


def group(*buckets: Bucket, slices: int = 6, used: int = 2) -> WeightGroup:
    tensor = Tensor(name="w", shape=(slices, 4), dtype="bfloat16", nbytes=slices * 8)
    return WeightGroup(
        name="experts", slices=slices, used_slices=used, streamable=True, tensors=(tensor,), buckets=buckets
    )


@pytest.mark.parametrize("buckets", [(), SKEWED], ids=["even", "skewed"])
@pytest.mark.parametrize("tokens", [1, 3, TOKENS_DRAWN_ONE_BY_ONE + 1])
def test_slices_are_used_as_often_as_expected(buckets: tuple[Bucket, ...], tokens: int) -> None:
    experts, routing = group(*buckets), Routing(1)
    drawn = [routing.waiting(experts, waiting=6, tokens=tokens) for _ in range(DRAWS)]
    assert sum(map(len, drawn)) / DRAWS == pytest.approx(experts.expected_slices(tokens), rel=0.03)
    times = Counter(bucket.chance for each in drawn for bucket in each)
    for bucket in experts.from_least:
        expected = bucket.slices * experts.used(bucket, tokens)
        assert times[bucket.chance] / DRAWS == pytest.approx(expected, rel=0.1)


def test_a_token_uses_as_many_as_it_must() -> None:
    routing = Routing(2)
    assert {len(routing.waiting(group(*SKEWED), waiting=6, tokens=1)) for _ in range(200)} == {2}


def test_the_least_popular_wait() -> None:
    routing = Routing(3)
    for _ in range(200):
        found = routing.waiting(group(*SKEWED), waiting=3, tokens=1)
        assert all(bucket.chance == 0.1 for bucket in found)
        assert routing.waiting(group(*SKEWED), waiting=0, tokens=1) == ()


def test_the_same_seed_draws_the_same() -> None:
    one, two, other = Routing(4), Routing(4), Routing(5)
    drawn = [[routing.waiting(group(), waiting=3, tokens=2) for _ in range(50)] for routing in (one, two, other)]
    assert drawn[0] == drawn[1] != drawn[2]
