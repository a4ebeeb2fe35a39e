"""One layer's fused experts, some on the device where the layer runs; the others are streamed when the router asks, or
computed by the CPU from where they wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Set

import torch

from dispatch import place
from dispatch.slots import SlotRing
from dispatch.stores import HostStore, Store

# Experts that the disk may be reading at once.
_ANNOUNCED = 4


class StreamedExperts:
    """The source that `planner.execution.routed_experts` fetches from.

    Experts are either `resident` on the device or wait in the stores of `waiting`, both by their numbers. Copies of the
    routed experts that wait begin as soon as the routing is known, as many at once as there are slots.

    In calls of at most `cpu_up_to_tokens` the CPU computes those that wait, and nothing is copied; without a ring it
    does so in every call. Then all of them wait in host memory.
    """

    def __init__(
        self,
        ring: SlotRing | None,
        owners: dict[str, tuple[torch.nn.Module, str]],
        resident: Mapping[int, dict[str, torch.Tensor]],
        waiting: Mapping[int, Store],
        *,
        cpu_up_to_tokens: int = 0,
    ):
        self.ring, self.owners, self.cpu_up_to_tokens = ring, owners, cpu_up_to_tokens
        self._resident, self._waiting = resident, waiting
        self._on_host: dict[int, dict[str, torch.Tensor]] = {}
        if ring is None or cpu_up_to_tokens:
            self._on_host = {n: store.views() for n, store in waiting.items() if isinstance(store, HostStore)}
            assert len(self._on_host) == len(waiting)
        self._queue: deque[int] = deque()
        self._pending: deque[tuple[int, int]] = deque()
        self._free: deque[int] = deque()
        self._held: int | None = None
        self._meta = {name: place.get(*owner).to("meta") for name, owner in owners.items()}

    def leave(self) -> None:
        """Put the module's parameters on meta: `fetch` gives what is computed with."""
        for name, owner in self.owners.items():
            place.put(*owner, self._meta[name])

    def host_computes(self, tokens: int) -> Set[int]:
        """Return the experts that wait if the CPU computes them in a call of so many tokens, else none.

        A plan that has no slots for experts has no longer call; one that comes all the same is computed by the CPU too.
        """
        computes = self.ring is None or tokens <= self.cpu_up_to_tokens
        return self._waiting.keys() if computes else frozenset()

    def begin(self, module: torch.nn.Module, experts: list[int]) -> None:
        """Start copying those of `experts` that wait, in order. All slots are free: layers run one after another."""
        self._queue = deque(expert for expert in experts if expert in self._waiting)
        self._pending.clear()
        self._free = deque(range(len(self.ring) if self.ring is not None else 0))
        self._held = None
        for expert in list(self._queue)[:_ANNOUNCED]:
            self._waiting[expert].announce()
        self._copy()

    def fetch(self, expert: int) -> dict[str, torch.Tensor]:
        """Return an expert's tensors on the device; valid until the next `fetch` or `end`."""
        self.end()
        if expert in self._resident:
            return self._resident[expert]
        next_expert, slot = self._pending.popleft()
        assert self.ring is not None
        assert next_expert == expert
        self._held = slot
        return self._waiting[expert].layout.views(self.ring.use(slot))

    def end(self) -> None:
        """Free the slot of the expert fetched last."""
        if self.ring is not None and self._held is not None:
            self.ring.release(self._held)
            self._free.append(self._held)
            self._held = None
        self._copy()

    def on_host(self, expert: int) -> dict[str, torch.Tensor]:
        """Return an expert's tensors in the host's memory, where they wait."""
        return self._on_host[expert]

    def load(self) -> dict[str, torch.Tensor]:
        """Return the whole parameters, all experts of them, in host memory."""
        whole = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in self._meta.items()}
        for expert, tensors in self._resident.items():
            for name, tensor in tensors.items():
                whole[name][expert].copy_(tensor)
        for expert, store in self._waiting.items():
            for name, tensor in store.to_host().items():
                whole[name][expert].copy_(tensor)
        return whole

    def restore(self, loaded: dict[str, torch.Tensor]) -> None:
        """Give the module what `load` returned."""
        for name, owner in self.owners.items():
            place.put(*owner, loaded[name])

    def _copy(self) -> None:
        while self.ring is not None and self._queue and self._free:
            expert, slot = self._queue[0], self._free[0]
            with self.ring.context():
                self.ring.copy(slot, self._waiting[expert])
            self._queue.popleft()
            self._free.popleft()
            if len(self._queue) >= _ANNOUNCED:
                self._waiting[self._queue[_ANNOUNCED - 1]].announce()
            self._pending.append((expert, slot))
