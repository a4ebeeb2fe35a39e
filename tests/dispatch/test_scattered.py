"""Tensors whose rows lie apart: to whoever asks they are the plain tensor, and nothing is lost that is written."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from dispatch.away import away
from dispatch.scattered_tensor import ScatteredTensor
from planner.errors import InputError

SHAPE = (4, 6, 5)


class Apart:
    """Rows in memory of their own; `read` are those that were asked for."""

    def __init__(self, plain: torch.Tensor, *, fixed: int | None = None) -> None:
        self.rows = [row.clone() for row in plain]
        self.shape, self.dtype, self.fixed = tuple(plain.shape), plain.dtype, fixed
        self.read: list[tuple[int, int, int]] = []

    def part(self, row: int, start: int, stop: int) -> torch.Tensor:
        self.read.append((row, start, stop))
        return self.rows[row].view(-1)[start:stop]

    def place(self, row: int) -> torch.Tensor:
        if row == self.fixed:
            raise InputError("this one stays")
        return self.rows[row]

    def whole(self) -> torch.Tensor | None:
        return None


class InOnePlace(Apart):
    """A file holds them all."""

    def __init__(self, plain: torch.Tensor) -> None:
        super().__init__(plain)
        self.plain = plain

    def part(self, row: int, start: int, stop: int) -> torch.Tensor:
        raise AssertionError("nothing is to be gathered")

    def whole(self) -> torch.Tensor:
        return self.plain


def pair(shape: tuple[int, ...] = SHAPE) -> tuple[torch.Tensor, Apart, ScatteredTensor]:
    plain = torch.randn(shape)
    rows = Apart(plain)
    return plain, rows, ScatteredTensor.of(rows)


View = Callable[[torch.Tensor], torch.Tensor]


@st.composite
def views(draw: st.DrawFn) -> list[View]:
    """Draw some steps, each from a tensor to a view of it, that fit any shape."""
    found: list[View] = []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["select", "narrow", "transpose", "chunk", "unsqueeze", "contiguous", "flatten"]))
        dim, one, two = draw(st.integers(0, 7)), draw(st.integers(0, 7)), draw(st.integers(1, 7))

        def step(t: torch.Tensor, kind: str = kind, dim: int = dim, one: int = one, two: int = two) -> torch.Tensor:
            if t.dim() == 0 or 0 in t.shape:
                return t
            axis = dim % t.dim()
            size = t.shape[axis]
            if kind == "select":
                return t.select(axis, one % size)
            if kind == "narrow":
                start = one % size
                return t.narrow(axis, start, min(two, size - start))
            if kind == "transpose":
                return t.transpose(axis, one % t.dim())
            if kind == "chunk":
                parts = t.chunk(two, axis)
                return parts[one % len(parts)]
            if kind == "unsqueeze":
                return t.unsqueeze(axis)
            return t.contiguous() if kind == "contiguous" else t.contiguous().view(-1)

        found.append(step)
    return found


@settings(deadline=None, max_examples=300)
@given(steps=views(), value=st.floats(-2, 2))
def test_any_views(steps: list[View], value: float) -> None:
    plain, rows, tensor = pair()
    expected: Any = plain
    found: Any = tensor
    for step in steps:
        expected, found = step(expected), step(found)
    assert isinstance(found, ScatteredTensor)
    assert rows.read == []
    assert (found.shape, found.is_contiguous()) == (expected.shape, expected.is_contiguous())
    assert torch.equal(found, expected)
    assert torch.equal(found.clone(), expected)
    assert torch.equal(found + value, expected + value)
    if found.is_contiguous():
        memory = (ctypes.c_float * found.numel()).from_address(found.data_ptr())
        assert list(memory) == expected.reshape(-1).tolist()
    changed = torch.full(expected.shape, value)
    if not expected._is_view() and expected is not plain:
        return  # a copy, of which nothing needs to be written
    try:
        found.copy_(changed)
    except InputError:
        assert expected.data_ptr() < plain.data_ptr() or expected.data_ptr() >= plain.data_ptr() + plain.nbytes
    else:
        expected.copy_(changed)
    assert torch.equal(torch.stack(rows.rows), plain)


def test_one_row_is_not_gathered_and_no_other_is_read() -> None:
    plain, rows, tensor = pair()
    assert tensor[2].values().data_ptr() == rows.rows[2].data_ptr()
    assert tensor.chunk(2, 1)[1].contiguous()[3, 1].values().data_ptr() == rows.rows[3][4].data_ptr()
    assert rows.read == [(2, 0, 30), (3, 15, 30)]
    assert torch.equal(plain[3, 4], tensor[3, 4])


def test_what_a_file_holds_whole_is_not_gathered() -> None:
    plain = torch.randn(SHAPE)
    tensor = ScatteredTensor.of(InOnePlace(plain))
    assert tensor.data_ptr() == tensor.values().data_ptr() == plain.data_ptr()
    assert tensor.untyped_storage().data_ptr() == plain.untyped_storage().data_ptr()
    assert tensor[1:, 2:4].values().data_ptr() == plain[1:, 2:4].data_ptr()
    assert torch.equal(tensor.chunk(2, 1)[1].contiguous(), plain[:, 3:])


def test_addresses_are_as_those_of_one_tensor() -> None:
    """By these others tell which tensors are one; nothing is read for them but what `data_ptr` is asked of."""
    _, rows, tensor = pair()
    _, _, other = pair()
    storages: list[Any] = [each.untyped_storage() for each in (tensor, other, tensor[1], tensor.detach())]
    assert rows.read == []
    assert storages[0].data_ptr() == storages[2].data_ptr() == storages[3].data_ptr() != storages[1].data_ptr()
    assert storages[0].nbytes() == tensor.nbytes
    assert tensor[1].data_ptr() == storages[0].data_ptr() + tensor[0].nbytes
    assert {row for row, _, _ in rows.read} == {1}


def test_values_at_an_address_go_with_the_tensor() -> None:
    _, _, tensor = pair()
    tensor.data_ptr()
    memory = weakref.ref(tensor._source._memory)  # type: ignore[arg-type]  # it is there by now
    view = tensor[1]
    del tensor
    gc.collect()
    assert memory() is not None
    del view
    gc.collect()
    assert memory() is None


def test_others_take_it_for_the_plain_tensor(tmp_path: Path) -> None:
    plain, rows, tensor = pair()
    assert (tensor.shape, tensor.dtype, tensor.device, tensor.is_meta) == (
        plain.shape, plain.dtype, torch.device("cpu"), False
    )  # fmt: skip
    assert tensor.nbytes == plain.nbytes
    assert rows.read == []
    save_file({"a": tensor, "b": tensor.chunk(2, 1)[0].contiguous()}, tmp_path / "saved")
    again = load_file(tmp_path / "saved")
    assert torch.equal(again["a"], plain)
    assert torch.equal(again["b"], plain[:, :3])
    memory = io.BytesIO()
    torch.save({"a": tensor}, memory)
    memory.seek(0)
    copies = [
        torch.load(memory)["a"],
        copy.deepcopy(tensor),
        pickle.loads(pickle.dumps(tensor)),
        torch.from_numpy(tensor.numpy()),
        torch.from_numpy(np.asarray(tensor)),
        torch.tensor(tensor.tolist()),
        tensor.to(torch.float64),
        tensor.cpu().clone(),
        torch.zeros(SHAPE).copy_(tensor),
        torch.cat([tensor[:1], plain[1:]]),
        tensor.view(torch.int32).view(torch.float32),
    ]
    assert all(type(each) is torch.Tensor for each in copies)
    assert all(torch.equal(each.float(), plain) for each in copies)
    assert repr(tensor) == repr(plain)
    assert tensor[1, 2, 3].item() == plain[1, 2, 3].item()
    assert torch.equal(tensor @ plain.transpose(1, 2), plain @ plain.transpose(1, 2))
    layer = nn.Module()
    layer.weight = nn.Parameter(tensor, requires_grad=False)
    loaded = nn.Module()
    loaded.weight = nn.Parameter(torch.zeros(SHAPE))
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded.weight, plain)


def test_a_clone_stays_what_it_was() -> None:
    plain, _, tensor = pair()
    kept = tensor.clone()
    tensor.copy_(torch.zeros(SHAPE))
    assert torch.equal(kept, plain)
    assert torch.equal(tensor, torch.zeros(SHAPE))


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.mul_(2), lambda t: t[1].zero_(), lambda t: torch.add(1, 2 * torch.ones(SHAPE), out=t),
        lambda t: t.share_memory_(), lambda t: t.set_(torch.zeros(1)), lambda t: t.resize_(1),
        lambda t: torch._foreach_mul_([torch.ones(1), t], 2),
        lambda t: t.chunk(2, 1)[1].contiguous().copy_(torch.ones(1)),
    ],
)  # fmt: skip
def test_writes_that_would_be_lost_are_refused(write: Callable[[Any], Any]) -> None:
    plain, rows, tensor = pair()
    with pytest.raises(InputError, match="lie in several places"):
        write(tensor)
    assert torch.equal(torch.stack(rows.rows), plain)


def test_what_waits_elsewhere_is_not_computed_with() -> None:
    plain, _, tensor = pair()
    waits = away(plain, parameter=True)
    for left, right in ((tensor, waits), (waits, tensor)):
        with pytest.raises(InputError, match="weights that wait elsewhere"):
            left * right


def test_all_is_written_or_nothing() -> None:
    plain = torch.randn(SHAPE)
    rows = Apart(plain, fixed=2)
    tensor = ScatteredTensor.of(rows)
    with pytest.raises(InputError, match="this one stays"):
        tensor.copy_(torch.zeros(SHAPE))
    assert torch.equal(torch.stack(rows.rows), plain)
    tensor[:2].copy_(torch.zeros(SHAPE[1:]))
    assert torch.equal(torch.stack(rows.rows)[:2], torch.zeros(2, *SHAPE[1:]))
