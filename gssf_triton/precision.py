"""Half precision: what torch.autocast does in this package, and how a product in float16 stays in range.

Under autocast a matrix of similarities is computed as matmul is: the product and the result have autocast's dtype. Rows
are normalised and folded in float32 and rounded once, to the product's operands. Everything else ignores autocast:
matched pairs, the losses' sums, and retrieval, where rounding would change the ranking. So does float64.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

#: Checked at import because torch 2.8 cannot trace this check.
AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla") if torch.amp.is_autocast_available(kind)
)


def _multiplies_bfloat16() -> bool:
    """Whether torch leaves a CPU's bfloat16 products to oneDNN: with AVX-512, AVX-NE-CONVERT or Arm's bfloat16."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:  # a torch without oneDNN
        return False


#: Dtypes that a CPU multiplies faster in float32: torch's own loop takes 7 to 60 times as long.
SLOW_ON_CPU = frozenset((torch.float16,) if _multiplies_bfloat16() else (torch.float16, torch.bfloat16))

#: Operands of a float16 product are not scaled if their largest number lies between these. float16 ends at 65504 and
#: has all of its bits down to 6e-5.
SMALLEST_OPERAND, LARGEST_OPERAND = 2.0**-8, 2.0**14

#: Where a product is divided by one side's norms only afterwards, the other side is divided by this first, and the
#: inverse norms are multiplied by it. So the product with a row of any size is finite.
HEADROOM = 2.0**24

#: It keeps nothing, so that one serves all.
_AS_IT_IS = nullcontext()


def under_autocast(x: Tensor) -> bool:
    kind = x.device.type
    return kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind)


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Autocast off: it would round float32 operands."""
    return torch.autocast(x.device.type, enabled=False) if under_autocast(x) else _AS_IT_IS


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that rows like x are multiplied in."""
    if x.dtype == torch.float64 or not under_autocast(x):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def joined(*features: Tensor) -> tuple[Tensor, ...]:
    """Features unchanged. Under autocast features of two dtypes are cast to the wider one: matmul takes both there."""
    if all(x.dtype == features[0].dtype for x in features):
        return features
    dtypes = {x.dtype for x in features} - {torch.float64}
    if len(dtypes) < 2 or not under_autocast(features[0]):
        return features
    wide = functools.reduce(torch.promote_types, dtypes)
    return tuple(x if x.dtype == torch.float64 else x.to(wide) for x in features)


def power_of(x: Tensor, dim: int | None = None) -> Tensor:
    """The power of two at or below the largest |x| (along dim, which is kept), float32; 2⁻¹²⁶ if all are 0.

    NaN and Inf do not count: they must not scale other rows.
    """
    sizes = x.detach().float().nan_to_num(0.0, 0.0, 0.0).abs()
    if dim is not None:
        sizes = sizes.amax(dim, keepdim=True) if x.shape[dim] else sizes.sum(dim, keepdim=True)
    else:
        sizes = sizes.amax() if x.numel() else sizes.sum()
    # Clear the mantissa.
    return (sizes.clamp_min(2.0**-126).view(torch.int32) & 0x7F800000).view(torch.float32)


def float16_unit(x: Tensor, dim: int | None = None) -> Tensor:
    """A power of two, mostly 1. x / unit is the operand of a float16 product; the result times unit is that of x."""
    power = power_of(x, dim)
    return power / power.clamp(SMALLEST_OPERAND, LARGEST_OPERAND)


def moved_unit(t: Tensor, y: Tensor) -> Tensor:
    """A power of two, mostly 1. t / unit and y · unit are operands of a float16 product, which equals that of t and y.

    Gradients stay in range too. It is the power closest to 1 that works, so that small rows keep their bits.
    """
    of_t, of_y = power_of(t), power_of(y)
    unit = torch.ones_like(of_t).clamp(SMALLEST_OPERAND / of_y, LARGEST_OPERAND / of_y)
    return unit.clamp(of_t / LARGEST_OPERAND, of_t / SMALLEST_OPERAND)


def float16_operands(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """t and y in float16, scaled so that their product is unchanged and in range."""
    unit = moved_unit(t, y)
    return (t.float() / unit).to(torch.float16), (y.float() * unit).to(torch.float16)
