"""What rules of CPU kernels are written with: the CPU, an operator's call, the steps of a program, a table of rules.

Paths in docstrings are under `aten/src/ATen/native` of pytorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from planner.kernels.programs import nbytes
from planner.lifetimes import OUTPUTS_ONLY, Scratch

FLOAT, DOUBLE, HALF, BFLOAT16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The CPU that kernels will run on.

    isa: what torch calls it ("AVX512", "AVX2", "DEFAULT", ...).
    flags: of avx512_bf16, avx512_fp16, avx_ne_convert and amx_tile, those that it has: they choose kernels.
    l2_bytes: of one core; oneDNN splits work by it.
    """

    threads: int
    isa: str
    flags: frozenset[str] = frozenset()
    l2_bytes: int = 1 << 20

    @property
    def onednn_bf16(self) -> bool:
        """Whether bf16 products go to oneDNN (mkldnn/Utils.h, mkldnn_bf16_device_check)."""
        return self.isa.startswith("AVX512") or "avx_ne_convert" in self.flags

    @property
    def onednn_fp16(self) -> bool:
        """Whether fp16 products go to oneDNN (mkldnn/Utils.h, mkldnn_fp16_device_check)."""
        return bool({"avx512_fp16", "avx_ne_convert"} & self.flags)

    @property
    def brgemm_bf16(self) -> bool:
        """Whether oneDNN's bf16 kernels are those modelled here, for AVX512-BF16 without AMX."""
        return self.isa.startswith("AVX512") and "avx512_bf16" in self.flags and "amx_tile" not in self.flags


class Call(NamedTuple):
    """An operator as it is called, and on what."""

    cpu: Cpu
    args: Sequence[Any]
    kwargs: dict[str, Any]
    outputs: Sequence[torch.Tensor]


Rule = Callable[[Call], Scratch | None]


class Rules(dict[Any, Rule]):
    """Rules by operator."""

    def enter(self, *names: str) -> Callable[[Rule], Rule]:
        """Enter a rule under operators such as "mul.Tensor"; names that this torch lacks are passed over."""

        def entered(rule: Rule) -> Rule:
            for name in names:
                packet, _, overload = name.partition(".")
                found = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
                if found is not None:
                    self[found] = rule
            return rule

        return entered


class Steps:
    """Writes a program; `take` returns the number by which `give` frees."""

    def __init__(self) -> None:
        self.program: list[int] = []
        self.taken = 0

    def take(self, nbytes: int) -> int:
        """Allocate, unless there is nothing to hold: the allocator is not asked for 0 bytes."""
        if nbytes == 0:
            return 0
        self.program.append(nbytes)
        self.taken += 1
        return self.taken

    def give(self, *taken: int) -> None:
        self.program += [-which for which in taken if which]

    def outputs(self) -> None:
        self.program.append(0)

    def copy(self, source: torch.Tensor) -> int:
        """Take a contiguous copy of `source`, and for as long as copying lasts the block that transposing takes."""
        taken = self.take(nbytes(source))
        self.give(self.take(transpose_block(source)))
        return taken

    def done(self) -> Scratch:
        return OUTPUTS_ONLY if self.program == [0] else Scratch(program=tuple(self.program))


def argument(args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str, default: Any = None) -> Any:
    """Return an argument that was given by position or by name, or its default."""
    return args[position] if len(args) > position else kwargs.get(name, default)


_TRANSPOSE_SIDE = 60


def transpose_block(source: torch.Tensor) -> int:
    """Return the bytes of the block through which a transposed matrix is copied (Copy.cpp, copy_transpose_valid)."""
    if source.dim() != 2 or source.numel() < _TRANSPOSE_SIDE**2:
        return 0
    if source.stride(0) != 1 or source.stride(1) != source.size(0):
        return 0
    # One row of side `numel` is contiguous as well, and is then copied plainly by what calls this.
    side = 2 * _TRANSPOSE_SIDE if source.dtype is torch.uint8 else _TRANSPOSE_SIDE
    return side * side * source.dtype.itemsize


def channels_last(x: torch.Tensor) -> bool:
    """Return whether images are contiguous with channels last, in 2-D or 3-D."""
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.dim() in (4, 5) and x.is_contiguous(memory_format=layout)
