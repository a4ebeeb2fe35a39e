"""Static buffers on a device that streamed weights pass through, with the events that order their use.

On a CUDA device copies run on a stream of their own: a copy waits (on the device) until the last use of its slot has
ended, and a use waits for its copy. The host waits for neither, but it does read what comes from disk itself, and waits
before that until the staging memory is free. Elsewhere copies are done at once.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from dispatch.stores import DiskStore, Store, host_slab, new_slab


class SlotRing:
    """`count` slots of `slot_bytes`, used in turn. `staging`: whether disk reads pass through pinned host memory."""

    def __init__(self, device: torch.device, count: int, slot_bytes: int, *, staging: bool):
        self.device = device
        self._asynchronous = device.type == "cuda"
        self._slot_bytes = slot_bytes
        self.slabs = [new_slab(slot_bytes, device) for _ in range(count)]
        self._through_host = staging and device.type != "cpu"
        self._staging = [host_slab(slot_bytes, device) if self._through_host else None for _ in range(count)]
        self._stream: Any = None
        if self._asynchronous:
            self._stream = torch.cuda.Stream(device)
            # The slabs may be memory that kernels queued before are still reading.
            self._stream.wait_stream(torch.cuda.current_stream(device))
            for slab in self.slabs:
                slab.record_stream(self._stream)
        self._copied: list[Any] = [None] * count
        self._released: list[Any] = [None] * count

    def __len__(self) -> int:
        return len(self.slabs)

    def add(self) -> int:
        """Take memory for one slot more, and return it."""
        slab = new_slab(self._slot_bytes, self.device)
        if self._asynchronous:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            slab.record_stream(self._stream)
        self.slabs.append(slab)
        self._staging.append(host_slab(self._slot_bytes, self.device) if self._through_host else None)
        self._copied.append(None)
        self._released.append(None)
        return len(self.slabs) - 1

    def copy(self, slot: int, store: Store) -> None:
        """Begin to copy a store's weights into a slot, after whatever used the slot last."""
        staging = self._staging[slot]
        if not self._asynchronous:
            store.copy_to(self.slabs[slot], staging)
            return
        if isinstance(store, DiskStore) and self._copied[slot] is not None:
            # The host is about to overwrite the staging memory that the last copy may still be reading.
            self._copied[slot].synchronize()
        if self._released[slot] is not None:
            self._stream.wait_event(self._released[slot])
        with torch.cuda.stream(self._stream):
            store.copy_to(self.slabs[slot], staging)
            self._copied[slot] = self._stream.record_event()

    def use(self, slot: int) -> torch.Tensor:
        """Return a slot's slab once its copy is ordered before what the current stream does next."""
        if self._asynchronous:
            torch.cuda.current_stream(self.device).wait_event(self._copied[slot])
        return self.slabs[slot]

    def release(self, slot: int) -> None:
        """Say that what the current stream was given so far is the last use of a slot."""
        if self._asynchronous:
            self._released[slot] = torch.cuda.current_stream(self.device).record_event()

    def close(self) -> None:
        """Wait until no copy is under way: slots and the memory copied from may be given back after this."""
        if self._asynchronous:
            self._stream.synchronize()

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self._asynchronous else contextlib.nullcontext()
