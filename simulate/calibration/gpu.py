"""GPUs: their products, memory and host time, copies to and from the host by size, and copies between them, checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from simulate.calibration.figures import Figure, Meter
from simulate.calibration.together import Work

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Copies are timed at these sizes: the least gives the latency, the largest the rate.
COPY_BYTES = (4 * 2**10, 2**20, 16 * 2**20, 256 * 2**20)
# What is checked of a copy between GPUs.
CHECKED_BYTES = 64 * 2**20
_MEMORY_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Copies:
    """Copies of one way, by size: the rate of the largest and the time of the smallest, in ns."""

    by_size: tuple[Figure, ...]

    @property
    def rate(self) -> Figure:
        return self.by_size[-1]

    @property
    def latency_ns(self) -> int:
        return int(COPY_BYTES[0] * 1e9 / self.by_size[0].value)


def copies(
    meter: Meter,
    group: str,
    source: Callable[[int], torch.Tensor],
    target: Callable[[int], torch.Tensor],
    *,
    wait: Callable[[], object],
) -> Copies:
    """Time copies from tensors that `source` makes of so many bytes to those of `target`."""
    found = []
    for nbytes in COPY_BYTES:
        here, there = source(nbytes), target(nbytes)
        name = f"{nbytes // 2**10} KiB" if nbytes < 2**20 else f"{nbytes // 2**20} MiB"

        def call(here: torch.Tensor = here, there: torch.Tensor = there) -> None:
            there.copy_(here, non_blocking=True)

        found.append(meter.rate(group, name, "B/s", call, float(nbytes), after=wait))
    return Copies(tuple(found))


def arrives(copy: Callable[[torch.Tensor], torch.Tensor], *, nbytes: int = CHECKED_BYTES, times: int = 3) -> bool:
    """Tell whether what `copy` returns, brought to the host, is every time what it was given.

    Some systems corrupt copies between GPUs without any error, so each time other numbers are sent.
    """
    for seed in range(times):
        generator = torch.Generator().manual_seed(seed)
        sent = torch.randint(-(2**62), 2**62, (nbytes // 8,), generator=generator)
        if not torch.equal(copy(sent).cpu(), sent):
            return False
    return True


def memory(meter: Meter, device: torch.device) -> Figure:
    """Return what a GPU's memory reaches, a byte read and written counted twice."""
    source, target = (torch.empty(_MEMORY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return meter.rate(
        str(device), "memory", "B/s", lambda: target.copy_(source), 2.0 * _MEMORY_BYTES, after=waiting(device)
    )


def waiting(*devices: torch.device) -> Callable[[], None]:
    """Return what waits until devices have done what they were given."""

    def wait() -> None:
        for device in devices:
            torch.cuda.synchronize(device)

    return wait


def host_copies(meter: Meter, device: torch.device) -> tuple[Copies, Copies, Copies]:
    """Return copies to a GPU from pinned memory, back to it, and to the GPU from pageable memory."""

    def on_gpu(nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def pinned(nbytes: int) -> torch.Tensor:
        return torch.ones(nbytes, dtype=torch.uint8).pin_memory()

    def pageable(nbytes: int) -> torch.Tensor:
        return torch.ones(nbytes, dtype=torch.uint8)

    wait = waiting(device)
    return (
        copies(meter, f"cpu to {device}, pinned", pinned, on_gpu, wait=wait),
        copies(meter, f"{device} to cpu, pinned", on_gpu, pinned, wait=wait),
        copies(meter, f"cpu to {device}, pageable", pageable, on_gpu, wait=wait),
    )


def between(meter: Meter, source: torch.device, target: torch.device) -> tuple[Copies, bool]:
    """Return copies from one GPU to another, and whether what they bring is what was sent."""

    def on(device: torch.device) -> Callable[[int], torch.Tensor]:
        return lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=device)

    right = arrives(lambda sent: sent.to(source).to(target))
    return copies(meter, f"{source} to {target}", on(source), on(target), wait=waiting(source, target)), right


def host_link(device: torch.device, *, up: bool) -> Work:
    """Return copies of one way between pinned memory and a GPU, on a stream of their own."""
    stream = torch.cuda.Stream(device)
    inside = torch.empty(COPY_BYTES[-1], dtype=torch.uint8, device=device)
    outside = torch.ones(COPY_BYTES[-1], dtype=torch.uint8).pin_memory()

    def copy() -> None:
        with torch.cuda.stream(stream):
            (inside if up else outside).copy_(outside if up else inside, non_blocking=True)
        stream.synchronize()

    name = f"cpu→{device}" if up else f"{device}→cpu"
    return Work(name, copy, float(COPY_BYTES[-1]))


def pairs(devices: list[torch.device]) -> list[tuple[Work, Work]]:
    """Return the links to measure at once: both ways of each GPU, and the same way of any two."""
    works = {(device, up): host_link(device, up=up) for device in devices for up in (True, False)}
    found = [(works[device, True], works[device, False]) for device in devices]
    found += [(works[a, True], works[b, True]) for a, b in itertools.combinations(devices, 2)]
    return found
