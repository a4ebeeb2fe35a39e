"""Static buffers on a device that streamed weights pass through, with the events that order their use.

On a CUDA device copies run on streams of their own: a copy waits (on the device) until the last use of its slot has
ended, and a use waits for its copy. The host waits for neither, but where bytes from disk have not come when they are
needed: these are read by threads of their own (`dispatch.staging`). Elsewhere copies are done at once.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from dispatch.staging import Lane, Reading, Staging
from dispatch.stores import DiskStore, Store, host_slab, new_slab


def reads_behind(device: torch.device) -> bool:
    """Tell whether what comes from disk is read while others launch: where copies overlap with anything."""
    return device.type == "cuda"


class SlotRing:
    """`count` slots of `slot_bytes`, used in turn. `staging`: whether disk reads pass through pinned host memory, of as
    many bytes as the slots.
    """

    def __init__(self, device: torch.device, count: int, slot_bytes: int, *, staging: bool):
        self.device = device
        self._asynchronous = device.type == "cuda"
        self._slot_bytes = slot_bytes
        self.slabs = [new_slab(slot_bytes, device) for _ in range(count)]
        self._staging: Staging | None = None
        self._through: torch.Tensor | None = None
        if staging and reads_behind(device):
            self._staging = Staging(device, count * slot_bytes)
        elif staging and device.type != "cpu":
            self._through = host_slab(count * slot_bytes, device)
        self._lanes = [Lane(device) for _ in range(count if self._staging is not None else 0)]
        self._readings: list[Reading | None] = [None] * count
        self._stream: Any = None
        if self._asynchronous:
            self._stream = torch.cuda.Stream(device)
            # The slabs may be memory that kernels queued before are still reading.
            for stream in (self._stream, *(lane.stream for lane in self._lanes)):
                stream.wait_stream(torch.cuda.current_stream(device))
                for slab in self.slabs:
                    slab.record_stream(stream)
        self._copied: list[Any] = [None] * count
        self._released: list[Any] = [None] * count
        # After the last of the copies that `bring` made.
        self._brought: Any = None

    def __len__(self) -> int:
        return len(self.slabs)

    def add(self) -> int:
        """Take memory for one slot more, and return it."""
        slab = new_slab(self._slot_bytes, self.device)
        if self._asynchronous:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            slab.record_stream(self._stream)
        self.slabs.append(slab)
        if self._staging is not None:
            self._lanes.append(Lane(self.device))
        self._readings.append(None)
        self._copied.append(None)
        self._released.append(None)
        return len(self.slabs) - 1

    def copy(self, slot: int, store: Store) -> None:
        """Begin to copy a store's weights into a slot, after whatever used the slot last."""
        before = self._readings[slot]
        if before is not None:
            before.give_up()
        if self._staging is not None and isinstance(store, DiskStore):
            lane = self._lanes[slot]
            lane.after(self._copied[slot])
            lane.after(self._released[slot])
            self._readings[slot] = reading = self._staging.reading(store, self.slabs[slot], lane)
            self._staging.begin(reading)
            return
        self._readings[slot] = None
        if not self._asynchronous:
            store.copy_to(self.slabs[slot], self._through)
            return
        if before is not None:
            self._stream.wait_stream(self._lanes[slot].stream)
        if self._released[slot] is not None:
            self._stream.wait_event(self._released[slot])
        with torch.cuda.stream(self._stream):
            store.copy_to(self.slabs[slot], None)
            self._copied[slot] = self._stream.record_event()

    def bring(self, store: Store) -> torch.Tensor:
        """Return a slab of its own with a store's weights, ordered before what the current stream does next.

        Raises:
            InputError: they cannot be read any more.
        """
        slab = new_slab(store.layout.nbytes, self.device)
        if not isinstance(store, DiskStore):
            store.copy_to(slab, None)
        else:
            store.checkpoint.check_unchanged()
            if self._staging is None:
                through = slab if self.device.type == "cpu" else new_slab(slab.nbytes, torch.device("cpu"))
                store.copy_to(slab, through)
                return slab
            lane, current = Lane(self.device), torch.cuda.current_stream(self.device)
            slab.record_stream(lane.stream)
            lane.after(current.record_event())
            reading = self._staging.reading(store, slab, lane)
            self._staging.begin(reading)
            current.wait_event(reading.wait())
        if self._asynchronous:
            self._brought = torch.cuda.current_stream(self.device).record_event()
        return slab

    def stream(self) -> Any:
        """Return what tells the current stream of the device from others; None where there is but one."""
        return torch.cuda.current_stream(self.device).cuda_stream if self._asynchronous else None

    def announce(self, store: Store) -> None:
        """Say that a store will be copied soon, where that is of use."""
        if self._staging is None:
            store.announce()

    def use(self, slot: int) -> torch.Tensor:
        """Return a slot's slab once its copy is ordered before what the current stream does next.

        Raises:
            InputError: what was to come from disk cannot be read.
        """
        reading = self._readings[slot]
        if reading is not None:
            self._copied[slot] = reading.wait()
        if self._asynchronous:
            torch.cuda.current_stream(self.device).wait_event(self._copied[slot])
        return self.slabs[slot]

    def has_failed(self, slot: int) -> bool:
        """Tell whether what was to come into a slot could not be read."""
        reading = self._readings[slot]
        return reading is not None and reading.has_failed

    def release(self, slot: int) -> None:
        """Say that what the current stream was given so far is the last use of a slot."""
        if self._asynchronous:
            self._released[slot] = torch.cuda.current_stream(self.device).record_event()

    def close(self) -> None:
        """Wait until no copy is under way: slots and the memory copied from may be given back after this."""
        for reading in self._readings:
            if reading is not None:
                reading.settle()
        if self._asynchronous:
            for stream in (self._stream, *(lane.stream for lane in self._lanes)):
                stream.synchronize()
        if self._brought is not None:
            self._brought.synchronize()

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self._asynchronous else contextlib.nullcontext()
