"""Virtual accelerators: devices that real PyTorch code can use on any machine, with a capacity that is enforced.

Tensors on them wrap a tensor on the CPU, which has the numbers, or on meta, which has none. Every storage that an
operator makes is counted from its first tensor to its last; more than the capacity raises torch.OutOfMemoryError.
Nothing that predicts is imported here.

What is not seen: scratch that kernels take and give back inside one operator, what a caching allocator rounds up, and
a driver's context.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map

DEVICE_TYPE = "virtual"
aten = torch.ops.aten

# Copies are what tensors on several devices may take part in together.
_COPIES = frozenset({aten.copy_.default, aten._to_copy.default, aten._copy_from.default})
# Operators that return (values, places), and which argument is the dimension.
_RANKINGS = {aten.topk.default: 2, aten.sort.default: 1}
# Storages change their size in these alone.
_RESIZES = frozenset({aten.resize_.default, aten.set_.source_Storage_storage_offset})


class Pool:
    """The memory of one virtual device. All sizes in bytes."""

    def __init__(self, name: str, capacity_bytes: int):
        self.name, self.capacity_bytes = name, capacity_bytes
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, int] = {}

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor until it is freed.

        Raises:
            torch.OutOfMemoryError: there is not so much left.
        """
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known:
            if nbytes != self._known[key]:
                self.take(nbytes - self._known[key])
                self._known[key] = nbytes
            return
        self.take(nbytes)
        self._known[key] = nbytes
        weakref.finalize(storage, self._forget, key)

    def take(self, nbytes: int) -> None:
        """Count so many bytes more."""
        if self.live_bytes + nbytes > self.capacity_bytes:
            raise torch.OutOfMemoryError(
                f"{self.name} is out of memory: {nbytes:,} bytes more than the {self.live_bytes:,} that are in use make "
                f"{self.live_bytes + nbytes:,}, and it has {self.capacity_bytes:,}"
            )
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._known.pop(key)


class VirtualTensor(torch.Tensor):
    """A tensor on a virtual device. inner: the one that stands for it, on the CPU or on meta."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> VirtualTensor:
        made: VirtualTensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=device, requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"VirtualTensor({self.inner!r}, device='{self.device}')"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist:
            (tensor,) = args
            inner = tensor.inner
            return (torch.zeros(inner.shape, dtype=inner.dtype) if inner.is_meta else inner).tolist()
        if func is torch.nn.functional.scaled_dot_product_attention:
            found = _attention(*args, **kwargs)
            if found is not None:
                return found
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    box = _current()
    if func in _COPIES:
        return _copy(box, func, args, kwargs)
    device = _device_of(func, args, kwargs)
    asked = kwargs.get("device")
    if asked is not None and torch.device(asked).type != DEVICE_TYPE:
        # A factory shaped like a tensor of ours, elsewhere.
        inner = tree_map(_inner, (args, kwargs))
        return func(*inner[0], **inner[1])
    if asked is not None:
        device = torch.device(asked)
        kwargs = {**kwargs, "device": None}
    pool = box.pool(device) if device.type == DEVICE_TYPE else None
    given = [value for value in tree_iter((args, kwargs)) if isinstance(value, VirtualTensor)]
    by_inner = {id(value.inner): value for value in given}
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    out = box.compute(func, inner_args, inner_kwargs)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        known = by_inner.get(id(value))
        if known is not None:
            # In place, or an argument handed back; views may have changed its shape.
            if func in _RESIZES and pool is not None:
                pool.hold(value)
            return known
        if pool is None:
            return VirtualTensor(value, device) if value.is_meta else value
        pool.hold(value)
        return VirtualTensor(value, device)

    return tree_map(wrapped, out)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, VirtualTensor) else value


def _device_of(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    """Return the device that an operator runs on.

    Raises:
        RuntimeError: its tensors are on several; numbers in a CPU tensor without dimensions may join, as on CUDA.
    """
    found: torch.device | None = None
    for value in tree_iter((args, kwargs)):
        if not isinstance(value, torch.Tensor) or (value.device.type == "cpu" and value.dim() == 0):
            continue
        is_index = func in (aten.index.Tensor, aten.index_put_.default) and value.device.type == "cpu"
        if found is not None and value.device != found and not is_index:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {found} and "
                f"{value.device}! ({func})"
            )
        found = found or (None if is_index else value.device)
    if found is None:
        asked = kwargs.get("device")
        assert asked is not None, func
        return torch.device(asked)
    return found


def _copy(box: Box, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is aten.copy_.default:
        target, source = args[0], args[1]
        box.copied(source.device, target.device, target.numel() * target.element_size())
        box.fill(_inner(target), _inner(source))
        return target
    source = args[0]
    device = kwargs.get("device") or source.device
    inner = _inner(source)
    options = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
    box.copied(source.device, torch.device(device), inner.numel() * (kwargs.get("dtype") or inner.dtype).itemsize)
    if torch.device(device).type == DEVICE_TYPE:
        made = box.compute(aten._to_copy.default, (inner,), options)
        made = box.placed(made)
        box.pool(torch.device(device)).hold(made)
        return VirtualTensor(made, torch.device(device))
    if inner.is_meta and torch.device(device).type != "meta":
        return torch.zeros_like(inner, device=device, dtype=kwargs.get("dtype"))
    return aten._to_copy.default(inner, **{**options, "device": torch.device(device)})


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Return attention by the fused kernel, where there is one for these arguments."""
    tensors = [tensor for tensor in (query, key, value, attn_mask) if tensor is not None]
    if dropout_p or not all(isinstance(tensor, VirtualTensor) for tensor in tensors):
        return None
    if any(tensor.dim() != 4 for tensor in tensors) or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if enable_gqa:
        times = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            mask = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = mask.masked_fill_(attn_mask.logical_not(), -math.inf)
        attn_mask = attn_mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


class Box:
    """A machine with virtual devices, in use while its `with` block lasts.

    devices: what PyTorch calls each, by the name that plans have for it.
    """

    def __init__(self, capacities: Mapping[str, int], *, numbers: bool):
        _set_up()
        self.pools = [Pool(name, nbytes) for name, nbytes in capacities.items()]
        self.devices = {pool.name: torch.device(DEVICE_TYPE, index) for index, pool in enumerate(self.pools)}
        self.numbers = numbers
        self.copied_bytes: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Box:
        global _active

        if _active is not None:
            raise RuntimeError("another virtual machine is in use; leave its block first")
        _active = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _active
        _active = None

    def peak_bytes(self, name: str) -> int:
        """Return the most bytes that were in use on a device at once."""
        return self._named(name).peak_bytes

    def live_bytes(self, name: str) -> int:
        """Return the bytes in use on a device now."""
        return self._named(name).live_bytes

    def _named(self, name: str) -> Pool:
        found = next((pool for pool in self.pools if pool.name == name), None)
        if found is None:
            raise ValueError(f"no virtual device {name!r}; there are {', '.join(self.devices)}")
        return found

    def pool(self, device: torch.device) -> Pool:
        index = device.index or 0
        if index >= len(self.pools):
            raise RuntimeError(f"there is no {device}: this machine has {len(self.pools)} virtual devices")
        return self.pools[index]

    def copied(self, source: torch.device, target: torch.device, nbytes: int) -> None:
        """Note a copy between two devices."""
        if source != target:
            way = (self._name(source), self._name(target))
            self.copied_bytes[way] = self.copied_bytes.get(way, 0) + nbytes

    def _name(self, device: torch.device) -> str:
        return self.pool(device).name if device.type == DEVICE_TYPE else str(device)

    def is_blank(self, dtype: torch.dtype) -> bool:
        """Tell whether tensors of a dtype have no numbers here: floats, and bytes that stand for them."""
        return not self.numbers and (dtype.is_floating_point or dtype == torch.uint8)

    def placed(self, inner: torch.Tensor) -> torch.Tensor:
        """Return what stands for a new tensor here."""
        if inner.is_meta or not self.is_blank(inner.dtype):
            return inner
        return _on_meta(inner)

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator on what stands for its tensors.

        Without numbers, whole numbers and truths that come of floats are zeros.
        """
        if func is aten.histc.default and not args[0].is_floating_point():
            # As on a GPU, which has it for whole numbers too.
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        if self.numbers:
            return func(*args, **kwargs)
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        if not any(value.is_meta for value in given):
            return tree_map(lambda value: self.placed(value) if isinstance(value, torch.Tensor) else value,
                            func(*args, **kwargs))  # fmt: skip
        if func is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        if func in (aten.index.Tensor, aten.index_put_.default):
            args = (args[0], _whole(args[1]), *args[2:])
        originals: dict[int, torch.Tensor] = {}

        def on_meta(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.is_meta:
                return value
            made = _on_meta(value)
            originals[id(made)] = value
            return made

        meta_args, meta_kwargs = tree_map(on_meta, (args, kwargs))

        def real(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in originals:
                return originals[id(value)]
            if self.is_blank(value.dtype) or any(value is other for other in given):
                return value
            return torch.zeros(value.shape, dtype=value.dtype)

        out = tree_map(real, func(*meta_args, **meta_kwargs))
        if func in _RANKINGS:
            # Places are different ones, as in any ranking: the first.
            values, places = out
            dim = args[_RANKINGS[func]] if len(args) > _RANKINGS[func] else -1
            shape = [1] * places.dim()
            shape[dim] = places.size(dim)
            places.copy_(torch.arange(places.size(dim)).view(shape).expand_as(places))
        return out

    def fill(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if target.is_meta:
            return
        if source.is_meta:
            if not self.is_blank(target.dtype):
                target.zero_()
        else:
            target.copy_(source)


def _on_meta(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def _whole(indices: Any) -> list[Any]:
    """Return indices with truths as the places where they hold."""
    found: list[Any] = []
    for index in indices:
        found += list(index.nonzero(as_tuple=True)) if index is not None and index.dtype == torch.bool else [index]
    return found


_active: Box | None = None
_is_set_up = False
_libraries: list[Any] = []


def _current() -> Box:
    if _active is None:
        raise RuntimeError("a tensor of a virtual device was used outside the `with` block of its machine")
    return _active


def _set_up() -> None:
    """Make PyTorch know the device type, once in a process."""
    global _is_set_up
    if _is_set_up:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE_TYPE)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _libraries.append(library)
    _is_set_up = True


def _made(inner: torch.Tensor, device: torch.device) -> VirtualTensor:
    box = _current()
    inner = box.placed(inner)
    box.pool(device).hold(inner)
    return VirtualTensor(inner, device)


def _empty(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
           memory_format: Any = None) -> VirtualTensor:  # fmt: skip
    place = "meta" if _current().is_blank(dtype or torch.get_default_dtype()) else "cpu"
    return _made(torch.empty(size, dtype=dtype, device=place), torch.device(device))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None,
                   pin_memory: Any = None) -> VirtualTensor:  # fmt: skip
    place = "meta" if _current().is_blank(dtype or torch.get_default_dtype()) else "cpu"
    return _made(torch.empty_strided(size, stride, dtype=dtype, device=place), torch.device(device))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    result: torch.Tensor = _copy(_current(), aten.copy_.default, (target, source), {})
    return result


def blank(model: torch.nn.Module) -> torch.nn.Module:
    """Give a model on meta weights in host memory that take no memory and have no numbers."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in made:
                        wrapped: Any = VirtualTensor(tensor.detach(), torch.device("cpu"))
                        if isinstance(tensor, torch.nn.Parameter):
                            wrapped = torch.nn.Parameter(wrapped, requires_grad=False)
                        made[id(tensor)] = wrapped
                    held[name] = made[id(tensor)]
    return model
