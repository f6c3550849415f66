"""Half precision: what torch.autocast means in this package, and how a product in float16 keeps to its range.

Under autocast a similarity is what matmul is there: a product in autocast's dtype, and so is what a function returns.
Nothing else is rounded to it: rows are normalised and folded in float32, as they came, with the weights as they are,
and rounded once, to the product's operands. What is no such product (matched pairs, the losses' sums, retrieval, whose
ranking rounding would change) is computed as it is without autocast. float64 is left alone, as matmul leaves it.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

#: Asked once: torch 2.8 cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla") if torch.amp.is_autocast_available(kind)
)

#: Operands of a float16 product whose largest number lies between these need no help: float16 ends at 65504, and has
#: all of its bits down to 6e-5, far below what such operands look like.
SMALLEST_OPERAND, LARGEST_OPERAND = 2.0**-8, 2.0**14

#: Folded rows that meet rows whose norm divides the product only afterwards are made smaller by it, and the inverse
#: norms larger: a product with a row of whatever size is finite, and 0 of it is 0.
HEADROOM = 2.0**24


def under_autocast(x: Tensor) -> bool:
    return x.device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(x.device.type)


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Outside autocast, which would round what is multiplied in float32."""
    return torch.autocast(x.device.type, enabled=False) if under_autocast(x) else nullcontext()


def product_dtype(x: Tensor) -> torch.dtype:
    """What rows like x are multiplied in."""
    if x.dtype == torch.float64 or not under_autocast(x):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def joined(*features: Tensor) -> tuple[Tensor, ...]:
    """Features as they are; under autocast those of two dtypes in the wider one, since matmul takes them there."""
    dtypes = {x.dtype for x in features} - {torch.float64}
    if len(dtypes) < 2 or not under_autocast(features[0]):
        return features
    wide = functools.reduce(torch.promote_types, dtypes)
    return tuple(x if x.dtype == torch.float64 else x.to(wide) for x in features)


def power_of(x: Tensor, dim: int | None = None) -> Tensor:
    """The power of two at or below the largest |x| (along dim, which stays), float32; 2⁻¹²⁶ where all is 0.

    NaN and Inf stay in their rows: they must not scale the others.
    """
    sizes = x.detach().float().nan_to_num(0.0, 0.0, 0.0).abs()
    if dim is not None:
        sizes = sizes.amax(dim, keepdim=True) if x.shape[dim] else sizes.sum(dim, keepdim=True)
    else:
        sizes = sizes.amax() if x.numel() else sizes.sum()
    # The sign and the mantissa cut off.
    return (sizes.clamp_min(2.0**-126).view(torch.int32) & 0x7F800000).view(torch.float32)


def float16_unit(x: Tensor, dim: int | None = None) -> Tensor:
    """A power of two: x / unit are operands of a float16 product, whose result times unit is x's. Mostly 1."""
    power = power_of(x, dim)
    return power / power.clamp(SMALLEST_OPERAND, LARGEST_OPERAND)


def moved_unit(t: Tensor, y: Tensor) -> Tensor:
    """A power of two: t / unit and y · unit are operands of a float16 product, which is t's and y's. Mostly 1.

    Nothing has to be undone, and gradients pass in range as well. It is the least that does, so that rows far smaller
    than the largest keep their bits.
    """
    of_t, of_y = power_of(t), power_of(y)
    unit = torch.ones_like(of_t).clamp(SMALLEST_OPERAND / of_y, LARGEST_OPERAND / of_y)
    return unit.clamp(of_t / LARGEST_OPERAND, of_t / SMALLEST_OPERAND)


def float16_operands(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Operands in float16 of the product that t and y have."""
    unit = moved_unit(t, y)
    return (t.float() / unit).to(torch.float16), (y.float() * unit).to(torch.float16)
