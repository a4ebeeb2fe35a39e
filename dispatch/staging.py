"""Reads from disk on their way to a device, by threads of their own: through pinned buffers, part by part.

The thread that launches operators says what is to be read, in the order in which it will be needed, and waits only
where a group is needed whose bytes have not come yet. Several parts are read at once; each is copied to the device as
soon as it is there, in the order of its slot's lane.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dispatch import buffers
from dispatch.checkpoint import Checkpoint, TensorEntry
from dispatch.direct import BLOCK_BYTES
from dispatch.stores import DiskStore, host_slab
from planner.loading import BUFFER_BYTES, READERS


class Lane:
    """What orders the copies into one slot: a stream on a CUDA device; elsewhere each is done at once."""

    def __init__(self, device: torch.device):
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after(self, event: Any) -> None:
        """Let what comes wait for an event, if there is one."""
        if self.stream is not None and event is not None:
            self.stream.wait_event(event)

    def copy(self, place: torch.Tensor, data: torch.Tensor) -> None:
        """Begin to copy host memory to its place on the device."""
        if self.stream is None:
            place.copy_(data)
            return
        with torch.cuda.stream(self.stream):
            place.copy_(data, non_blocking=True)

    def mark(self) -> Any:
        """Return an event after all copies so far, with `synchronize`; None where they are done."""
        return None if self.stream is None else self.stream.record_event()


class Staging:
    """`nbytes` of host memory in buffers that reads pass through, pinned for `device`, and the threads that read.

    There are at least as many buffers as threads, so that all of them read at once, and none is longer than loading's.
    """

    def __init__(self, device: torch.device, nbytes: int):
        count = max(READERS, nbytes // BUFFER_BYTES)
        self.buffer_bytes = min(nbytes // count, BUFFER_BYTES)
        if self.buffer_bytes >= BLOCK_BYTES:
            self.buffer_bytes -= self.buffer_bytes % BLOCK_BYTES
        slab = host_slab(nbytes, device)
        self._free: queue.SimpleQueue[_Lent] = queue.SimpleQueue()
        for start in range(0, count * self.buffer_bytes, self.buffer_bytes):
            self._free.put(_Lent(slab[start : start + self.buffer_bytes]))
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threads = [
            threading.Thread(target=_work, args=(self._tasks,), name="loadplan disk", daemon=True)
            for _ in range(READERS)
        ]
        for thread in threads:
            thread.start()
        # At exit too: nothing is read into memory that is given back.
        weakref.finalize(self, _stop, self._tasks, threads)

    def reading(self, store: DiskStore, slab: torch.Tensor, lane: Lane) -> Reading:
        """Return how a store's weights will come into `slab` on the device, in the order of `lane`."""
        brings = []
        for entry, start, stop, place in store.ranges(slab):
            if not place.is_contiguous() or place.dtype != entry.dtype:
                brings.append(partial(self._convert, store.checkpoint, lane, entry, start, place))
                continue
            flat = place.view(-1).view(torch.uint8)
            for begin, end in store.checkpoint.windows(entry, start, stop, self.buffer_bytes):
                part = flat[begin - start : end - start]
                brings.append(partial(self._bring, store.checkpoint, lane, entry, begin, end, part))
        return Reading(lane, brings)

    def begin(self, reading: Reading) -> None:
        """Let the readers begin, once they are through with what was begun before."""
        for bring in reading.brings:
            self._tasks.put(partial(reading.run, bring))
        reading.has_begun = True

    def _bring(
        self, checkpoint: Checkpoint, lane: Lane, entry: TensorEntry, start: int, stop: int, part: torch.Tensor
    ) -> None:
        with self._lend() as lent:
            lane.copy(part, checkpoint.read_window(entry, lent.buffer, start, stop))
            lent.copied = lane.mark()

    def _convert(self, checkpoint: Checkpoint, lane: Lane, entry: TensorEntry, start: int, place: torch.Tensor) -> None:
        with self._lend() as lent:
            for part, data in buffers.parts(checkpoint, entry, start, place, lent.buffer, convert=True):
                lane.copy(part, data)
                lent.copied = lane.mark()
                lent.wait()

    @contextmanager
    def _lend(self) -> Iterator[_Lent]:
        lent = self._free.get()
        try:
            lent.wait()
            yield lent
        finally:
            self._free.put(lent)


@dataclass(slots=True)
class _Lent:
    """One buffer, and the event after the copy that reads it last."""

    buffer: torch.Tensor
    copied: Any = None

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


class Reading:
    """One store on its way into a slot. `wait`, `settle` and `give_up` come from the launching thread, which may be
    interrupted anywhere; `run` from readers.

    brings: bring a part each. has_begun: whether readers were told of all of them.
    """

    def __init__(self, lane: Lane, brings: Sequence[Callable[[], None]]):
        self.brings, self.has_begun = brings, False
        self._lane, self._left, self._under_way = lane, len(brings), 0
        self._is_given_up = False
        self._failure: BaseException | None = None
        self._copied: Any = None
        self._lock = threading.Lock()
        # Held until nothing is under way any more: a wait for a lock of the interpreter's own can be interrupted.
        self._under = threading.Lock()
        self._under.acquire()
        self._has_ended = False
        self._end(done=not brings)

    def run(self, bring: Callable[[], None]) -> None:
        """Bring one part, unless nobody wants it any more."""
        with self._lock:
            if self._is_given_up or self._failure is not None:
                return
            self._under_way += 1
        failure = None
        try:
            bring()
        except BaseException as exc:  # for the launching thread, which waits for it
            failure = exc
        with self._lock:
            self._under_way -= 1
            self._left -= 1
            self._failure = self._failure or failure
            stopped = self._is_given_up or self._failure is not None
            self._end(done=self._under_way == 0 and (stopped or self._left == 0))

    def wait(self) -> Any:
        """Wait until all copies are in the lane; return the event after them.

        Raises:
            InputError: the file cannot be read any more.
        """
        self.settle()
        if self._failure is not None:
            raise self._failure
        return self._copied

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    def settle(self) -> None:
        """Wait until nothing is read any more, however that came; what readers were not told of whole is given up."""
        if not self.has_begun:
            self.give_up()
        while not self._has_ended:
            self._under.acquire()

    def give_up(self) -> None:
        """Let no more be read, and wait until nothing is."""
        with self._lock:
            self._is_given_up = True
            self._end(done=self._under_way == 0)
        while not self._has_ended:
            self._under.acquire()

    def _end(self, *, done: bool) -> None:
        if done and not self._has_ended:
            if self._left == 0:
                self._copied = self._lane.mark()
            self._has_ended = True
            self._under.release()


def _work(tasks: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while True:
        task = tasks.get()
        if task is None:
            return
        task()
        del task  # or what it refers to would live until the next


def _stop(tasks: queue.SimpleQueue[Callable[[], None] | None], threads: list[threading.Thread]) -> None:
    """Let the readers end after what they are reading now."""
    try:
        while True:
            tasks.get_nowait()
    except queue.Empty:
        pass
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
