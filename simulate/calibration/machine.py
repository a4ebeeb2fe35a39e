"""Figures → the Hardware of the machine at hand: what was measured instead of what is assumed."""

from __future__ import annotations

import contextlib
import mmap
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from planner.hardware import Device, Hardware, Link, Shared
from simulate.calibration import decoder, disk, gpu, processor, together
from simulate.calibration.figures import Figure, Meter, mean_of

# Seconds for one figure, and bytes of the file that reads are timed with.
SECONDS, QUICK_SECONDS = 0.3, 0.02
# The processor's figures are taken in so many rounds, so that each meets the machine at several times.
ROUNDS = 3
FILE_BYTES, QUICK_FILE_BYTES = 512 * 2**20, 128 * 2**20
# Of the products, where it has to be quick; what lies between is interpolated.
_QUICK_WIDTHS, _QUICK_ROWS = (2048,), (1, 16, 256)
_QUICK_SLICES: dict[str, tuple[int, ...]] = {"widths": (32768,), "inputs": (1024,)}
# Two links of which both together reach less than this part of their sum share a root.
_ALONE = 0.9
_GPU_WIDTHS, _GPU_ROWS = (2048, 8192), (1, 16, 256, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was measured, and the machine that it makes."""

    hardware: Hardware
    figures: tuple[Figure, ...]


def calibrate(
    *,
    quick: bool = False,
    seconds: float | None = None,
    folder: str | Path = ".",
    hardware: Hardware | None = None,
    clock: Callable[[], float] = time.perf_counter,
    report: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Measure this machine.

    quick: fewer sizes and samples. seconds: for one figure. folder: whose disk is measured.
    hardware: what it is but for the rates; `Hardware.local()` where None.

    Raises:
        InputError: the folder cannot be written to.
    """
    hardware = Hardware.local() if hardware is None else hardware
    meter = Meter(seconds=seconds or (QUICK_SECONDS if quick else SECONDS / ROUNDS), clock=clock, report=report)
    held = _Held(hardware)
    with torch.no_grad():
        _processor(held, meter, quick=quick)
        _disk(held, meter, Path(folder), QUICK_FILE_BYTES if quick else FILE_BYTES)
        devices = [torch.device(device.name) for device in hardware.gpus]
        for device in devices:
            _gpu(held, meter, device)
        _between(held, meter, devices)
        if devices:
            _roots(held, meter, devices)
    return held.calibration()


@dataclass
class _Held:
    """What is measured so far."""

    hardware: Hardware
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)

    def take(self, *figures: Figure) -> None:
        self.figures += figures

    def put(self, device: Device) -> None:
        devices = tuple(device if each.name == device.name else each for each in self.hardware.devices)
        self.hardware = replace(self.hardware, devices=devices)

    def link(self, link: Link) -> None:
        ends = (link.source, link.target)
        links = tuple(link if (each.source, each.target) == ends else each for each in self.hardware.links)
        self.hardware = replace(self.hardware, links=links)

    def calibration(self) -> Calibration:
        hardware = replace(
            self.hardware,
            shared=(*self.hardware.shared, *self.shared),
            assumptions=(*_left(self.hardware.assumptions), *self.notes),
        )
        hardware.check()
        return Calibration(hardware=hardware, figures=tuple(self.figures))


def _left(notes: Iterable[str]) -> Iterator[str]:
    """Yield the assumptions of `Hardware.local` without what is measured now."""
    for note in notes:
        if note.startswith("CPU of this machine:"):
            yield note.partition(",")[0]
        elif note.startswith("disk"):
            yield note.partition("; what reading reaches")[0].partition(", read at")[0]
        elif not note.startswith(("CPU: ", "host to GPU ")) and "host time for an operator" not in note:
            yield note


def _processor(held: _Held, meter: Meter, *, quick: bool) -> None:
    widths = _QUICK_WIDTHS if quick else processor.WIDTHS
    rows = _QUICK_ROWS if quick else processor.ROWS
    attention = _QUICK_ROWS if quick else processor.ATTENTION_ROWS
    found = [_round(meter, widths, rows, attention, quick=quick) for _ in range(1 if quick else ROUNDS)]
    measured = []
    for each in zip(*(one.products for one in found), strict=True):
        figure = mean_of([figure for _, figure in each])
        measured.append((replace(each[0][0], flops_per_s=figure.value), figure))
    others = [mean_of(each) for each in zip(*(each.others for each in found), strict=True)]
    overheads, activations = (
        [figure for figure in others if figure.group == name] for name in ("operators", "activations")
    )
    read, copied = others[-2:]
    held.take(*(figure for _, figure in measured), *activations, *overheads, read, copied)
    cpu = held.hardware.device("cpu")
    held.put(
        replace(
            cpu,
            flops_per_s=_best(measured),
            bytes_per_s=read.value,
            operator_ns=round(statistics.mean(figure.value for figure in overheads)),
            matmuls=tuple(rate for rate, _ in measured),
            # Bytes take their time one after the other, so that the mean is that of times.
            activation_bytes_per_s=round(statistics.harmonic_mean([figure.value for figure in activations])),
            spread=_spread([figure for _, figure in measured]),
        )
    )
    threads = torch.get_num_threads()
    held.notes.append(f"the CPU's rates were measured with torch {torch.__version__} on {threads} threads")
    computing, copying = together.computing(), together.copying()
    beside = together.pair(meter, computing, copying)
    held.take(*beside)
    # No memory reaches less for two than for one of them.
    most = max(beside[2].value, read.value)
    held.shared.append(Shared(name="cpu memory", bytes_per_s=most, users=("cpu", *_links_at(held.hardware, "cpu"))))


@dataclass(frozen=True, slots=True)
class _Round:
    """Every figure of the processor once. others: operators, activations, reading and copying."""

    products: processor.Measured
    others: tuple[Figure, ...]


def _round(
    meter: Meter, widths: tuple[int, ...], rows: tuple[int, ...], attention: tuple[int, ...], *, quick: bool
) -> _Round:
    products: processor.Measured = []
    others: list[Figure] = []
    for dtype in processor.DTYPES:
        products += processor.matmuls(meter, dtype, widths=widths, rows=rows)
        products += processor.slices(meter, dtype, **(_QUICK_SLICES if quick else {}))
        products += processor.attention(meter, dtype, rows=attention)
        overhead = decoder.operators(meter, dtype)
        others += [overhead, decoder.activations(meter, dtype, overhead.value)]
    return _Round(products, (*others, processor.memory_read(meter), processor.memory_copy(meter)))


def _best(measured: processor.Measured) -> dict[str, int]:
    """Return the highest rate of each dtype; "default", for dtypes that were not measured, is the least of them."""
    best: dict[str, int] = {}
    for rate, _ in measured:
        best[rate.dtype] = max(best.get(rate.dtype, 0), rate.flops_per_s)
    return {**best, "default": min(best.values())}


def _spread(figures: list[Figure]) -> float:
    """Return the spread of a device: that of its figure in the middle, as a call is made of many."""
    return round(statistics.median(figure.spread for figure in figures), 4)


def _links_at(hardware: Hardware, name: str) -> tuple[str, ...]:
    """Return the links between a host and its GPUs: what the CPU reads of mapped files it computes with as it does."""
    ends = {name, *(gpu.name for gpu in hardware.gpus)}
    return tuple(
        f"{link.source}→{link.target}"
        for link in hardware.links
        if name in (link.source, link.target) and {link.source, link.target} <= ends
    )


def _disk(held: _Held, meter: Meter, folder: Path, nbytes: int) -> None:
    with disk.File(folder, nbytes) as file:
        latency = disk.latency(meter, file)
        warm = disk.mapped_compute(meter, file)
        direct = disk.direct_read(meter, file)
        read, cached = (disk.buffered_read(meter, file, cached=each) for each in (False, True))
        cold = disk.read_ahead(meter, file) or read
        held.take(*([] if direct is None else [direct]), read, cached, cold, warm, latency)
        with contextlib.closing(mmap.mmap(-1, disk.CHUNK_BYTES)) as buffer:
            held.take(*together.pair(meter, together.computing(), together.reading(file, file.descriptor, buffer)))
    held.link(
        replace(
            held.hardware.link("disk", "cpu"),
            bytes_per_s=read.value,
            mapped_bytes_per_s=cold.value,
            cached_bytes_per_s=cached.value,
            cached_mapped_bytes_per_s=warm.value,
            latency_ns=latency.value,
            spread=max(read.spread, cold.spread),
        )
    )
    held.notes.append(f"disk: measured in {folder.resolve()}; the page cache is taken not to hold what is read")


def _gpu(held: _Held, meter: Meter, device: torch.device) -> None:
    wait = gpu.waiting(device)
    measured: processor.Measured = []
    for dtype in gpu.DTYPES:
        measured += processor.matmuls(
            meter, dtype, device=device, widths=_GPU_WIDTHS, rows=_GPU_ROWS, kinds=("linear",), after=wait
        )
        measured += processor.attention(meter, dtype, device=device, after=wait)
    memory = gpu.memory(meter, device)
    overhead = decoder.operators(meter, torch.bfloat16, device=device)
    down, up, pageable = gpu.host_copies(meter, device)
    held.take(*(figure for _, figure in measured), memory, overhead)
    held.take(*down.by_size, *up.by_size, *pageable.by_size)
    known = held.hardware.device(str(device))
    held.put(
        replace(
            known,
            flops_per_s=_best(measured),
            bytes_per_s=memory.value,
            operator_ns=overhead.value,
            matmuls=tuple(rate for rate, _ in measured),
            spread=_spread([figure for _, figure in measured]),
        )
    )
    for ends, copied in ((("cpu", str(device)), down), ((str(device), "cpu"), up)):
        _copied(held, ends, copied)
    fraction = min(1.0, pageable.rate.value / down.rate.value)
    held.hardware = replace(held.hardware, pageable_fraction=round(fraction, 4))


def _copied(held: _Held, ends: tuple[str, str], copied: gpu.Copies) -> None:
    link = held.hardware.link(*ends)
    held.link(replace(link, bytes_per_s=copied.rate.value, latency_ns=copied.latency_ns, spread=copied.rate.spread))


def _between(
    held: _Held,
    meter: Meter,
    devices: list[torch.device],
    measure: Callable[[Meter, torch.device, torch.device], tuple[gpu.Copies, bool]] = gpu.between,
) -> None:
    """Measure copies between any two GPUs; where they corrupt what they bring, the way is through the host."""
    for source in devices:
        for target in devices:
            if source == target:
                continue
            copied, right = measure(meter, source, target)
            held.take(*copied.by_size)
            if right:
                _copied(held, (str(source), str(target)), copied)
                continue
            up, down = held.hardware.link(str(source), "cpu"), held.hardware.link("cpu", str(target))
            held.link(
                replace(
                    held.hardware.link(str(source), str(target)),
                    bytes_per_s=max(1, up.bytes_per_s * down.bytes_per_s // (up.bytes_per_s + down.bytes_per_s)),
                    latency_ns=up.latency_ns + down.latency_ns,
                    spread=max(up.spread, down.spread),
                )
            )
            held.notes.append(
                f"copies from {source} to {target} CORRUPT DATA: that link must not be used, and is taken to go "
                "through the host; see whether the IOMMU (ACS) is on, and set NCCL_P2P_DISABLE=1 for other programs"
            )


def _roots(held: _Held, meter: Meter, devices: list[torch.device]) -> None:
    """Measure two links at once; those that slow each other share a root."""
    for first, second in gpu.pairs(devices):
        each = together.pair(meter, first, second)
        held.take(*each)
        alone = sum(held.hardware.link(*work.name.split("→")).bytes_per_s for work in (first, second))
        if each[2].value < _ALONE * alone:
            users = (first.name, second.name)
            held.shared.append(
                Shared(name=f"root of {first.name}, {second.name}", bytes_per_s=each[2].value, users=users)
            )
