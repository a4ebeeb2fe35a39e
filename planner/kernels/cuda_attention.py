"""Runs attention on pretend tensors as CUDA would: the backend that torch would choose, and its operators.

torch chooses in C++, by the device of the tensors, and pretend tensors are on a CPU. While `CudaAttention` is active,
`scaled_dot_product_attention` of fake tensors goes through the same checks in the same order (torch 2.11 to 2.13,
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and sdp_utils_cpp.h), then calls the operators that the chosen
backend is made of (aten/src/ATen/native/transformers/attention.cpp). A float16 softmax that is to give float32 does so
in one operator, as on CUDA (aten/src/ATen/native/SoftMax.cpp). Everything else passes through.

Known limitations: from torch 2.14 efficient attention takes grouped heads; here, as up to 2.13, it does not. Nested
tensors, backends switched off by the user and float8 are not carried. No input needs a gradient.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from planner.kernels.cuda import CudaKernels

aten = torch.ops.aten

Backend = Literal["cudnn", "flash", "efficient", "math"]

# The cuDNN that torch's wheels for CUDA 13 bring, by far newer than what is asked for below. Wheels for CUDA 12 bring
# 9.10, with which flash attention comes first on every GPU.
CUDNN_VERSION = 92000
_HALF = (torch.float16, torch.bfloat16)
_MASK_ALIGNMENT = 8

_ATTENTION = frozenset(
    (
        torch.nn.functional.scaled_dot_product_attention,
        aten.scaled_dot_product_attention,
        aten.scaled_dot_product_attention.default,
    )
)
_SOFTMAX: dict[Any, Any] = {
    torch.softmax: aten._softmax.default,
    torch.Tensor.softmax: aten._softmax.default,
    torch.nn.functional.softmax: aten._softmax.default,
    torch.log_softmax: aten._log_softmax.default,
    torch.Tensor.log_softmax: aten._log_softmax.default,
    torch.nn.functional.log_softmax: aten._log_softmax.default,
}


class CudaAttention(TorchFunctionMode):
    """While active, attention of fake tensors calls the operators of the backend that this GPU's torch would choose.

    cudnn_version: as `torch.backends.cudnn.version()` would say.
    """

    def __init__(self, kernels: CudaKernels, *, cudnn_version: int = CUDNN_VERSION):
        super().__init__()
        self.kernels = kernels
        self.cudnn_version = cudnn_version

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ATTENTION and isinstance(args[0] if args else kwargs["query"], FakeTensor):
            return self._attend(*args, **kwargs)
        if func in _SOFTMAX and _is_fused_softmax(*args, **kwargs):
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return _SOFTMAX[func](args[0], dim, True)
        if func is torch.nn.functional.multi_head_attention_forward:
            return self._inside(func, args, kwargs)
        return func(*args, **kwargs)

    def _inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function of Python's that attends: the mode is not active inside what it was asked about."""
        functional = torch.nn.functional
        attention = functional.scaled_dot_product_attention

        def attend(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            chosen = self._attend if isinstance(query, FakeTensor) else attention
            return chosen(query, *args, **kwargs)

        functional.scaled_dot_product_attention = attend
        try:
            return func(*args, **kwargs)
        finally:
            functional.scaled_dot_product_attention = attention

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        backend = attention_backend(
            self.kernels,
            query,
            key,
            value,
            attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            enable_gqa=enable_gqa,
            cudnn_version=self.cudnn_version,
        )
        if backend == "math":
            return _math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        mask = _float_mask(attn_mask, query.dtype)
        out: torch.Tensor
        if backend == "flash":
            return _flash(query, key, value, dropout_p, is_causal, scale)
        if backend == "cudnn":
            out, *_ = aten._scaled_dot_product_cudnn_attention.default(
                query, key, value, mask, False, dropout_p, is_causal, False, scale=scale
            )
            return out
        if mask is not None:
            mask = _aligned(mask).expand(*query.shape[:3], key.shape[2])
        out, *_ = aten._scaled_dot_product_efficient_attention.default(
            query, key, value, mask, False, dropout_p, is_causal, scale=scale
        )
        return out


def attention_backend(
    kernels: CudaKernels,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
    cudnn_version: int = CUDNN_VERSION,
) -> Backend:
    """Return the backend that torch would choose on this GPU, for tensors of shape (batch, heads, tokens, width).

    Source: sdp_utils.cpp (select_sdp_backend, priority_order, can_use_*).
    """
    if not _same_shapes(query, key, value, mask):
        return "math"
    heads = (query.shape[1], key.shape[1], value.shape[1])
    alike = len(set(heads)) == 1
    major = kernels.capability[0]
    widths = (query.shape[3], key.shape[3], value.shape[3])
    half = _common_dtype(query, key, value) in _HALF
    # sdp_utils.cpp (check_prefer_cudnn_attention): cuDNN comes first where it is newer than 9.15.
    if (
        major in (9, 10)
        and cudnn_version > 91500
        and half
        and _last_strides(query, key, value, mask)
        and (alike or (enable_gqa and heads[0] % heads[1] == 0 and heads[0] % heads[2] == 0))
        and _cudnn_takes(kernels, widths, key.shape[2], mask, query, dropout_p)
    ):
        return "cudnn"
    if (
        (8, 0) <= kernels.capability <= (12, 1)
        and half
        and mask is None
        and len(set(widths)) == 1
        and widths[0] <= 256
        and not (is_causal and query.shape[2] != key.shape[2])
        and (alike or (enable_gqa and heads[1] == heads[2] and heads[0] % heads[1] == 0))
        and (_last_strides(query, key, value, None) or widths[0] == 1)
    ):
        return "flash"
    if (
        (5, 0) <= kernels.capability <= (12, 1)
        and alike
        and _efficient_takes(kernels, widths, _common_dtype(query, key, value))
        and _last_strides(query, key, value, mask)
    ):
        return "efficient"
    return "math"


def _same_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Return whether any fused kernel may run: four dimensions, one batch size, no empty tensor."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    return query.shape[0] == key.shape[0] == value.shape[0] and query.shape[2] > 0 and key.shape[2] > 0


def _common_dtype(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.dtype | None:
    return query.dtype if query.dtype is key.dtype is value.dtype else None


def _last_strides(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Return whether all last dimensions have stride 1 (check_last_dim_stride_equals_1_dense)."""
    return all(tensor is None or tensor.stride(-1) == 1 for tensor in (query, key, value, mask))


def _cudnn_takes(
    kernels: CudaKernels,
    widths: tuple[int, int, int],
    keys: int,
    mask: torch.Tensor | None,
    query: torch.Tensor,
    dropout_p: float,
) -> bool:
    """Return whether cuDNN attention takes these shapes (check_cudnn_tensor_shapes, check_attn_mask_shape).

    Widths in eights, up to 256 on capability 9.0, else up to 128. Not one key, nor a mask of three dimensions.
    """
    widest = 256 if kernels.capability == (9, 0) else 128
    if keys == 1 or any(width > widest or width % 8 for width in widths) or (dropout_p and query.shape[2] == 1):
        return False
    if mask is None:
        return True
    full = (query.shape[0], query.shape[1], query.shape[2], keys)
    fits = all(size in (1, whole) for size, whole in zip(mask.shape[::-1], full[::-1], strict=False))
    return mask.dim() in (2, 4) and fits


def _efficient_takes(kernels: CudaKernels, widths: tuple[int, int, int], dtype: torch.dtype | None) -> bool:
    """Return whether efficient attention takes these widths and this type (minimum_gemm_alignment).

    bfloat16 only from capability 8; widths in eights for half types and in fours for float32 where tensor cores work.
    """
    major = kernels.capability[0]
    half = dtype in _HALF
    if dtype not in ((*_HALF, torch.float32) if major >= 8 else (torch.float16, torch.float32)):
        return False
    alignment = 4 if major >= 8 else 1
    if major >= 8 or (major >= 7 and half):
        alignment = max(alignment, 8 if half else 4)
    return widths[0] == widths[1] and all(width > 0 and width % alignment == 0 for width in widths)


def _is_fused_softmax(source: Any = None, dim: Any = None, dtype: Any = None, **options: Any) -> bool:
    return dtype is torch.float32 and isinstance(source, FakeTensor) and source.dtype is torch.float16


def _float_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a boolean mask as one that is added: 0 where it is true, else -inf (convert_boolean_attn_mask)."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    zero = torch.scalar_tensor(0.0, dtype=dtype)
    added: torch.Tensor = aten.where.ScalarOther(mask, zero, -math.inf)
    return added


def _aligned(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask whose rows start at multiples of eight elements (preprocess_mask, pad_bias)."""
    *outer, last = mask.stride()
    if last == 1 and all(stride % _MASK_ALIGNMENT == 0 for stride in outer):
        return mask
    columns = mask.shape[-1]
    padded = torch.nn.functional.pad(mask, (0, _MASK_ALIGNMENT - columns % _MASK_ALIGNMENT))
    return padded[..., :columns]


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, is_causal: bool, scale: float | None
) -> torch.Tensor:
    """Flash attention: widths padded to eights by copying (pad_last_dim), the output cut back to the true width."""
    width = query.shape[-1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    if width % 8:
        query, key, value = (torch.nn.functional.pad(part, (0, 8 - width % 8)) for part in (query, key, value))
    out: torch.Tensor
    out, *_ = aten._scaled_dot_product_flash_attention.default(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )
    return out[..., :width] if width % 8 else out


def _math(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Attention step by step (_scaled_dot_product_attention_math), in float32 for half types.

    Not by that operator: for fake tensors it adds the mask out of place, which real ones do not.
    """
    if is_causal and mask is not None:
        raise RuntimeError("scaled_dot_product_attention: attn_mask should not be set when is_causal=True")
    dtype = query.dtype
    mask = _float_mask(mask, dtype)
    if dtype in _HALF:
        query, key, value = query.float(), key.float(), value.float()
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    factor = math.sqrt(abs(scale))
    scaled = query * math.copysign(factor, scale)
    if is_causal:
        ones = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        mask = ones.tril()
        del ones
        mask = _float_mask(mask, scaled.dtype)
    whole_key, whole_value = key, value
    if enable_gqa and not query.shape[-3] == key.shape[-3] == value.shape[-3]:
        whole_key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        whole_value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    weights = scaled @ (whole_key.transpose(-2, -1) * factor)
    if mask is not None:
        weights.add_(mask)
    weights = aten._safe_softmax.default(weights, -1)
    if dropout_p:
        weights = torch.nn.functional.dropout(weights, dropout_p)
    returned = weights.to(dtype)  # torch makes it before the output, and drops it with the output made
    out = (weights @ whole_value).to(dtype)
    del returned
    return out
