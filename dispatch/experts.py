"""One layer's fused experts, some on the device where the layer runs, the others streamed when the router asks."""

from __future__ import annotations

from collections import deque

import torch

from dispatch import place
from dispatch.slots import SlotRing
from dispatch.stores import Store


class StreamedExperts:
    """The source that `planner.execution.routed_experts` fetches from.

    Experts 0..len(resident)-1 are on the device; expert `len(resident) + i` waits in `waiting[i]`. Copies of the
    routed experts that wait begin as soon as the routing is known, as many at once as there are slots.
    """

    def __init__(
        self,
        ring: SlotRing,
        owners: dict[str, tuple[torch.nn.Module, str]],
        resident: list[dict[str, torch.Tensor]],
        waiting: list[Store],
    ):
        self.ring, self.owners = ring, owners
        self._resident, self._waiting = resident, waiting
        self._queue: deque[int] = deque()
        self._pending: deque[tuple[int, int]] = deque()
        self._free: deque[int] = deque()
        self._held: int | None = None
        self._meta = {name: place.get(*owner).to("meta") for name, owner in owners.items()}

    def leave(self) -> None:
        """Put the module's parameters on meta: `fetch` gives what is computed with."""
        for name, owner in self.owners.items():
            place.put(*owner, self._meta[name])

    def begin(self, module: torch.nn.Module, experts: list[int]) -> None:
        """Start copying the routed experts that wait, in order. All slots are free: layers run one after another."""
        self._queue = deque(expert for expert in experts if expert >= len(self._resident))
        self._pending.clear()
        self._free = deque(range(len(self.ring)))
        self._held = None
        self._copy()

    def fetch(self, expert: int) -> dict[str, torch.Tensor]:
        """Return an expert's tensors on the device; valid until the next `fetch` or `end`."""
        self.end()
        if expert < len(self._resident):
            return self._resident[expert]
        next_expert, slot = self._pending.popleft()
        assert next_expert == expert
        self._held = slot
        return self._waiting[expert - len(self._resident)].layout.views(self.ring.use(slot))

    def end(self) -> None:
        """Free the slot of the expert fetched last."""
        if self._held is not None:
            self.ring.release(self._held)
            self._free.append(self._held)
            self._held = None
        self._copy()

    def load(self) -> dict[str, torch.Tensor]:
        """Return the whole parameters, all experts of them, in host memory."""
        whole = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in self._meta.items()}
        for expert in range(len(self._resident) + len(self._waiting)):
            if expert < len(self._resident):
                tensors = self._resident[expert]
            else:
                tensors = self._waiting[expert - len(self._resident)].to_host()
            for name, tensor in tensors.items():
                whole[name][expert].copy_(tensor)
        return whole

    def restore(self, loaded: dict[str, torch.Tensor]) -> None:
        """Give the module what `load` returned."""
        for name, owner in self.owners.items():
            place.put(*owner, loaded[name])

    def _copy(self) -> None:
        while self._queue and self._free:
            expert, slot = self._queue[0], self._free[0]
            with self.ring.context():
                self.ring.copy(slot, self._waiting[expert - len(self._resident)])
            self._queue.popleft()
            self._free.popleft()
            self._pending.append((expert, slot))
