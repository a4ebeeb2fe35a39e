"""Slots whose copies come as late as they may, and whose contents are gone as soon as they may be. For tests only."""

from __future__ import annotations

import torch

from dispatch.slots import SlotRing
from dispatch.stores import Store


class LateRing(SlotRing):
    """What a GPU's streams may do at worst, on the CPU: a copy is done when it is used, and a released slot is garbage
    until it is used again.

    in_flight: copies begun and not used. most: the greatest number of them while a slot was in use.
    """

    def __init__(self, device: torch.device, count: int, slot_bytes: int, *, staging: bool = False):
        super().__init__(device, count, slot_bytes, staging=staging)
        self.in_flight: dict[int, Store] = {}
        self.last: dict[int, Store] = {}
        self.used: set[int] = set()
        self.copies = self.most = 0

    def copy(self, slot: int, store: Store) -> None:
        assert slot not in self.used, "copied over weights that are in use"
        self.in_flight[slot] = store
        self.copies += 1

    def use(self, slot: int) -> torch.Tensor:
        if slot in self.in_flight:
            self.last[slot] = self.in_flight.pop(slot)
        super().copy(slot, self.last[slot])
        self.used.add(slot)
        self.most = max(self.most, len(self.in_flight))
        return super().use(slot)

    def release(self, slot: int) -> None:
        self.used.remove(slot)
        self.slabs[slot].fill_(0xFF)
        super().release(slot)
