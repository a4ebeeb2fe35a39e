"""Whole groups on their way through a device's slots, in the order that the plan's steps give them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from dispatch import place
from dispatch.away import away
from dispatch.changes import Changes
from dispatch.mover import changed
from dispatch.saved_weights import InHand, SavedWeights, memory_of, takes_hooks
from dispatch.slots import SlotRing
from dispatch.stores import Store
from planner.errors import InputError


class StreamedGroup:
    """A group whose weights wait elsewhere: which parameters become views of a slot while its module runs.

    layer: whose group it is; None where that is not known. stand_ins: what stands for weights of other groups, by the
    ids of these; a tied one has the same, so that tying it again changes nothing. tied: names of what waits under other
    names too.
    """

    def __init__(
        self,
        name: str,
        owners: dict[str, tuple[torch.nn.Module, str]],
        store: Store,
        *,
        layer: str | None = None,
        stand_ins: dict[int, torch.Tensor] | None = None,
        tied: Collection[str] = (),
    ):
        self.name, self.store, self.layer, self._owners = name, store, layer, owners
        # Whether each was to be trained, which no streamed one is; None of buffers.
        self._trained = {
            name: found.requires_grad if (found := module._parameters.get(leaf)) is not None else None
            for name, (module, leaf) in owners.items()
        }
        known = {} if stand_ins is None else stand_ins
        self._away = {
            name: known.setdefault(
                id(place.here(*owner)), away(place.get(*owner), parameter=self._trained[name] is not None)
            )
            for name, owner in owners.items()
        }
        self._present: dict[int, dict[str, torch.Tensor]] = {}
        # What `bring` found where the weights wait, with versions, until they leave.
        self._home: list[tuple[torch.Tensor, int]] = []
        # cuDNN's layers move their parameters to other memory when they run: what is in the slot is given anew.
        self._moves = any(isinstance(module, torch.nn.RNNBase) for module, _ in owners.values())
        buffers = [name for name, trained in self._trained.items() if trained is None]
        self._changes = Changes(owners, store, buffers=buffers, tied=tied, moves=self._moves)

    @property
    def names(self) -> tuple[str, ...]:
        """The full names of what is streamed."""
        return tuple(self._owners)

    def check(self) -> None:
        """Raise InputError if a parameter was replaced since the group left."""
        place.check_away(self._owners, self._away)

    def arrive(self, slot: int, slab: torch.Tensor) -> None:
        """Make the parameters views of a slot. The views are made once a slot, then kept."""
        if slot not in self._present or self._moves:
            self._present[slot] = self._made(self.store.layout.views(slab))
        self._begin(self._present[slot])

    def arrive_to_stay(self, slab: torch.Tensor) -> None:
        """Make the parameters views of memory of their own, a copy of a slot, which lives while autograd keeps it: for
        the transforms of torch.func, which take no hooks.
        """
        self._begin(self._made(self.store.layout.views(slab[: self.store.layout.nbytes].clone())))

    def keep_changes(self) -> None:
        """Write what the module's forward changed to where it waits.

        Raises:
            InputError: it cannot be written there.
        """
        self._changes.end()

    def bring(self, device: torch.device) -> None:
        """Make the parameters weights on a device, in memory of their own; on the CPU in that which they wait in."""
        waiting = self.store.where_they_wait()
        self._home = [(tensor, tensor._version) for tensor in waiting.values()]
        self._set(self._made({name: tensor.to(device) for name, tensor in waiting.items()}, trained=True))

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the weights on a device as `bring` makes them the parameters."""
        found = {name: tensor.to(device) for name, tensor in self.store.where_they_wait().items()}
        return self._made(found, trained=True)

    def standing(self) -> dict[str, tuple[torch.Tensor, bool | None]]:
        """Return what stands for each weight while it is away, and whether that was to be trained, None of buffers."""
        return {name: (self._away[name], self._trained[name]) for name in self._owners}

    @property
    def is_away(self) -> bool:
        """Whether parameters are on meta, as the group left them."""
        return any(place.here(*owner) is self._away[name] for name, owner in self._owners.items())

    def present(self) -> dict[str, torch.Tensor]:
        """Return what is in place of the parameters and buffers now."""
        return {name: place.get(*owner) for name, owner in self._owners.items()}

    def leave(self) -> None:
        """Put the parameters back on meta."""
        self._set(self._away)
        if any(tensor._version != version for tensor, version in self._home):
            self.store.changes += 1
        self._home = []

    def load(self) -> dict[str, torch.Tensor]:
        """Return the weights as parameters of their own in host memory, to be trained if they were."""
        return self._made(self.store.to_host(), trained=True)

    def restore(self, loaded: dict[str, torch.Tensor]) -> None:
        """Give the modules what `load` returned, but for what somebody replaced or took away."""
        for name, owner in self._owners.items():
            if place.here(*owner) is self._away[name]:
                place.set_tensor(*owner, loaded[name])

    def _made(self, tensors: Mapping[str, torch.Tensor], *, trained: bool = False) -> dict[str, torch.Tensor]:
        """Return parameters of tensors, and buffers as they are."""
        # Changes of a buffer are counted by themselves, apart from those of the slab.
        return {
            name: tensor.data
            if self._trained[name] is None
            else place.as_parameter(tensor, requires_grad=trained and bool(self._trained[name]))
            for name, tensor in tensors.items()
        }

    def _begin(self, tensors: dict[str, torch.Tensor]) -> None:
        self._set(tensors)
        self._changes.begin(tensors)

    def _set(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, (module, leaf) in self._owners.items():
            place.set_tensor(module, leaf, tensors[name])


class GroupStream:
    """Prefetches the groups of one device in a circle. `acquire` and `release` come from the hooks of their modules.

    A group that is passed over while its layer runs (an expert that the router did not choose) is from then on fetched
    on demand: it leaves the circle, and one slot is left to such groups. Where whole layers are passed over, or a pass
    was broken off, what was prefetched is dropped and the circle goes on from the group that is asked for. The circle
    closes at the group that the last pass began with: steps of a decoder do not begin with its encoder.
    """

    def __init__(self, ring: SlotRing, groups: list[StreamedGroup]):
        self.ring, self.groups = ring, groups
        self._position = {group.name: index for index, group in enumerate(groups)}
        self.in_hand = InHand(ring)
        self._saved = [SavedWeights(self.in_hand) for _ in groups]
        self._pending: deque[tuple[int, int]] = deque()
        self._free: deque[int] = deque(range(len(ring)))
        self._held: dict[int, int] = {}
        self._on_demand: set[int] = set()
        self._next: int | None = 0
        self._first = 0
        self._last: str | None = None
        # The group whose module keeps other threads out while it runs.
        self.locked_by: StreamedGroup | None = None
        # The group of the circle that ran last.
        self._reached = len(groups) - 1

    def prefetch(self) -> None:
        """Begin as many copies as there are free slots, but one where groups are fetched on demand."""
        left = 1 if self._on_demand else 0
        while len(self._free) > left and self._next is not None and not self._is_here(self._next):
            index = self._next
            self._pending.append((index, self._copy(index)))

    def acquire(self, group: StreamedGroup) -> None:
        """Bring a group's weights to the device for the module that is about to run.

        Raises:
            InputError: it runs inside modules that hold all slots, or somebody replaced one of its parameters.
        """
        group.check()
        index = self._position[group.name]
        if index not in self._on_demand:
            self._pass_over(index)
            self._reached = index
        if self._pending and self._pending[0][0] == index:
            _, slot = self._pending.popleft()
        else:
            self._make_room(group)
            slot = self._copy(index)
        self._held[index], self._last = slot, group.layer
        self.prefetch()
        slab = self.ring.use(slot)
        if torch.is_grad_enabled() and not takes_hooks():
            group.arrive_to_stay(slab)
            return
        group.arrive(slot, slab)
        if torch.is_grad_enabled():
            self._saved[index].lies_in(slab, group.store)
            self._saved[index].begin()

    def apart(self, group: StreamedGroup, made: Any) -> Any:
        """Return what a group's module made, with copies of what in it are the weights themselves, or views of some."""
        slot = memory_of(self.ring.slabs[self._held[self._position[group.name]]])
        return changed(made, lambda tensor: tensor.clone() if memory_of(tensor) == slot else tensor)

    def release(self, group: StreamedGroup) -> None:
        """Free the slot of a group whose module has run, and go on prefetching into it."""
        index = self._position[group.name]
        self._saved[index].end()
        try:
            group.keep_changes()
        finally:
            # In this order, so that what was interrupted in between is still known to be held.
            group.leave()
            slot = self._held.pop(index)
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
        self._free, self._last = deque(range(len(self.ring))), None
        self._reached = len(self.groups) - 1
        self._next = self._after(self._reached)

    @property
    def is_busy(self) -> bool:
        """Whether a module is running with its weights in a slot."""
        return bool(self._held)

    def drop(self) -> None:
        """Let go of what was copied ahead: it may have changed where it waits."""
        if self._pending:
            self._next = self._pending[0][0]
        while self._pending:
            self._free.append(self._pending.popleft()[1])

    def _is_here(self, index: int) -> bool:
        return index in self._held or any(index == pending for pending, _ in self._pending)

    def _copy(self, index: int) -> int:
        """Begin a group's copy into a free slot, and return that."""
        slot = self._free[0]
        with self.ring.context():
            self.ring.copy(slot, self.groups[index].store)
        self._free.popleft()
        if index not in self._on_demand:
            self._next = self._after(index)
        return slot

    def _make_room(self, group: StreamedGroup) -> None:
        if not self._free and self._pending:
            self._next, slot = self._pending.pop()
            self._free.append(slot)
        if not self._free:
            holders = ", ".join(self.groups[held].name for held in self._held)
            raise InputError(
                f"{group.name} runs inside {holders}, which takes all {len(self.ring)} slots of {self.ring.device}: "
                f"plan with {len(self.ring) + 1} slots, or with one of these resident"
            )

    def _after(self, index: int) -> int | None:
        """Return the next group in the circle, which may be the same."""
        around = itertools.chain(range(index + 1, len(self.groups)), self._around(self._first))
        return next((each for each in around if each not in self._on_demand), None)

    def _around(self, index: int) -> Iterator[int]:
        """Yield all groups once, from `index` on."""
        return itertools.chain(range(index, len(self.groups)), range(index))

    def _pass_over(self, index: int) -> None:
        """Go on to a group of the circle, and take those out that were passed over while their layer ran."""
        expected = self._pending[0][0] if self._pending else self._next
        if expected is None or expected == index:
            return
        passed = itertools.takewhile(lambda each: each != index, self._around(expected))
        skipped = [each for each in passed if each not in self._on_demand]
        layer = self.groups[index].layer
        running = {layer, self._last} - {None}
        beside = [each for each in skipped if self.groups[each].layer in running]
        if expected <= self._reached:
            # A pass begins: elsewhere than the last one did, or with another choice in the same layer.
            if index < expected or self.groups[expected].layer != layer or layer is None:
                self._first, beside = index, []
        elif index < expected and len(beside) < len(skipped):
            # A pass that is begun anew was broken off, unless only groups of its last layer were left.
            beside = []
        self._on_demand.update(beside)
        while self._pending and self._pending[0][0] != index:
            self._free.append(self._pending.popleft()[1])
        if not self._pending:
            self._next = index
