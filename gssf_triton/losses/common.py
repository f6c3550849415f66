"""What the losses share: checks, folding, the operands of the product, and the reduction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gssf_triton import checks, ops, torch_backend
from gssf_triton.backend import resolve_backend
from gssf_triton.functional import autocast_features
from gssf_triton.losses.ranks import Ranks

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Sides:
    """Both sides ready for the product, in float32 at least: S = t yᵀ. Differentiable.

    `half`: the features are half-precision, so the product may be, too (see `Operand`).
    """

    t: Tensor
    y: Tensor
    half: bool
    backend: str


def prepare(
    a: object,
    b: object,
    W_diag: Tensor | None,
    W_blocks: Tensor | None,
    normalize: bool,
    backend: str,
    *,
    names: tuple[str, str] = ("a", "b"),
    paired: bool = True,
    identity: bool = False,
) -> Sides:
    """Check the features and the weights, and fold once: T(a) and b, normalised where asked for.

    `paired` wants as many rows on both sides; `identity` allows no weight at all, which is then the plain dot product.
    """
    checks.check_batches(names, a, b, paired)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    plain = identity and W_diag is None and W_blocks is None
    if not plain:
        checks.check_weights(names[0], a, W_diag, W_blocks)
    a, b = autocast_features(a, b)
    checks.check_same_dtype(a, b, names)
    backend = resolve_backend(backend, a, W_blocks)
    # Half-precision features are folded in float32 and rounded once, to the product's operands.
    wide = torch_backend.accumulate_dtype(a.dtype)
    rows, y = a.to(wide), b.to(wide)
    if backend == "torch":
        if plain:
            t = torch_backend.unit_rows(rows) if normalize else rows
        else:
            t = torch_backend.fold(rows, W_diag, W_blocks, normalize)
        y = torch_backend.unit_rows(y) if normalize else y
    else:
        if not plain or normalize:
            t = ops.fold(rows, W_diag, W_blocks, normalize)
        else:
            t = rows
        y = ops.fold(y, None, None, True) if normalize else y
    return Sides(t, y, a.dtype.itemsize == 2, backend)


@dataclass(frozen=True)
class Operand:
    """Rows as the product takes them: `rows` · `unit` are the rows, `unit` a power of two, () float32 or float64."""

    rows: Tensor
    unit: Tensor


def operand(x: Tensor, half: bool, backend: str) -> Operand:
    """x (M, D) for the product: itself, or for half-precision features on Triton float16 of a common power of two.

    Not bfloat16: its 8 bits, times a logit scale of 100, would put errors of a percent into the gradients. float16
    has 11 bits at the same speed, and the power of two keeps its range out of the way, exactly.
    """
    one = torch.ones((), dtype=x.dtype, device=x.device)
    if not half or backend == "torch":
        return Operand(x, one)
    size = x.abs()
    # NaN and Inf stay in their rows: they must not scale the others.
    largest = torch.where(torch.isfinite(size), size, 0.0).amax() if x.numel() else one
    mantissa, _ = torch.frexp(largest)
    unit = torch.where(largest > 0, largest / mantissa, one)
    return Operand((x / unit).to(torch.float16), unit)


def scalar(name: str, value: object, like: Tensor) -> Tensor:
    """A number or a tensor of one element as a 0-d tensor of like's dtype and device; differentiable."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one element, got shape {tuple(value.shape)}")
        if not value.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {value.dtype}")
        return value.reshape(()).to(like.device, like.dtype)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a torch.Tensor, got {type(value).__name__}")
    return torch.full((), float(value), dtype=like.dtype, device=like.device)


def check_ids(ids: object, rows: int, device: torch.device) -> Tensor | None:
    """Integer ids, one a pair, as int64 on the features' device."""
    if ids is None:
        return None
    checks.check_tensor("ids", ids)
    assert isinstance(ids, Tensor)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    if ids.shape != (rows,):
        raise ValueError(f"ids must have shape ({rows},), one a pair, got {tuple(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"ids must be on the features' device {device}, got {ids.device}")
    return ids.to(torch.int64)


def reduce(values: Tensor, reduction: str, pairs: int) -> Tensor:
    """A loss's sum, () or its values, (pairs,), under `reduction`; the mean of nothing is 0."""
    return values / max(pairs, 1) if reduction == "mean" else values


def described(loss: str, a: Tensor, sides: Sides, **options: object) -> dict[str, object]:
    """What every process of a group must agree on: one that takes no part in a collective leaves the others waiting."""
    gradients = wants_gradient(sides.t), wants_gradient(sides.y)
    return {"loss": loss, "D": a.shape[1], "dtype": a.dtype, "gradients": gradients, **options}


def wants_gradient(*tensors: Tensor | None) -> bool:
    """True where a backward pass may follow."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def incoming(grad: Tensor, like: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """A loss's incoming gradient, () or (M,), as (common factor, weights in [−1, 1] of length M or 1).

    The slopes are made for weights no larger than 1, so that float16 holds them, in units that all processes share. The
    factor is of the sum of all processes' losses: a scalar is the same loss on each of them, so it counts that often.
    """
    grad = grad.to(like.dtype)
    if grad.dim() == 0:
        return grad * ranks.count, torch.ones_like(grad)[None]
    largest = ranks.max(grad.abs().amax() if grad.numel() else like.new_zeros(()))
    factor = torch.where(largest > 0, largest, torch.ones_like(largest))
    return factor, grad / factor
