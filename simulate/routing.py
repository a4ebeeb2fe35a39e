"""Which experts a router asks for, drawn by a seed so that each is used as often as its popularity says."""

from __future__ import annotations

import random

from planner.graph import Bucket, WeightGroup

# Of more tokens in a pass, experts are drawn one by one and not token by token: nearly all of them are used.
TOKENS_DRAWN_ONE_BY_ONE = 16


class Routing:
    """Draws from the popularity of experts; the same seed and the same questions in order give the same answers."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def waiting(self, group: WeightGroup, *, waiting: int, tokens: int) -> tuple[Bucket, ...]:
        """Return the bucket of each distinct slice that `tokens` tokens use and that waits: the least popular ones do.

        A token uses exactly as many slices as the group says, each with its chance (systematic sampling in random
        order: Madow, Annals of Mathematical Statistics 1949). Tokens choose independently; of more than
        `TOKENS_DRAWN_ONE_BY_ONE` each slice is used or not with its own chance.
        """
        slices = [bucket for bucket in group.from_least for _ in range(bucket.slices)]
        if tokens > TOKENS_DRAWN_ONE_BY_ONE:
            return tuple(b for b in slices[:waiting] if self._random.random() < group.used(b, tokens))
        used: set[int] = set()
        for _ in range(tokens):
            used |= self._token(slices)
        return tuple(slices[number] for number in sorted(used) if number < waiting)

    def _token(self, slices: list[Bucket]) -> set[int]:
        order = list(range(len(slices)))
        self._random.shuffle(order)
        found: set[int] = set()
        reached = self._random.random()
        for number in order:
            before = int(reached)
            reached += slices[number].chance
            if int(reached) > before:
                found.add(number)
        return found
