"""Tensors whose rows lie in several places: they have their shape and dtype at once, and values when asked for."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from dispatch.away import AwayParameter, AwayTensor
from dispatch.checkpoint import MAP_NORESERVE
from dispatch.place import as_parameter
from planner.errors import InputError


class Rows(Protocol):
    """Where the rows of one tensor lie, those of its first dimension."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def part(self, row: int, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop) of a row, one after another, in host memory: where they lie, or read anew."""

    def place(self, row: int) -> torch.Tensor:
        """Return a row where it lies, contiguous, to be written to.

        Raises:
            InputError: it is not written to.
        """

    def whole(self) -> torch.Tensor | None:
        """Return all rows where they lie as one tensor in host memory or a mapped file; None where they do not."""


class ScatteredTensor(torch.Tensor):
    """A CPU tensor to whoever asks. Views of it are such tensors too, and `contiguous` as well; whatever else is
    computed with it takes a plain tensor of the values that it covers, gathered for that alone. `copy_` writes each row
    to where it lies; other operators that would write to it are refused.

    Its address is one of its own, at which nothing is before `data_ptr` is called; then the values that it covers are,
    as long as it or another view of the same rows lives.
    """

    _source: _Source
    _shadow: torch.Tensor

    @staticmethod
    def of(rows: Rows) -> ScatteredTensor:
        """Return the tensor of some rows."""
        return ScatteredTensor._view(_Source(rows), torch.empty(rows.shape, dtype=rows.dtype, device="meta"))

    @classmethod
    def _view(cls, source: _Source, shadow: torch.Tensor) -> ScatteredTensor:
        """shadow: on meta, strided as the tensor is over all rows one after another."""
        made: ScatteredTensor = torch.Tensor._make_wrapper_subclass(
            cls, shadow.shape, strides=shadow.stride(), storage_offset=shadow.storage_offset(), dtype=shadow.dtype,
            device=torch.device("cpu"),
        )  # fmt: skip
        made._source, made._shadow = source, shadow
        return made

    def values(self) -> torch.Tensor:
        """Return a plain tensor of what this one covers: a view where all of it lies in one place, else gathered."""
        with torch.no_grad():
            return self._source.read(self._shadow)

    def _copied(self, memo: dict[int, Any]) -> torch.Tensor:
        """Return a plain copy. Not by torch's own way, which knows memory by its address: what is gathered here is gone
        before the next tensor is, which may have the same.
        """
        with torch.no_grad():
            made = self.values().clone()
        if isinstance(self, torch.nn.Parameter):
            made = as_parameter(made, requires_grad=self.requires_grad)
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(kind, (AwayTensor, AwayParameter)) for kind in types):
            return NotImplemented  # they refuse
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _REFUSED:
                raise _not_written(getattr(func, "__name__", func))
            first = args[0] if args else None
            if not isinstance(first, cls):
                return func(*args, **kwargs)
            if func is torch.Tensor.data_ptr:
                return first._source.address(first._shadow)
            if func is torch.Tensor.untyped_storage:
                return first._source
            if func is torch.Tensor.contiguous and not kwargs and len(args) == 1 and first.dim():
                return first if first.is_contiguous() else ScatteredTensor.of(_Reordered(first))
            if func is torch.Tensor.__deepcopy__:
                return first._copied(*args[1:])
            if func in _OF_MEMORY:
                return func(first.values(), *args[1:], **kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch annotates the function that stands for none
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0]._source.write(args[0]._shadow, _plain(args[1]))
            return args[0]
        if any(isinstance(value, cls) for value in _written(func, args, kwargs)):
            raise _not_written(func)
        aliases = [result.alias_info for result in func._schema.returns]
        if args and isinstance(args[0], cls) and any(alias is not None and not alias.is_write for alias in aliases):
            source = args[0]._source
            found = func(args[0]._shadow, *args[1:], **kwargs)
            made = found if isinstance(found, (tuple, list)) else [found]
            # As bytes, or as numbers of another width, it is a plain tensor.
            if all(each.dtype == source.dtype for each in made):
                return tree_map_only(torch.Tensor, lambda shadow: cls._view(source, shadow), found)
        return func(*_plain(args), **_plain(dict(kwargs)))


class _Source:
    """All rows of one tensor, and the addresses that they get. To those who ask for a storage it is one, of which the
    address and the size are known.
    """

    def __init__(self, rows: Rows):
        self._rows, self.dtype = rows, rows.dtype
        self._row_elements = math.prod(rows.shape[1:])
        self._nbytes = math.prod(rows.shape) * rows.dtype.itemsize
        self._memory: torch.Tensor | None = None

    def data_ptr(self) -> int:
        """Return an address that nothing else has as long as this lives; `address` lets values be there."""
        return self._reserved().data_ptr()

    def nbytes(self) -> int:
        return self._nbytes

    size = nbytes

    def address(self, shadow: torch.Tensor) -> int:
        """Return where a view begins, with its values there."""
        memory, start = self._reserved(), int(shadow.storage_offset())
        if shadow.numel() and self._rows.whole() is None:
            _over(memory, shadow, start).copy_(self.read(shadow))
        return memory.data_ptr() + start * self.dtype.itemsize

    def _reserved(self) -> torch.Tensor:
        whole = self._rows.whole()
        if whole is not None:
            return whole.reshape(-1)
        if self._memory is None:
            self._memory = reserved(self._nbytes, self.dtype)
        return self._memory

    def read(self, shadow: torch.Tensor) -> torch.Tensor:
        """Return a plain tensor of what a view covers."""
        if shadow.numel() == 0:
            return torch.empty(shadow.shape, dtype=self.dtype)
        whole = self._rows.whole()
        if whole is not None:
            return _over(whole.reshape(-1), shadow, int(shadow.storage_offset()))
        start, stop = span(shadow)
        first, last = start // self._row_elements, (stop - 1) // self._row_elements
        begin = first * self._row_elements
        if first == last:
            return _over(self._rows.part(first, start - begin, stop - begin), shadow, 0)
        if shadow.stride(0) >= self._row_elements:
            found = torch.empty(shadow.shape, dtype=self.dtype)
            for index in range(shadow.shape[0]):
                found[index].copy_(self.read(shadow[index]))
            return found
        # Rows are not the first dimension of the view.
        found = torch.empty((last + 1 - first, self._row_elements), dtype=self.dtype)
        for index in range(first, last + 1):
            found[index - first].copy_(self._rows.part(index, 0, self._row_elements))
        return _over(found.view(-1), shadow, start - begin)

    def write(self, shadow: torch.Tensor, values: torch.Tensor) -> None:
        """Copy values to where what a view covers lies: all of it, or nothing."""
        for place, value in list(self._places(shadow, values.expand(shadow.shape))):
            place.copy_(value)

    def _places(self, shadow: torch.Tensor, values: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if shadow.numel() == 0:
            return
        start, stop = span(shadow)
        row = start // self._row_elements
        if row == (stop - 1) // self._row_elements:
            place = self._rows.place(row).view(-1)
            yield _over(place, shadow, start - row * self._row_elements), values
            return
        for index in range(shadow.shape[0]):
            yield from self._places(shadow[index], values[index])


class _Reordered:
    """Rows of a scattered tensor one after another, each in its own order: what `contiguous` copies, not copied yet."""

    def __init__(self, tensor: ScatteredTensor):
        self._tensor = tensor
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def part(self, row: int, start: int, stop: int) -> torch.Tensor:
        values = self._tensor._source.read(self._tensor._shadow[row])
        return values.contiguous().view(-1)[start:stop]

    def place(self, row: int) -> torch.Tensor:
        raise _not_written("copy_")

    def whole(self) -> None:
        return None


# They would take the tensor's memory for something else.
_REFUSED = {torch.Tensor.share_memory_, torch.Tensor.set_, torch.Tensor.resize_}
# They look at memory without any operator that could be seen.
_OF_MEMORY = {
    torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__repr__, torch.Tensor.__format__,
    torch.Tensor.__reduce_ex__, torch.Tensor.__dlpack__, torch.Tensor.storage,
    torch.Tensor._typed_storage,
}  # fmt: skip


def reserved(nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Return pages of their own, as one row: they take no memory before they are written to, and none when it is gone,
    where an allocator may keep what it was given.
    """
    flags, protection = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    pages = mmap.mmap(-1, max(nbytes, 1), flags=flags, prot=protection)
    return torch.frombuffer(pages, dtype=dtype, count=nbytes // dtype.itemsize)


def _over(flat: torch.Tensor, shadow: torch.Tensor, start: int) -> torch.Tensor:
    """Return the view of `flat` that is shaped and strided as `shadow`, from its element `start` on."""
    return flat.as_strided(shadow.shape, shadow.stride(), int(flat.storage_offset()) + start)


def span(view: torch.Tensor) -> tuple[int, int]:
    """Return the first element that a view covers, counted in its storage, and the one after the last."""
    start = int(view.storage_offset())
    reach = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return start, start + reach + 1


def _plain(value: Any) -> Any:
    return tree_map_only(ScatteredTensor, ScatteredTensor.values, value)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield what an operator writes to."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from value if isinstance(value, (list, tuple)) else (value,)


def _not_written(what: Any) -> InputError:
    return InputError(
        f"{what} would write to weights that lie in several places: compute with a clone(), and copy_ the values back"
    )
