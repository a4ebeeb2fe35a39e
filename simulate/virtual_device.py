"""What PyTorch sees of a virtual machine: a device type of its own, whose tensors wrap others.

A tensor of a virtual device wraps one on the CPU, which has the numbers, or on meta, which has none. Every storage that
an operator makes is counted by the machine. Not seen: scratch that kernels take and give back inside one operator,
what a caching allocator rounds up, and a driver's context. Attention runs as one fused operator, as on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

from planner.errors import InputError
from simulate.virtual_clock import tensors_in
from simulate.virtual_machine import DEVICE_TYPE, Machine, active, is_active

aten = torch.ops.aten

# Storages change their size in these alone.
_RESIZES = frozenset({aten.resize_.default, aten.set_.source_Storage_storage_offset})
# Indices may stay on the CPU, as on a real device.
_INDEXING = frozenset({aten.index.Tensor, aten.index_put_.default})
_FUSED = (torch.float32, torch.bfloat16, torch.float16)
_libraries: list[Any] = []


class VirtualTensor(torch.Tensor):
    """A tensor on a virtual device. stand_in: the one that stands for it, on the CPU or on meta."""

    stand_in: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> VirtualTensor:
        made: VirtualTensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=device, requires_grad=False,
        )  # fmt: skip
        made.stand_in = inner
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> VirtualTensor:
        """Return a copy on the same device; torch's own reads the memory of a storage, and this has none."""
        made: Any = self.detach().clone()
        made.requires_grad_(self.requires_grad)
        # What makes it a parameter, and what else a user put there.
        vars(made).update({name: value for name, value in vars(self).items() if name != "stand_in"})
        memo[id(self)] = made
        return made  # type: ignore[no-any-return]  # torch types what is detached as any tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"VirtualTensor({self.stand_in!r}, device='{self.device}')"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist:
            inner = args[0].stand_in
            clock = active().clock
            if clock is not None:
                clock.wait_for(args[:1])
            with _disable_current_modes():
                return (torch.zeros(inner.shape, dtype=inner.dtype) if inner.is_meta else inner).tolist()
        if func is torch.nn.functional.scaled_dot_product_attention:
            found = _attention(*args, **kwargs)
            if found is not None:
                return found
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func is aten.copy_.default:
            return _copy_from(args[1], args[0])
        if func is aten._to_copy.default:
            return _to_copy(args[0], **kwargs)
        return _run(func, args, kwargs)


def set_up() -> None:
    """Make PyTorch know the device type, once in a process.

    Raises:
        InputError: the place that PyTorch keeps for a backend from outside is taken.
    """
    if _libraries:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    try:
        _setup_privateuseone_for_python_backend(DEVICE_TYPE)
    except RuntimeError as exc:
        raise InputError(
            f"virtual devices need the place that PyTorch keeps for one backend from outside, and it is taken: {exc}"
        ) from exc
    # Code that looks for devices (DataParallel) finds these while they are there.
    setattr(torch.get_device_module(DEVICE_TYPE), "is_available", is_active)  # noqa: B010
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _libraries.append(library)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    machine = active()
    device = _device_of(machine, func, args, kwargs)
    asked = kwargs.get("device")
    if asked is not None and torch.device(asked).type != DEVICE_TYPE:
        # Made like a tensor of ours, elsewhere.
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        return func(*inner_args, **inner_kwargs)
    if asked is not None:
        device = torch.device(asked)
        kwargs = {**kwargs, "device": None}
    pool = machine.pool(device) if device.type == DEVICE_TYPE else None
    given = {id(value.stand_in): value for value in tree_iter((args, kwargs)) if isinstance(value, VirtualTensor)}
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    out = machine.compute(func, inner_args, inner_kwargs)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in given:
            if func in _RESIZES and pool is not None:
                pool.hold(value)
            return given[id(value)]
        if pool is not None:
            pool.hold(value)
        return VirtualTensor(value, device) if pool is not None or value.is_meta else value

    result = tree_map(wrapped, out)
    if machine.clock is not None:
        given_tensors = tensors_in((args, kwargs))
        machine.clock.operator(machine.name(device), func, given_tensors, tensors_in(result), (args, kwargs, result))
    return result


def _inner(value: Any) -> Any:
    return value.stand_in if isinstance(value, VirtualTensor) else value


def _device_of(machine: Machine, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    """Return the device that an operator runs on.

    Raises:
        RuntimeError: its tensors are on several. One number in a CPU tensor may join, as on a real device.
    """
    found: torch.device | None = None
    for value in tree_iter((args, kwargs)):
        if not isinstance(value, torch.Tensor) or (value.device.type == "cpu" and value.dim() == 0):
            continue
        if func in _INDEXING and value.device.type == "cpu":
            continue
        if found is not None and value.device != found:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{machine.name(found)} and {machine.name(value.device)}! (when running {func})"
            )
        found = value.device
    return torch.device("cpu") if found is None else found


def _to_copy(source: torch.Tensor, **options: Any) -> torch.Tensor:
    machine = active()
    device = torch.device(options.get("device") or source.device)
    dtype = options.get("dtype") or source.dtype
    inner = _inner(source)
    kept = {key: value for key, value in options.items() if key in ("dtype", "layout", "memory_format")}
    if device.type == DEVICE_TYPE:
        made = machine.placed(machine.compute(aten._to_copy.default, (inner,), kept))
        machine.pool(device).hold(made)
        return _noted(machine, source, VirtualTensor(made, device), options)
    if inner.is_meta and device.type != "meta":
        return _noted(machine, source, torch.zeros(inner.shape, dtype=dtype, device=device), options)
    result: torch.Tensor = aten._to_copy.default(inner, **kept, device=device)
    return _noted(machine, source, result, options)


def _noted(machine: Machine, source: torch.Tensor, made: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    if source.device != made.device:
        machine.copied(source, made)
    elif machine.clock is not None:
        machine.clock.operator(
            machine.name(made.device), aten._to_copy.default, [source], [made], ((source,), options, made)
        )
    return made


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    machine = active()
    machine.fill(_inner(target), _inner(source))
    if source.device != target.device:
        machine.copied(source, target)
    elif machine.clock is not None:
        call: Any = ((target, source), {}, target)
        machine.clock.operator(machine.name(target.device), aten.copy_.default, [target, source], [target], call)
    return target


def _empty(
    size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
    memory_format: Any = None,
) -> VirtualTensor:  # fmt: skip
    return _made(torch.empty(size, dtype=dtype, device=_backing(dtype)), device)


def _empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> VirtualTensor:
    return _made(torch.empty_strided(size, stride, dtype=dtype, device=_backing(dtype)), device)


def _backing(dtype: torch.dtype | None) -> str:
    return "meta" if active().is_blank(dtype or torch.get_default_dtype()) else "cpu"


def _made(inner: torch.Tensor, device: Any) -> VirtualTensor:
    active().pool(torch.device(device)).hold(inner)
    return VirtualTensor(inner, torch.device(device))


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Return attention by the fused kernel; None where it does not take these arguments."""
    tensors = [tensor for tensor in (query, key, value, attn_mask) if tensor is not None]
    if dropout_p or query.dtype not in _FUSED or not all(isinstance(tensor, VirtualTensor) for tensor in tensors):
        return None
    if any(tensor.dim() != 4 for tensor in tensors):
        return None
    if not enable_gqa and query.size(1) != key.size(1):
        # Heads that are broadcast have no fused kernel, on GPUs neither.
        return None
    if enable_gqa:
        times = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = zeros.masked_fill_(attn_mask.logical_not(), -math.inf)
        attn_mask = attn_mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
