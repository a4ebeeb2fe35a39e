"""What mapped files hold is there before it is needed, stays where it may, goes where it must, and is never wrong."""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dispatch
from dispatch import page_cache, readahead
from dispatch.readahead import ReadAhead, lasting
from planner.errors import InputError
from planner.plan import Plan
from planner.steps import READ_AHEAD
from tiny_models import Case

pytestmark = pytest.mark.skipif(not page_cache.SUPPORTED, reason="the kernel does not bring pages on demand")
PAGE = mmap.PAGESIZE
# More than the kernel holds back for each processor: it lets those go only later.
PAGES = 128


class Files:
    """One file of `count` groups, mapped; what of it the kernel holds in memory is read from the file, not from us."""

    def __init__(self, path: Path, count: int):
        self.bytes = os.urandom(count * PAGES * PAGE)
        path.write_bytes(self.bytes)
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY)
        os.fsync(self.descriptor)
        self.map = mmap.mmap(
            self.descriptor, len(self.bytes), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
        self.map.madvise(mmap.MADV_RANDOM)  # or the kernel's own read-ahead brings neighbours
        whole = torch.frombuffer(self.map, dtype=torch.uint8)
        self.groups = {f"g{index}": [part] for index, part in enumerate(whole.split(PAGES * PAGE))}

    def forget(self) -> None:
        self.map.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert self.present() == set()

    def present(self) -> set[str]:
        """Return the groups that are wholly in memory."""
        return {name for name, [part] in self.groups.items() if page_cache.present(part.data_ptr(), part.nbytes)}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    found = Files(tmp_path / "weights", 12)
    found.forget()
    return found


def wait_for(condition: Any, seconds: float = 5.0) -> bool:
    """Give threads time to come so far."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(condition())


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loadplan read-ahead"]


# Which groups stay


@pytest.mark.parametrize("room", range(0, 40, 3))
def test_what_stays_and_what_passes_through_fit_into_the_room(room: int) -> None:
    for sizes in itertools.product((1, 2, 5), repeat=5):
        named = {str(index): size for index, size in enumerate(sizes)}
        kept = lasting(named, room)
        if sum(sizes) <= room:
            assert kept == set(named)
            continue
        stay = sum(named[name] for name in kept)
        passing = sorted((size for name, size in named.items() if name not in kept), reverse=True)
        assert stay == 0 or stay + sum(passing[: READ_AHEAD + 1]) <= room


def test_what_stays_is_spread_evenly_and_fills_the_room() -> None:
    kept = lasting({str(index): 10 for index in range(30)}, 10 * (READ_AHEAD + 1) + 100)
    assert len(kept) == 10
    assert sorted(map(int, kept)) == list(range(2, 30, 3))
    assert lasting({"a": 1, "b": 1}, None) == {"a", "b"}


# One pass


def test_all_comes_without_being_asked_for_where_there_is_room(files: Files) -> None:
    ahead = ReadAhead(files.groups, None)
    ahead.begin()
    assert wait_for(lambda: files.present() == set(files.groups))
    for name in files.groups:
        ahead.reach(name)
        ahead.leave(name)
    ahead.end()
    assert files.present() == set(files.groups)


def test_no_more_than_three_groups_are_ahead_where_there_is_not(files: Files) -> None:
    ahead = ReadAhead(files.groups, 0)
    assert ahead.lasting == set()
    names = list(files.groups)
    for _ in range(2):
        ahead.begin()
        for index, name in enumerate(names):
            ahead.reach(name)
            assert wait_for(lambda index=index: files.present() == set(names[index : index + READ_AHEAD + 1]))
            time.sleep(0.01)
            assert files.present() == set(names[index : index + READ_AHEAD + 1])
            ahead.leave(name)
        ahead.end()
        assert files.present() == set()


def test_some_stay_and_the_others_go(files: Files) -> None:
    ahead = ReadAhead(files.groups, PAGES * PAGE * 10)
    assert len(ahead.lasting) == 6
    for _ in range(2):
        ahead.begin()
        for name in files.groups:
            ahead.reach(name)
            ahead.leave(name)
        ahead.end()
        assert wait_for(lambda: files.present() == ahead.lasting)


@pytest.mark.parametrize("room", [0, PAGES * PAGE * 7, None])
@pytest.mark.parametrize(
    "order", [[0, 1, 2], [3, 4, 11], [5, 2, 9, 9, 0], [*range(12), *range(12)], [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]]
)
def test_any_order_of_calls_finds_its_group(files: Files, room: int | None, order: list[int]) -> None:
    ahead = ReadAhead(files.groups, room)
    for _ in range(3):
        ahead.begin()
        for number in order:
            ahead.reach(f"g{number}")
            assert f"g{number}" in files.present()
            ahead.leave(f"g{number}")
        ahead.end()
    assert wait_for(lambda: not readers())
    if room == 0:
        assert wait_for(lambda: files.present() <= {"g0", "g1", "g2", "g3"})
    whole = torch.cat([part for [part] in files.groups.values()])
    assert whole.numpy().tobytes() == files.bytes


def test_the_order_of_the_last_call_is_followed(files: Files) -> None:
    ahead = ReadAhead(files.groups, 0)
    ahead.begin()
    for name in ("g6", "g3", "g9"):
        ahead.reach(name)
    ahead.end()
    for name in files.groups:
        ahead.leave(name)
    ahead.begin()
    assert wait_for(lambda: files.present() == {"g6", "g3", "g9"})
    ahead.end()


def test_a_call_that_is_broken_off_does_not_shorten_the_next(files: Files) -> None:
    ahead = ReadAhead(files.groups, None)
    ahead.begin()
    ahead.reach("g0")
    ahead.end()
    files.forget()
    ahead.begin()
    assert wait_for(lambda: files.present() == set(files.groups))
    ahead.end()


def test_no_thread_outlives_a_call(files: Files) -> None:
    ahead = ReadAhead(files.groups, 0)
    ahead.begin()
    assert wait_for(lambda: len(readers()) == 2)
    ahead.reach("g2")
    ahead.end()
    assert wait_for(lambda: not readers())


def test_pages_that_were_written_to_are_kept(files: Files) -> None:
    ahead = ReadAhead(files.groups, 0)
    ahead.begin()
    ahead.reach("g0")
    files.groups["g0"][0].fill_(7)
    ahead.leave("g0")
    ahead.end()
    assert bool((files.groups["g0"][0] == 7).all())
    assert files.path.read_bytes() == files.bytes


@pytest.mark.parametrize("turn", ["expected", "late"])
def test_a_file_that_is_cut_off_is_an_error_and_not_a_crash(files: Files, turn: str) -> None:
    ahead = ReadAhead(files.groups, 0)
    ahead.begin()
    ahead.reach("g0" if turn == "expected" else "g8")
    os.truncate(files.path, PAGE * PAGES * 5)
    with pytest.raises(InputError, match=r"g7 can no longer be read.*truncated"):
        ahead.reach("g7")
    ahead.reach("g4")
    ahead.end()


# In a model


@pytest.fixture
def small_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatch.preparation.room_bytes", lambda plan: 0)


def mostly_on_disk(case: Case) -> Plan:
    whole = case.plan(gpus=0)
    assert whole.prediction is not None
    cap = whole.prediction.peak_bytes["cpu"] - whole.model.weight_bytes * 7 // 10
    plan = case.plan(gpus=0, max_memory={"cpu": cap})
    assert sum(p.home == "disk" for p in plan.placements) > len(plan.placements) // 3
    return plan


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Make nothing seem to be in memory, so that all is brought; give the names of what was."""
    brought: list[str] = []
    monkeypatch.setattr(page_cache, "present", lambda *_: False)
    inner = readahead._bring
    monkeypatch.setattr(readahead, "_bring", lambda name, *place: (brought.append(name), inner(name, *place)))
    return brought


@pytest.mark.usefixtures("small_room")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_same_bits_where_nothing_may_stay(make_case: Any, unread: list[str], name: str) -> None:
    case = make_case(name)
    want, tokens = case.logits(case.reference), case.generate(case.reference)
    plan = mostly_on_disk(case)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder)
    for _ in range(2):
        unread.clear()
        assert torch.equal(case.logits(model), want)
        layers = {p.layer for p in plan.placements if p.home == "disk"} - {
            "transformer.wte",
            "transformer.wpe",
            "model.embed_tokens",
        }
        assert layers <= {path.removesuffix(".mlp").removesuffix(".self_attn").removesuffix(".attn") for path in unread}
    assert torch.equal(case.generate(model), tokens)
    assert not any("wpe" in path or "embed" in path for path in unread), "of an embedding few rows are used"
    assert torch.equal(case.logits(dispatch.remove(model)), want)
    assert wait_for(lambda: not readers())


@pytest.mark.usefixtures("small_room", "unread")
def test_an_interrupt_in_forward_leaves_the_model_usable(make_case: Any) -> None:
    case = make_case("llama")
    want = case.logits(case.reference)
    model = dispatch.apply(case.meta(), mostly_on_disk(case), checkpoint=case.folder)

    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    for layer in (0, 3, 4):
        handle = model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            case.logits(model)
        handle.remove()
        assert wait_for(lambda: not readers())
        assert torch.equal(case.logits(model), want)


@pytest.mark.usefixtures("small_room")
def test_an_error_of_a_reader_reaches_the_caller(make_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("llama")
    want = case.logits(case.reference)
    model = dispatch.apply(case.meta(), mostly_on_disk(case), checkpoint=case.folder)
    with monkeypatch.context() as patch:

        def broken(*_: Any) -> None:
            raise OSError(5, "Input/output error")

        patch.setattr(page_cache, "present", lambda *_: False)
        patch.setattr(page_cache, "bring", broken)
        with pytest.raises(InputError, match=r"model\.layers\.\d.*Input/output error"):
            case.logits(model)
    assert torch.equal(case.logits(model), want)


def test_a_cut_file_is_refused_before_the_call(make_case: Any) -> None:
    case = make_case("llama")
    model = dispatch.apply(case.meta(), mostly_on_disk(case), checkpoint=case.folder)
    case.logits(model)
    shard = sorted(case.folder.glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(InputError, match="shrank"):
        case.logits(model)
    assert not readers()


@pytest.mark.parametrize(("name", "is_brought"), [("llama", False), ("gpt2", True)])
def test_an_embedding_is_brought_whole_where_the_head_is_tied_to_it(
    make_case: Any, unread: list[str], name: str, is_brought: bool
) -> None:
    case = make_case(name)
    want, plan = case.logits(case.reference), case.plan(gpus=0)
    (table,) = [p for p in plan.placements if p.layer in ("transformer.wte", "model.embed_tokens")]
    away = dataclasses.replace(table, home="disk", memory="disk", resident_slices=0)
    plan = dataclasses.replace(plan, placements=tuple(away if p is table else p for p in plan.placements))
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder)
    assert torch.equal(case.logits(model), want)
    assert (table.layer in unread) is is_brought
