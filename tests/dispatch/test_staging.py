"""Reading from disk behind the thread that launches: the CPU plays the GPU, and copies come as late as they may."""

from __future__ import annotations

import dataclasses
import gc
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import dispatch
from dispatch import direct, page_cache
from dispatch.checkpoint import Checkpoint
from dispatch.direct import BLOCK_BYTES
from dispatch.slots import SlotRing
from dispatch.sources import Piece, TensorSource
from dispatch.staging import Lane, Staging
from dispatch.stores import DiskStore, Layout
from interrupts import interrupt
from planner.errors import InputError
from planner.loading import READERS
from planner.plan import Plan
from tiny_models import Case, on_cpu, spread_over_two, streamed, with_slots

CPU = torch.device("cpu")
PROMPT_SECONDS = 20

pytestmark = pytest.mark.usefixtures("one_thread")


class LateLane(Lane):
    """Copies are done when an event after them is waited for, and from what their buffers hold then."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._done = 0
        self._lock = threading.Lock()

    def copy(self, place: torch.Tensor, data: torch.Tensor) -> None:
        with self._lock:
            self._waiting.append((place, data))

    def mark(self) -> Any:
        return LateEvent(self, len(self._waiting))

    def reach(self, number: int) -> None:
        with self._lock:
            for place, data in self._waiting[self._done : number]:
                place.copy_(data)
            self._done = max(self._done, number)


class LateEvent:
    def __init__(self, lane: LateLane, number: int):
        self.lane, self.number = lane, number

    def synchronize(self) -> None:
        self.lane.reach(self.number)


class BehindRing(SlotRing):
    """A slot is garbage from the moment that it is copied to, as on a GPU at worst; a use waits for what is copied."""

    def copy(self, slot: int, store: Any) -> None:
        self.slabs[slot].fill_(0xFF)
        super().copy(slot, store)

    def use(self, slot: int) -> torch.Tensor:
        slab = super().use(slot)
        if self._copied[slot] is not None:
            self._copied[slot].synchronize()
        return slab


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatch.slots.reads_behind", lambda device: True)
    monkeypatch.setattr("dispatch.slots.Lane", LateLane)
    monkeypatch.setattr("dispatch.preparation.SlotRing", BehindRing)


def applied(case: Case, plan: Plan) -> Any:
    case.run_like(plan)
    return dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))


def on_disk(case: Case) -> Plan:
    return streamed(case.plan(gpus="1x24GB"), "disk")


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize(("name", "count"), [("llama", 1), ("llama", 3), ("mixtral", 1), ("mixtral", 2), ("gpt2", 2)])
def test_same_bits(make_case: Any, name: str, count: int) -> None:
    case = make_case(name)
    plan = with_slots(spread_over_two(streamed(case.plan(gpus="2x24GB"), "disk")), count)
    model = applied(case, plan)
    want, tokens = case.logits(case.reference), case.generate(case.reference)
    for _ in range(2):
        assert torch.equal(case.logits(model), want)
        assert torch.equal(case.generate(model), tokens)
    assert torch.equal(case.logits(dispatch.remove(model)), want)


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize("most", [200, 10_000])
def test_another_dtype_and_small_buffers(make_case: Any, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Stored in float32 and run in bfloat16: what is converted and what is not passes through the same buffers."""
    monkeypatch.setattr("dispatch.staging.BUFFER_BYTES", most)
    case = make_case("mixtral", torch.float32)
    case.dtype = torch.bfloat16
    case.reference = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.bfloat16)
    model = applied(case, on_disk(case))
    assert torch.equal(case.logits(model), case.logits(case.reference))


@pytest.mark.usefixtures("behind")
def test_homes_that_take_turns_in_a_slot(make_case: Any) -> None:
    """Every second group waits in memory, so that slots are filled from there and from disk in turn."""
    case = make_case("llama")
    plan = on_disk(case)
    waiting = [p for p in plan.placements if p.home == "disk"]
    changed = {id(p): dataclasses.replace(p, home="cpu", memory="pinned") for p in waiting[::3]}
    plan = dataclasses.replace(plan, placements=tuple(changed.get(id(p), p) for p in plan.placements))
    model = applied(case, plan)
    for _ in range(3):
        assert torch.equal(case.generate(model), case.generate(case.reference))


@pytest.mark.usefixtures("behind")
def test_readers_read_at_once_and_the_launching_thread_does_not(
    make_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("llama")
    plan = on_disk(case)
    together, met = threading.Barrier(READERS), []
    threads: set[str] = set()
    inner = Checkpoint.read_window

    def read_window(self: Checkpoint, *args: Any) -> torch.Tensor:
        threads.add(threading.current_thread().name)
        if not met:
            together.wait(timeout=PROMPT_SECONDS)
            met.append(True)
        return inner(self, *args)

    monkeypatch.setattr(Checkpoint, "read_window", read_window)
    model = applied(case, plan)
    assert torch.equal(case.logits(model), case.logits(case.reference))
    assert threads == {"loadplan disk"}
    assert met


# What goes wrong


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize("count", [2, 40])
def test_a_read_that_fails_once(make_case: Any, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Of groups, and of experts; with so many slots all of these are kept once they are read."""
    case = make_case("mixtral")
    plan = with_slots(on_disk(case), count)
    case.run_like(plan)
    want = case.logits(case.reference)
    inner = Checkpoint.read_window
    failing: Iterator[bool] = iter(())

    def read_window(self: Checkpoint, *args: Any) -> torch.Tensor:
        if next(failing, False):
            raise InputError("the disk failed")
        return inner(self, *args)

    def three_calls() -> None:
        for _ in range(3):
            case.logits(model)

    monkeypatch.setattr(Checkpoint, "read_window", read_window)
    for number in (0, 5, 9, 17, 30, 45):
        failing = iter(())
        model = applied(case, plan)
        for stream in model._loadplan_dispatch.streams:
            stream.ring.close()
        failing = iter([False] * number + [True])
        with pytest.raises(InputError, match="the disk failed"):
            three_calls()
        assert torch.equal(case.logits(model), want)
        assert torch.equal(case.logits(model), want)


@pytest.mark.usefixtures("behind")
def test_a_file_that_shrinks_in_a_call(make_case: Any) -> None:
    case = make_case("llama")
    model = applied(case, on_disk(case))
    case.logits(model)

    def shrink(*args: Any) -> None:
        for file in case.folder.glob("*.safetensors"):
            os.truncate(file, 5000)

    handle = model.model.layers[0].register_forward_hook(shrink)
    with pytest.raises(InputError, match="is truncated"):
        case.logits(model)
    handle.remove()
    with pytest.raises(InputError, match="shrank"):
        case.logits(model)
    with pytest.raises(InputError, match="shrank"):
        dispatch.remove(model)


@pytest.mark.usefixtures("behind")
# Python reports, and cannot raise, what interrupts a callback of the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_any_moment(make_case: Any) -> None:
    case = make_case("llama")
    model = applied(case, on_disk(case))
    want = case.logits(case.reference)
    interrupt(lambda: case.logits(model), times=40)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(case.logits, model).result(timeout=PROMPT_SECONDS), want)
    assert torch.equal(case.logits(dispatch.remove(model)), want)


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupt_while_readers_are_told(make_case: Any, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    case = make_case("llama")
    model = applied(case, on_disk(case))
    want = case.logits(case.reference)

    def begin(self: Staging, reading: Any) -> None:
        for bring in reading.brings[:after]:
            self._tasks.put(lambda bring=bring: reading.run(bring))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "begin", begin)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                case.logits(model)
    (stream,) = model._loadplan_dispatch.streams
    stream.ring.close()
    assert torch.equal(case.logits(model), want)
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "begin", begin)
        with pytest.raises(KeyboardInterrupt):
            case.logits(model)
    assert torch.equal(case.logits(dispatch.remove(model)), want)


def test_a_slot_is_filled_with_what_was_asked_for_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that are under way end first, and those that are not are left out."""
    monkeypatch.setattr("dispatch.slots.reads_behind", lambda device: True)
    monkeypatch.setattr("dispatch.staging.BUFFER_BYTES", BLOCK_BYTES)
    tensors = {name: torch.full((20, BLOCK_BYTES), number, dtype=torch.uint8) for number, name in enumerate("ab")}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    stores = [disk_store(checkpoint, name) for name in "ab"]
    ring = SlotRing(CPU, 1, tensors["a"].nbytes, staging=True)
    begun, gate, read = threading.Semaphore(0), threading.Event(), []
    inner = Checkpoint.read_window

    def read_window(self: Checkpoint, entry: Any, *args: Any) -> torch.Tensor:
        read.append(entry.name)
        if entry.name == "a":
            begun.release()
            assert gate.wait(PROMPT_SECONDS)
        return inner(self, entry, *args)

    monkeypatch.setattr(Checkpoint, "read_window", read_window)
    ring.copy(0, stores[0])
    for _ in range(READERS):
        assert begun.acquire(timeout=PROMPT_SECONDS)
    threading.Timer(0.2, gate.set).start()
    ring.copy(0, stores[1])
    slab = ring.use(0)
    time.sleep(0.3)
    assert torch.equal(slab.view(20, BLOCK_BYTES), tensors["b"])
    assert read.count("a") == READERS


def disk_store(checkpoint: Checkpoint, name: str) -> DiskStore:
    entry = checkpoint[name]
    source = TensorSource(name=name, shape=entry.shape, dtype=entry.dtype, pieces=(Piece(entry=entry, index=()),))
    return DiskStore(Layout.of([(name, entry.shape, entry.dtype)]), checkpoint, [source])


def readers() -> int:
    return sum(thread.name == "loadplan disk" for thread in threading.enumerate())


@pytest.mark.usefixtures("behind")
def test_readers_end_with_the_model(make_case: Any) -> None:
    gc.collect()
    before = readers()
    case = make_case("llama")
    model = applied(case, on_disk(case))
    assert readers() == before + READERS
    case.logits(model)
    plain = dispatch.remove(model)
    del model
    gc.collect()
    deadline = time.monotonic() + PROMPT_SECONDS
    while readers() > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert readers() == before
    assert torch.equal(case.logits(plain), case.logits(case.reference))


# Windows of a file


@settings(deadline=None, max_examples=300)
@given(offset=st.integers(0, 20_000), nbytes=st.integers(0, 50_000), most=st.integers(1, 8))
def test_windows_cover_a_range_once(offset: int, nbytes: int, most: int) -> None:
    for size in (most * BLOCK_BYTES, most * 100):
        found = list(direct.windows(offset, nbytes, size))
        covered = [at for start, stop in found for at in range(start, stop)]
        assert covered == list(range(nbytes))
        assert all(start < stop for start, stop in found)
        for start, stop in found:
            first = (offset + start) // BLOCK_BYTES
            last = -(-(offset + stop) // BLOCK_BYTES)
            assert stop - start <= size
            assert size < BLOCK_BYTES or (last - first) * BLOCK_BYTES <= size


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Checkpoint, bytes]:
    torch.manual_seed(3)
    tensor = torch.randint(0, 255, (100_003,), dtype=torch.uint8)
    save_file({"first": torch.zeros(37, dtype=torch.uint8), "second": tensor}, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path), tensor.numpy().tobytes()


def forget(checkpoint: Checkpoint) -> None:
    for path in checkpoint._files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def is_cached(checkpoint: Checkpoint) -> bool:
    (file,) = checkpoint._files.values()
    return file._in_page_cache(0, file.size_bytes)


def aligned(nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("make", [aligned, lambda nbytes: aligned(nbytes + 64)[64:]], ids=["aligned", "not aligned"])
def test_a_window_holds_the_bytes(
    stored: tuple[Checkpoint, bytes], make: Callable[[int], torch.Tensor], cached: bool
) -> None:
    checkpoint, want = stored
    entry = checkpoint["second"]
    for most in (2 * BLOCK_BYTES, 5 * BLOCK_BYTES, 300):
        buffer = make(most)
        found = b""
        for start, stop in checkpoint.windows(entry, 11, entry.nbytes, most):
            if not cached:
                forget(checkpoint)
            found += checkpoint.read_window(entry, buffer, start, stop).numpy().tobytes()
        assert found == want[11:]


@pytest.mark.skipif(not page_cache.SUPPORTED, reason="the kernel does not say what is in the page cache")
def test_what_is_not_in_the_page_cache_is_read_past_it(stored: tuple[Checkpoint, bytes], tmp_path: Path) -> None:
    checkpoint, want = stored
    (file,) = checkpoint._files.values()
    if file._direct._descriptor is None:
        pytest.skip("this file system has no direct reads")
    entry, buffer = checkpoint["second"], aligned(40 * BLOCK_BYTES)
    forget(checkpoint)
    assert not is_cached(checkpoint)
    assert checkpoint.read_window(entry, buffer, 0, entry.nbytes).numpy().tobytes() == want
    assert not is_cached(checkpoint)
    (tmp_path / "model.safetensors").read_bytes()
    assert is_cached(checkpoint)
    buffer.zero_()
    found = checkpoint.read_window(entry, buffer, 0, entry.nbytes)
    assert found.data_ptr() == buffer.data_ptr(), "copied from the page cache"
    assert found.numpy().tobytes() == want


def test_a_window_of_a_truncated_file(stored: tuple[Checkpoint, bytes], tmp_path: Path) -> None:
    checkpoint, _ = stored
    os.truncate(tmp_path / "model.safetensors", 50_000)
    entry, buffer = checkpoint["second"], aligned(40 * BLOCK_BYTES)
    with pytest.raises(InputError, match=r"truncated|mapped"):
        checkpoint.read_window(entry, buffer, 0, entry.nbytes)


def test_a_file_that_was_replaced_is_read_as_it_was(stored: tuple[Checkpoint, bytes], tmp_path: Path) -> None:
    checkpoint, want = stored
    forget(checkpoint)
    (tmp_path / "other").write_bytes(bytes(200_000))
    (tmp_path / "other").replace(tmp_path / "model.safetensors")
    entry, buffer = checkpoint["second"], aligned(40 * BLOCK_BYTES)
    assert checkpoint.read_window(entry, buffer, 0, entry.nbytes).numpy().tobytes() == want
