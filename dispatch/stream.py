"""Whole groups on their way through a device's slots, in the order that the plan's steps give them."""

from __future__ import annotations

from collections import deque

import torch

from dispatch import place
from dispatch.slots import SlotRing
from dispatch.stores import Store
from planner.errors import InputError


class StreamedGroup:
    """A group whose weights wait elsewhere: which parameters become views of a slot while its module runs."""

    def __init__(self, name: str, owners: dict[str, tuple[torch.nn.Module, str]], store: Store):
        self.name, self.store, self._owners = name, store, owners
        self._away = {name: place.as_parameter(place.get(*owner).to("meta")) for name, owner in owners.items()}
        self._present: dict[int, dict[str, torch.nn.Parameter]] = {}

    def arrive(self, slot: int, slab: torch.Tensor) -> None:
        """Make the parameters views of a slot. The views are made once a slot, then kept."""
        if slot not in self._present:
            views = self.store.layout.views(slab).items()
            self._present[slot] = {name: place.as_parameter(view) for name, view in views}
        self._set(self._present[slot])

    def leave(self) -> None:
        """Put the parameters back on meta."""
        self._set(self._away)

    def load(self) -> dict[str, torch.nn.Parameter]:
        """Return the weights as parameters of their own in host memory."""
        return {name: place.as_parameter(tensor) for name, tensor in self.store.to_host().items()}

    def restore(self, loaded: dict[str, torch.nn.Parameter]) -> None:
        """Give the modules what `load` returned."""
        self._set(loaded)

    def _set(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        for name, (module, leaf) in self._owners.items():
            module._parameters[leaf] = parameters[name]


class GroupStream:
    """Prefetches the groups of one device in a circle. `acquire` and `release` come from the hooks of their modules.

    If a group is asked for that is not next (a pass was broken off, or a model runs its modules in an unusual order),
    what was prefetched is dropped and the circle goes on from there.
    """

    def __init__(self, ring: SlotRing, groups: list[StreamedGroup]):
        self.ring, self.groups = ring, groups
        self._position = {group.name: index for index, group in enumerate(groups)}
        self._pending: deque[tuple[int, int]] = deque()
        self._free: deque[int] = deque(range(len(ring)))
        self._held: dict[int, int] = {}
        self._next = 0

    def prefetch(self) -> None:
        """Begin as many copies as there are free slots."""
        while self._free and len(self._pending) + len(self._held) < len(self.groups):
            slot, index = self._free[0], self._next
            with self.ring.context():
                self.ring.copy(slot, self.groups[index].store)
            self._free.popleft()
            self._pending.append((index, slot))
            self._next = (index + 1) % len(self.groups)

    def acquire(self, group: StreamedGroup) -> None:
        """Bring a group's weights to the device for the module that is about to run.

        Raises:
            InputError: it runs inside modules that hold all slots.
        """
        index = self._position[group.name]
        if not self._pending or self._pending[0][0] != index:
            self._restart(index)
        self.prefetch()
        if not self._pending:
            holders = ", ".join(self.groups[held].name for held in self._held)
            raise InputError(
                f"{group.name} runs inside {holders}, which takes all {len(self.ring)} slots of {self.ring.device}: "
                f"plan with {len(self.ring) + 1} slots, or with one of these resident"
            )
        _, slot = self._pending.popleft()
        self._held[index] = slot
        group.arrive(slot, self.ring.use(slot))

    def release(self, group: StreamedGroup) -> None:
        """Free the slot of a group whose module has run, and go on prefetching into it."""
        slot = self._held.pop(self._position[group.name])
        group.leave()
        self.ring.release(slot)
        self._free.append(slot)
        self.prefetch()

    def recover(self) -> None:
        """Free the slots of groups that no module holds any more: between calls, after one that was interrupted where
        no hook could free them.
        """
        if not self._held and len(self._free) + len(self._pending) == len(self.ring):
            return
        for index in self._held:
            self.groups[index].leave()
        self._held.clear()
        self._pending.clear()
        for slot in range(len(self.ring)):
            self.ring.release(slot)
        self._free, self._next = deque(range(len(self.ring))), 0

    def _restart(self, index: int) -> None:
        for _, slot in self._pending:
            self._free.append(slot)
        self._pending.clear()
        self._next = index
