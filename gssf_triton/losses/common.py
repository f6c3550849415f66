"""What the losses share: checks, folding, the operands of the product, and the reduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gssf_triton import checks, options
from gssf_triton.backend import resolve_backend
from gssf_triton.losses.ranks import Ranks
from gssf_triton.once import Once
from gssf_triton.precision import joined, product_dtype
from gssf_triton.processes import kind
from gssf_triton.retrieval.checks import check_labels
from gssf_triton.similarity.functional import fold_rows

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Inputs:
    """Features and weights that passed every check; nothing has run yet, and nothing is rounded.

    `identity`: there is no weight, and none is wanted: the plain dot product.
    """

    a: Tensor
    b: Tensor
    W_diag: Tensor | None
    W_blocks: Tensor | None
    normalize: bool
    identity: bool
    backend: str


def check_inputs(
    a: object,
    b: object,
    W_diag: Tensor | None,
    W_blocks: Tensor | None,
    normalize: bool,
    backend: str,
    *,
    names: tuple[str, str] = ("a", "b"),
    weight_prefix: str = "",
    paired: bool = True,
    may_lack_weights: bool = False,
) -> Inputs:
    """Check the features and the weights: `paired` wants as many rows on both sides."""
    options.check_flags(normalize=normalize)
    checks.check_batches(names, a, b, paired)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    identity = may_lack_weights and W_diag is None and W_blocks is None
    if not identity:
        checks.check_weights(names[0], a, W_diag, W_blocks, prefix=weight_prefix)
    a, b = joined(a, b)
    checks.check_same_dtype(a, b, names)
    return Inputs(a, b, W_diag, W_blocks, normalize, identity, resolve_backend(backend, a, W_blocks))


def check_reduction(reduction: str, group: object) -> None:
    """What all losses take besides their inputs."""
    options.check_choice("reduction", reduction, REDUCTIONS)
    options.check_group(group)


@dataclass(frozen=True)
class Sides:
    """Both sides ready for the product, in float32 at least: S = t yᵀ. Differentiable.

    `half`: the features are half-precision, so the product may be, too (see `Operand`).
    """

    t: Tensor
    y: Tensor
    half: bool
    backend: str


def fold_sides(x: Inputs) -> Sides:
    """Fold once: T(a) and b, normalised where asked for, neither rounded: that is for the product's operands."""
    t = fold_rows(x.a, x.W_diag, x.W_blocks, x.normalize, backend=x.backend)
    y = fold_rows(x.b, None, None, x.normalize, backend=x.backend)
    return Sides(t, y, product_dtype(x.a).itemsize == 2, x.backend)


@dataclass(frozen=True)
class Operand:
    """Rows as the product takes them: `rows` · `unit` are the rows, `unit` a power of two, () float32 or float64."""

    rows: Tensor
    unit: Tensor


def largest_finite(x: Tensor) -> Tensor:
    """The largest |x| but for NaN and Inf, which stay in their rows: they must not scale the others. 0 of nothing."""
    size = x.abs()
    return torch.where(torch.isfinite(size), size, 0.0).amax() if x.numel() else x.new_zeros(())


def operand(x: Tensor, half: bool, backend: str) -> Operand:
    """x (M, D) for the product: itself, or for half-precision features on Triton float16 of a common power of two.

    Not bfloat16: its 8 bits, times a logit scale of 100, would put errors of a percent into the gradients. float16
    has 11 bits at the same speed, and the power of two keeps its range out of the way, exactly.
    """
    one = torch.ones((), dtype=x.dtype, device=x.device)
    if not half or backend == "torch":
        return Operand(x, one)
    largest = largest_finite(x.detach())
    mantissa, _ = torch.frexp(largest)
    unit = torch.where(largest > 0, largest / mantissa, one)
    return Operand((x / unit).to(torch.float16), unit)


def operands(t: Tensor, y: Tensor, half: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows of t, rows of y, unit of t, unit of y): the product's operands.

    A loss gives them no gradient; they say of its gradient that it is one of t and y.
    """
    left, right = operand(t, half, backend), operand(y, half, backend)
    return left.rows, right.rows, left.unit, right.unit


@dataclass(frozen=True)
class Loss(Once):
    """A loss of t (M, D) and y (N, D), its first inputs; `summed`, () in place of one value a row."""

    GRADIENTS = 2

    summed: bool
    ranks: Ranks
    backend: str

    def saved(self, *inputs: Any) -> tuple[Tensor | None, ...]:
        """All but t and y, whose place their operands take."""
        return inputs[2:]

    def total(self, loss: Tensor) -> Tensor:
        """The rows' losses as the loss has them."""
        return self.ranks.sum(loss.sum()) if self.summed else loss


def scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A number or a tensor of one element as a 0-d tensor of like's dtype and device; differentiable."""
    if isinstance(value, Tensor):
        return value.reshape(()).to(like.device, like.dtype)
    return torch.full((), float(value), dtype=like.dtype, device=like.device)


def check_ids(ids: object, a: Tensor) -> None:
    """Integer ids, one a pair, on the features' device; or None."""
    if ids is not None:
        check_labels("ids", ids, a.shape[0], "a", a)


def reduce(values: Tensor, reduction: str, pairs: int) -> Tensor:
    """A loss's sum, () or its values, (pairs,), under `reduction`; the mean of nothing is 0."""
    return values / max(pairs, 1) if reduction == "mean" else values


def described(loss: str, inputs: Inputs, sides: Sides, *scalars: Tensor, **options: object) -> dict[str, object]:
    """What every process of a group must agree on: one that takes no part in a collective leaves the others waiting.

    `scalars` are what may have a gradient besides the sides.
    """
    gradients, of_scalars = (tuple(map(wants_gradient, tensors)) for tensors in ((sides.t, sides.y), scalars))
    wanted = {"half": sides.half, "gradients": gradients, "of scalars": of_scalars}
    return {"loss": loss, **of_inputs(inputs), **wanted, **options}


def of_inputs(x: Inputs) -> dict[str, object]:
    """What describes features and weights, and how their similarities are computed."""
    return {
        "D": x.a.shape[1], "dtype": x.a.dtype, "W_diag": kind(x.W_diag), "W_blocks": kind(x.W_blocks),
        "normalize": x.normalize, "backend": x.backend,
    }  # fmt: skip


def wants_gradient(*tensors: Tensor | None) -> bool:
    """True where a backward pass may follow."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def incoming(grad: Tensor, like: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """A loss's incoming gradient, () or (M,), as (common factor, weights of length M or 1).

    The slopes are made for weights in [−1, 1], so that float16 holds them, in units that all processes share. One that
    is not finite stays so, and in its row. The factor is of the sum of all processes' losses: a scalar is the same loss
    on each of them, so it counts that often.
    """
    grad = grad.to(like.dtype)
    if grad.dim() == 0:
        return grad * ranks.count, torch.ones_like(grad)[None]
    largest = ranks.max(largest_finite(grad))
    factor = torch.where(largest > 0, largest, torch.ones_like(largest))
    return factor, grad / factor
