"""What is asked of a memory or a link by several at once: each by itself, then all together."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from simulate.calibration.disk import CHUNK_BYTES, File
from simulate.calibration.figures import Figure, Meter, rate_of
from simulate.calibration.processor import INPUTS, cache_bytes, rotated

_WINDOWS = 3


@dataclass(frozen=True, slots=True)
class Work:
    """Something to do again and again. nbytes: what one call reads and writes of the memory that is shared."""

    name: str
    call: Callable[[], object]
    nbytes: float


def together(
    meter: Meter, works: Sequence[Work], *, seconds: float, pause: Callable[[float], None] = time.sleep
) -> list[list[float]]:
    """Return for each work the rates that it reaches while all are done at once, one for each window of `seconds`."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(_WINDOWS):
        ended, begin = threading.Event(), threading.Barrier(len(works) + 1)
        rates = [0.0] * len(works)

        def loop(number: int, work: Work, ended: threading.Event, begin: threading.Barrier, rates: list[float]) -> None:
            begin.wait()
            started, count = meter.clock(), 0
            while not ended.is_set() or not count:
                work.call()
                count += 1
            rates[number] = count * work.nbytes / max(meter.clock() - started, 1e-9)

        threads = [
            threading.Thread(target=loop, args=(number, work, ended, begin, rates)) for number, work in enumerate(works)
        ]
        for thread in threads:
            thread.start()
        begin.wait()
        pause(seconds)
        ended.set()
        for thread in threads:
            thread.join()
        for number, rate in enumerate(rates):
            found[number].append(rate)
    return found


def pair(meter: Meter, first: Work, second: Work) -> tuple[Figure, Figure, Figure]:
    """Return what each of two reaches beside the other, and both together."""
    group = f"{first.name} + {second.name}"
    meter.report(f"measuring {group}")
    one, other = together(meter, (first, second), seconds=max(meter.seconds, 0.05))
    both = [a + b for a, b in zip(one, other, strict=True)]
    return (
        _reached(group, first.name, one),
        _reached(group, second.name, other),
        _reached(group, "together", both),
    )


def _reached(group: str, name: str, rates: Sequence[float]) -> Figure:
    return rate_of(group, name, "B/s", 1.0, (1 / max(rate, 1e-9) for rate in rates))


def computing() -> Work:
    """Return products that read their weights from memory, on all cores."""
    weights = rotated((8192, INPUTS), torch.float32)
    vector = torch.randn(1, 1, INPUTS)
    return Work("computing", lambda: functional.linear(vector, next(weights)), 8192.0 * INPUTS * 4)


def copying() -> Work:
    """Return copies from memory to memory by one thread, in pieces; they read and write."""
    nbytes = 2 * cache_bytes()
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    piece = 4 * 2**20
    at = [0]

    def copy() -> None:
        # Called through ctypes it leaves the interpreter to the other thread.
        ctypes.memmove(target.data_ptr() + at[0], source.data_ptr() + at[0], piece)
        at[0] = (at[0] + piece) % (nbytes - piece)

    return Work("copying", copy, 2.0 * piece)


def reading(file: File, descriptor: int, buffer: mmap.mmap) -> Work:
    """Return reads of a file into memory, in order."""
    at = [0]

    def read() -> None:
        os.preadv(descriptor, [buffer], at[0])
        at[0] = (at[0] + CHUNK_BYTES) % file.nbytes

    return Work("reading", read, float(CHUNK_BYTES))
