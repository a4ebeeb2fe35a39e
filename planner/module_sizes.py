"""What modules hold: bytes by name, as they are or in a dtype they will be loaded in, and names of one tensor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planner.errors import InputError

if TYPE_CHECKING:
    import torch

# Accelerate's names of types that torch may not have; its enumeration has them as values.
_BITS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "fp8": 8, "bool": 8}


def compute_module_sizes(
    model: torch.nn.Module,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    buffers_only: bool = False,
) -> dict[str, int]:
    """Return the bytes of every module and tensor by its path; "" is the whole model, and unknown paths have 0.

    A tensor with several names counts once, under the first. `dtype` is what floating-point tensors are converted to
    when they are loaded, `special_dtypes` that of single tensors by name.

    Raises:
        InputError: a dtype is not known.
    """
    check_module(model)
    sizes: dict[str, int] = defaultdict(int)
    measure = Sizes.read(dtype, special_dtypes)
    seen: set[int] = set()
    for name, tensor, is_buffer in named_tensors(model):
        if id(tensor) in seen or (buffers_only and not is_buffer):
            continue
        seen.add(id(tensor))
        nbytes = measure.of(name, tensor)
        for path in paths(name):
            sizes[path] += nbytes
    return sizes


def find_tied_parameters(model: torch.nn.Module) -> list[list[str]]:
    """Return the sets of names, each sorted, that one parameter goes by."""
    check_module(model)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [sorted(group) for group in names.values() if len(group) > 1]


def check_module(model: object) -> None:
    """Raise InputError where what was given for a model is none."""
    import torch

    if not isinstance(model, torch.nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise InputError(f"the model is {kind}; give the torch.nn.Module itself")


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield (name, tensor, whether it is a buffer) under every name, parameters before buffers."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter, False
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, buffer, True


def paths(name: str) -> Iterator[str]:
    """Yield a tensor's name and everything that it lies under, "" last."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many bytes tensors take once they are loaded. bits: of an element where it is converted."""

    bits: int | None = None
    special_bits: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, dtype: Any, special_dtypes: Mapping[str, Any] | None) -> Sizes:
        special = {name: _bits(wanted) for name, wanted in (special_dtypes or {}).items()}
        return cls(bits=None if dtype is None else _bits(dtype), special_bits=special)

    def of(self, name: str, tensor: torch.Tensor) -> int:
        """Return a tensor's bytes, rounded up to whole ones; whole numbers and truth values are not converted."""
        bits = self.special_bits.get(name)
        if bits is None and tensor.is_floating_point():
            bits = self.bits
        if bits is None:
            return tensor.numel() * tensor.element_size()
        return -(-tensor.numel() * bits // 8)

    def total(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Return the bytes of several tensors, each counted once."""
        once = {id(tensor): (name, tensor) for name, tensor in tensors}
        return sum(self.of(name, tensor) for name, tensor in once.values())


def _bits(dtype: Any) -> int:
    """Return the bits of one element: of a torch dtype, its name, or one of Accelerate's own."""
    import torch

    name = str(getattr(dtype, "value", dtype)).removeprefix("torch.")
    if name in _BITS:
        return _BITS[name]
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"{dtype!r} is no dtype; say one of torch's, such as torch.float16 or 'bfloat16'")
    small = re.fullmatch(r"u?int([1-7])", name)
    return int(small[1]) if small else found.itemsize * 8
