"""Groups on their way through a device's slots in an order that nobody has told: it is learned from the calls."""

from __future__ import annotations

from dispatch.slots import SlotRing
from dispatch.stream import GroupStream, StreamedGroup


class LearnedStream(GroupStream):
    """Prefetches after each group the one that followed it last, at first the next in the order given.

    Where another follows than was expected, nothing is fetched ahead there until the same one has followed twice: a
    router's choices would else be copied for nothing. Modules that run inside others take as many slots as they need.
    """

    def __init__(self, ring: SlotRing, groups: list[StreamedGroup]):
        super().__init__(ring, groups)
        self._follows = {index: (index + 1) % len(groups) for index in range(len(groups))}
        self._unsure: set[int] = set()
        self._ran: int | None = None

    def _after(self, index: int) -> int | None:
        return None if index in self._unsure else self._follows[index]

    def _pass_over(self, index: int) -> None:
        """Learn what follows what, and drop what was fetched ahead in vain."""
        if self._ran is not None:
            if self._follows[self._ran] == index:
                self._unsure.discard(self._ran)
            else:
                self._follows[self._ran] = index
                self._unsure.add(self._ran)
        self._ran = index
        while self._pending and self._pending[0][0] != index:
            self._free.append(self._pending.popleft()[1])
        if not self._pending:
            self._next = index

    def _make_room(self, group: StreamedGroup) -> None:
        if not self._free and not self._pending:
            self._free.append(self.ring.add())
        super()._make_room(group)
