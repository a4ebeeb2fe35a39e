"""Which experts a device's slots hold: what was copied for one call is not copied again for the next.

Policy. Layers come round in a fixed order, so what was used longest ago is what is asked for next, and least recently
used over all layers would keep nothing in fewer slots than one pass wants. So slots are shared out among layers, and
each keeps those of its experts that it used last. A layer that needs a slot takes a free one; else it gives up its own
least recently used, unless it has none that it can give or another layer has two more: then that layer gives up its
own, of those that have most the one that ran last.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from dispatch.saved_weights import InHand
from dispatch.slots import SlotRing
from dispatch.stores import Store

# Experts that the disk may be reading at once.
_ANNOUNCED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStatistics:
    """What happened in one device's slots for experts since `dispatch.apply`.

    hits: experts that were asked for and still there. copies: those that were copied, `copied_bytes` in all. Experts
        that are resident or that the CPU computes count as neither.
    """

    device: str
    slots: int
    hits: int
    copies: int
    copied_bytes: int


class ExpertCache:
    """The slots of `ring`, filled with experts by the policy above. One layer asks at a time."""

    def __init__(self, ring: SlotRing):
        self.ring = ring
        self.in_hand = InHand(ring)
        self.hits = self.copies = self.copied_bytes = 0
        # In the order of their last use, the one used longest ago first.
        self._kept: OrderedDict[tuple[Hashable, int], int] = OrderedDict()
        self._free = list(range(len(ring)))
        # The layer that ran last is last.
        self._ran: dict[Hashable, None] = {}
        self._queue: deque[tuple[tuple[Hashable, int], Store]] = deque()
        self._ready: deque[tuple[Hashable, int]] = deque()
        self._held: tuple[Hashable, int] | None = None

    def begin(self, layer: Hashable, experts: Sequence[tuple[int, Store]]) -> None:
        """Announce the experts that a layer will fetch, in order, and start to copy those that are not there."""
        self._give_back()
        self._ready.clear()
        if len(self._free) + len(self._kept) != len(self.ring):
            # An interrupt came between one and the other.
            self._free = sorted(set(range(len(self.ring))) - set(self._kept.values()))
        self._ran.pop(layer, None)
        self._ran[layer] = None
        self._queue = deque(((layer, expert), store) for expert, store in experts)
        for key, store in list(self._queue)[:_ANNOUNCED]:
            self._announce(key, store)
        self._bring()

    def fetch(self, layer: Hashable, expert: int) -> torch.Tensor:
        """Return the slab that holds an expert; valid until the next `fetch` or `end`."""
        self.end()
        key = self._ready.popleft()
        assert key == (layer, expert)
        self._held = key
        # In one step: an interrupt in between would lose the slot.
        self._kept.move_to_end(key)
        return self.ring.use(self._kept[key])

    def end(self) -> None:
        """Let go of the expert fetched last, and copy more into what may be overwritten."""
        self._give_back()
        self._bring()

    @property
    def is_busy(self) -> bool:
        """Whether a layer has asked for experts that it has not taken yet, or holds one."""
        return bool(self._held or self._ready or self._queue)

    def drop(self) -> None:
        """Let go of every expert: it may have changed where it waits."""
        self._give_back()
        self._queue.clear()
        self._ready.clear()
        self._free.extend(self._kept.values())
        self._kept.clear()

    def _give_back(self) -> None:
        if self._held is not None:
            self.ring.release(self._kept[self._held])
            self._held = None

    def _bring(self) -> None:
        while self._queue:
            key, store = self._queue[0]
            if key in self._kept and self.ring.has_failed(self._kept[key]):
                self._free.append(self._kept.pop(key))
            if key in self._kept:
                self.hits += 1
            else:
                if not self._free and not self._give_up(key[0]):
                    return
                slot = self._free[-1]
                with self.ring.context():
                    self.ring.copy(slot, store)
                self._kept[key] = self._free.pop()
                self.copies += 1
                self.copied_bytes += store.layout.nbytes
            self._queue.popleft()
            self._ready.append(key)
            if len(self._queue) >= _ANNOUNCED:
                self._announce(*self._queue[_ANNOUNCED - 1])

    def _announce(self, key: tuple[Hashable, int], store: Store) -> None:
        """Tell the disk what is read soon."""
        if key not in self._kept:
            self.ring.announce(store)

    def _give_up(self, layer: Hashable) -> bool:
        """Free a slot for `layer`, none being used; False if this call wants what is left and others come first."""
        wanted = {key for key, _ in self._queue}
        idle = [key for key in self._kept if key not in self._ready and key not in wanted]
        if idle:
            key = self._least(layer, idle)
        elif not self._ready:
            key = next(key for key, _ in reversed(self._queue) if key in self._kept)
        else:
            return False
        self._free.append(self._kept.pop(key))
        return True

    def _least(self, layer: Hashable, idle: list[tuple[Hashable, int]]) -> tuple[Hashable, int]:
        has = Counter(owner for owner, _ in self._kept)
        when = {owner: turn for turn, owner in enumerate(self._ran)}
        richest = max({owner for owner, _ in idle}, key=lambda owner: (has[owner], when[owner]))
        own = any(owner == layer for owner, _ in idle)
        giver = layer if own and has[richest] < has[layer] + 2 else richest
        return next(key for key in idle if key[0] == giver)
