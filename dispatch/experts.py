"""One layer's fused experts, some on the device where the layer runs; the others are streamed when the router asks, or
computed by the CPU from where they wait.
"""

from __future__ import annotations

from collections import deque

import torch

from dispatch import place
from dispatch.slots import SlotRing
from dispatch.stores import HostStore, Store


class StreamedExperts:
    """The source that `planner.execution.routed_experts` fetches from.

    Experts 0..len(resident)-1 are on the device; expert `len(resident) + i` waits in `waiting[i]`. Copies of the
    routed experts that wait begin as soon as the routing is known, as many at once as there are slots.

    In calls of at most `cpu_up_to_tokens` the CPU computes those that wait, and nothing is copied; without a ring it
    does so in every call. Then all of them wait in host memory.
    """

    def __init__(
        self,
        ring: SlotRing | None,
        owners: dict[str, tuple[torch.nn.Module, str]],
        resident: list[dict[str, torch.Tensor]],
        waiting: list[Store],
        *,
        cpu_up_to_tokens: int = 0,
    ):
        self.ring, self.owners, self.cpu_up_to_tokens = ring, owners, cpu_up_to_tokens
        self._resident, self._waiting = resident, waiting
        self._on_host: list[dict[str, torch.Tensor]] = []
        if ring is None or cpu_up_to_tokens:
            self._on_host = [store.views() for store in waiting if isinstance(store, HostStore)]
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

    def host_from(self, tokens: int) -> int:
        """Return the first expert that waits if the CPU computes those in a call of so many tokens, else their number.

        A plan that has no slots for experts has no longer call; one that comes all the same is computed by the CPU too.
        """
        computes = self.ring is None or tokens <= self.cpu_up_to_tokens
        return len(self._resident) + (0 if computes else len(self._waiting))

    def begin(self, module: torch.nn.Module, experts: list[int]) -> None:
        """Start copying those of `experts` that wait, in order. All slots are free: layers run one after another."""
        self._queue = deque(expert for expert in experts if expert >= len(self._resident))
        self._pending.clear()
        self._free = deque(range(len(self.ring) if self.ring is not None else 0))
        self._held = None
        self._copy()

    def fetch(self, expert: int) -> dict[str, torch.Tensor]:
        """Return an expert's tensors on the device; valid until the next `fetch` or `end`."""
        self.end()
        if expert < len(self._resident):
            return self._resident[expert]
        next_expert, slot = self._pending.popleft()
        assert self.ring is not None
        assert next_expert == expert
        self._held = slot
        return self._waiting[expert - len(self._resident)].layout.views(self.ring.use(slot))

    def end(self) -> None:
        """Free the slot of the expert fetched last."""
        if self.ring is not None and self._held is not None:
            self.ring.release(self._held)
            self._free.append(self._held)
            self._held = None
        self._copy()

    def on_host(self, expert: int) -> dict[str, torch.Tensor]:
        """Return an expert's tensors in the host's memory, where they wait."""
        return self._on_host[expert - len(self._resident)]

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
        while self.ring is not None and self._queue and self._free:
            expert, slot = self._queue[0], self._free[0]
            with self.ring.context():
                self.ring.copy(slot, self._waiting[expert - len(self._resident)])
            self._queue.popleft()
            self._free.popleft()
            self._pending.append((expert, slot))
