"""Follows every storage that operators make, and counts their arithmetic, while a model runs without its numbers.

Floating tensors are fake (shape and dtype only, on a pretended CPU, so that the CPU's fused attention is what is
traced); integer and boolean tensors are real, so that code which looks at them (padding masks, stopping criteria,
router offsets) runs as it would. An integer result of fake inputs becomes a harmless constant; a router's top-k
becomes experts 0..k-1 for every token, which is the worst routing for memory.

Known limitations: scratch that kernels take inside an operator is not seen; tensors made from Python numbers by
`torch.tensor(x)` are seen only when an operator uses them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Real integer tensors larger than this many elements (a causal mask of 8k by 8k tokens) are kept fake.
LARGEST_REAL_ELEMENTS = 2**26
_LARGE_INPUT_ELEMENTS = 2**12


class StorageTracer(TorchDispatchMode):
    """Counts bytes alive in storages made by operators, and the operators' work since the last `reset_work`.

    live_bytes: now; peak_bytes: the most since `reset_peak`. Storages in `ignored` (weights) are never counted.
    safe_token: the token id that argmax and multinomial "choose".
    """

    def __init__(self, fake: FakeTensorMode, *, safe_token: int, expert_storages: Iterable[int] = ()):
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.fake = fake
        self.safe_token = safe_token
        self.ignored: set[int] = set()
        self.expert_storages = set(expert_storages)
        self.live_bytes = 0
        self.peak_bytes = 0
        self.reset_work()
        self.serial = 0
        self._alive: dict[int, tuple[int, int]] = {}

    def reset_work(self) -> None:
        self.flops = 0
        self.moved_bytes = 0
        self.operators = 0

    def reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors(args) + _tensors(kwargs.values())
        for tensor in inputs:
            self._ignore_unknown(tensor)
        any_fake = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if any_fake:
            out = self._run_fake(func, args, kwargs, inputs)
        elif inputs:
            out = self._run_real(func, args, kwargs, inputs)
        else:
            out = self._run_factory(func, args, kwargs)
        outputs = _tensors((out,))
        for tensor in outputs:
            self._follow(tensor)
        self._count_work(func, args, kwargs, inputs, outputs, out)
        return out

    def _run_fake(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        if func is aten._local_scalar_dense.default:
            return 0.0 if inputs[0].dtype.is_floating_point else 0
        with self.fake:
            out = func(*args, **kwargs)
        if func is aten.topk.default:
            values, indices = out
            ranks = torch.arange(indices.shape[-1]).expand(indices.shape).contiguous()
            return values, ranks
        token = self.safe_token if func in (aten.argmax.default, aten.multinomial.default) else 0
        given = {id(tensor) for tensor in inputs}
        return _map_tensors(out, lambda tensor: tensor if id(tensor) in given else _make_real(tensor, token))

    def _run_real(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        if max(tensor.numel() for tensor in inputs) > _LARGE_INPUT_ELEMENTS and not func._schema.is_mutable:
            with self.fake:
                try:
                    shapes = _tensors((func(*args, **kwargs),))
                except DynamicOutputShapeException:
                    shapes = []
            if shapes and max(tensor.numel() for tensor in shapes) > LARGEST_REAL_ELEMENTS:
                with self.fake:
                    return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _run_factory(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self.fake:
            out = func(*args, **kwargs)
        tensors = _tensors((out,))
        small_integer = all(
            not tensor.dtype.is_floating_point and tensor.numel() <= LARGEST_REAL_ELEMENTS for tensor in tensors
        )
        return func(*args, **kwargs) if small_integer else out

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self.ignored:
            return
        nbytes = storage.nbytes()
        if nbytes == 0:
            return
        self.serial += 1
        self._alive[key] = (nbytes, self.serial)
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._freed, key)

    def _ignore_unknown(self, tensor: torch.Tensor) -> None:
        """Never count a storage that was there before: the caller's own inputs."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive and key not in self.ignored:
            self.ignored.add(key)
            weakref.finalize(storage, self.ignored.discard, key)

    def _freed(self, key: int) -> None:
        self.live_bytes -= self._alive.pop(key)[0]

    def alive_between(self, first: int, last: int) -> int:
        """Return the bytes still alive of the storages followed while `serial` went from `first` to `last`."""
        return sum(nbytes for nbytes, serial in self._alive.values() if first < serial <= last)

    def _count_work(
        self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor], out: Any
    ) -> None:
        made = sum(tensor.numel() * tensor.element_size() for tensor in outputs)
        if not outputs or (_is_view(inputs, outputs) and not func._schema.is_mutable):
            return
        self.operators += 1
        self.flops += _flops(func, args, kwargs, out)
        if func in (aten.embedding.default, aten.index.Tensor, aten.index_select.default):
            self.moved_bytes += 2 * made
            return
        read = sum(
            tensor.numel() * tensor.element_size()
            for tensor in inputs
            if tensor.untyped_storage()._cdata not in self.expert_storages
        )
        self.moved_bytes += read + (0 if func._schema.is_mutable else made)


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(item, change) for item in value)
    return value


def _make_real(tensor: torch.Tensor, fill: int) -> torch.Tensor:
    is_number = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    if is_number or not isinstance(tensor, FakeTensor) or tensor.numel() > LARGEST_REAL_ELEMENTS:
        return tensor
    return torch.full(tensor.shape, fill, dtype=tensor.dtype)


def _is_view(inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in storages for tensor in outputs)


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the FLOPs of one operator: torch's own formulas, and for grouped matmul 2·rows·inner·columns."""
    from torch.utils.flop_counter import flop_registry

    packet = func._overloadpacket
    if packet is aten._grouped_mm:
        rows, columns = out.shape[-2], out.shape[-1]
        return int(2 * rows * args[0].shape[-1] * columns)
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        query, key, value = args[:3]
        batch, heads, tokens, width = query.shape
        return int(2 * batch * heads * tokens * key.shape[-2] * (width + value.shape[-1]))
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def nbytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the distinct storages behind `tensors`."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
