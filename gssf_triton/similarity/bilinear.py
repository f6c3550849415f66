"""The operators every other is a partial derivative of: fold, pairwise and gradient.

They are derivatives of one form, F(P, y, x, W) = Σ_ij P_ij y_iᵀ(W ⊙ U)x_j, linear in each of its four arguments, so the
derivatives of each, of any order, are operators of this file:

    ∂F/∂P = pairwise(y, x, W)              ∂F/∂y = gradient(P, x, W).rows = T'(P x)
    ∂F/∂W = gradient(P, x, y).weights      ∂F/∂x = gradient(Pᵀ, y, Wᵀ).rows = T(Pᵀ y)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gssf_triton import kernels
from gssf_triton.kernels import choice
from gssf_triton.kernels.plans import Plan
from gssf_triton.kernels.toolchain import may_launch
from gssf_triton.metric import IDENTITY, Metric, accumulate_dtype, as_rows
from gssf_triton.operators import operator, wants_gradient
from gssf_triton.precision import float16_operands, full_precision
from gssf_triton.similarity import sides, torch_backend
from gssf_triton.similarity.sides import has_kernel

#: A tensor that may be absent.
Maybe = Tensor | None

#: The value taken for a size unknown at tracing.
UNKNOWN_SIZE = 8192


def add(x: Maybe, y: Maybe) -> Maybe:
    return y if x is None else x if y is None else x + y


def cast_like(x: Maybe, like: Maybe) -> Maybe:
    """A gradient in its tensor's dtype."""
    return None if x is None or like is None else x if x.dtype == like.dtype else x.to(like.dtype)


def _size(n: int | torch.SymInt) -> int:
    """A size to choose a plan by. For a symbolic size its value at tracing, without a guard: every plan is correct."""
    if not isinstance(n, torch.SymInt):
        return n
    return int(n.node.hint) if n.node.has_hint() else UNKNOWN_SIZE


def _plan(a: Tensor, b: Tensor, metric: Metric, finishes: bool) -> Plan:
    """The plan of S; `finishes`: gradients of normalised rows may follow, which take both sides' operands."""
    *batches, M, D = map(_size, a.shape)
    N, B, batch = _size(b.shape[-2]), _size(metric.block_size), batches[0] if batches else 1
    plan = choice.choose("plan", a.device, a.dtype, M, N, D, B, batch).resolve(M, N)
    if plan.kind != "one_pass":
        return plan
    # One pass stores no operand. In float16 it rounds T(a), which may leave its range.
    unfit = (finishes and not choice.is_forced("plan")) or a.dtype == torch.float16
    # Without blocks there is a diagonal.
    has_blocks = metric.W_blocks is not None
    if unfit or not may_launch("pairwise", a.dtype, a.device, has_diag=True, has_blocks=has_blocks):
        return Plan("fold_product", plan.fold_b)
    return plan


# ---------------------------------------------------------------------------------------------------------------- fold


@operator("gssf::fold", "(Tensor x, Tensor? w_diag, Tensor? w_blocks, bool normalize) -> Tensor")
def _fold(x: Tensor, w_diag: Maybe, w_blocks: Maybe, normalize: bool) -> Tensor:
    return _folded(x, Metric(w_diag, w_blocks), normalize)


@_fold.register_fake
def _(x: Tensor, w_diag: Maybe, w_blocks: Maybe, normalize: bool) -> Tensor:
    return x.new_empty(x.shape)


def _folded(x: Tensor, metric: Metric, normalize: bool) -> Tensor:
    """T(x) of x (..., D), contiguous."""
    compute = kernels.fold.fold if has_kernel("fold", x, metric) else torch_backend.fold
    folded = compute(as_rows(x), metric, normalize)
    return folded if x.dim() == 2 else folded.view(x.shape)


def fold(x: Tensor, metric: Metric, normalize: bool = False) -> Tensor:
    """T(x) of x (..., D); without weights the rows themselves, normalised."""
    folded: Tensor = _fold(as_rows(x), metric.W_diag, metric.W_blocks, normalize)
    return folded if x.dim() == 2 else folded.view(x.shape)


def unit_rows(x: Tensor) -> Tensor:
    """x (..., D) with its rows on the unit sphere."""
    return fold(x, IDENTITY, normalize=True)


@operator("gssf::unit_rows_vjp", "(Tensor x, Tensor grad) -> Tensor")
def _unit_rows_vjp(x: Tensor, grad: Tensor) -> Tensor:
    return kernels.unit.unit_vjp(as_rows(x), as_rows(grad)).view(x.shape)


@_unit_rows_vjp.register_fake
def _(x: Tensor, grad: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def unit_rows_vjp(x: Tensor, grad: Maybe) -> Maybe:
    """Gradient with respect to x, given the one with respect to x / max(‖x‖, eps)."""
    if grad is None:
        return None
    compute = torch_backend.unit_rows_vjp if wants_gradient(x, grad) else _unit_rows_vjp
    of_x: Tensor = compute(x, grad)
    return of_x


def _fold_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w_diag, w_blocks, normalize = inputs
    ctx.normalize = normalize
    ctx.save_for_backward(x, w_diag, w_blocks)


def _fold_backward(ctx: Any, grad: Tensor) -> tuple[Maybe, ...]:
    x, w_diag, w_blocks = ctx.saved_tensors
    needs_x, needs_diag, needs_blocks, _ = ctx.needs_input_grad
    metric = Metric(w_diag, w_blocks)
    if metric.is_identity:
        return unit_rows_vjp(x, grad) if ctx.normalize else grad, None, None, None
    unit = unit_rows(x) if ctx.normalize else x
    rows, d_diag, d_blocks = gradient(None, grad, unit, metric, (needs_x, needs_diag, needs_blocks))
    if ctx.normalize:
        rows = unit_rows_vjp(x, rows)
    return rows, cast_like(d_diag, w_diag), cast_like(d_blocks, w_blocks), None


_fold.register_autograd(_fold_backward, setup_context=_fold_setup)


# ------------------------------------------------------------------------------------------------------------ pairwise


# The plan is an argument, chosen outside: a compiled graph keeps the plan it was traced with, and the results' shapes
# depend on arguments only.
@operator(
    "gssf::pairwise_planned",
    "(Tensor a, Tensor b, Tensor? w_diag, Tensor? w_blocks, bool normalize, ScalarType out_dtype, str kind, "
    "bool fold_b) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _pairwise(
    a: Tensor,
    b: Tensor,
    w_diag: Maybe,
    w_blocks: Maybe,
    normalize: bool,
    out_dtype: torch.dtype,
    kind: str,
    fold_b: bool,
) -> tuple[Tensor, Maybe, Maybe, Maybe, Maybe]:
    """(S, T of the folded side, the other's unit rows, the inverse norms of the first and of the second).

    One pass keeps None, nor does float16, whose operands are scaled; rows that are not normalised keep T alone.
    """
    metric = Metric(w_diag, w_blocks)

    def matrix() -> Tensor:
        return a.new_empty((*a.shape[:-1], b.shape[-2]), dtype=out_dtype)

    if kind == "one_pass":
        # The kernel folds rows of a in every tile, whichever side has fewer rows.
        return kernels.pairwise.pairwise(a, b, metric, normalize, matrix()), None, None, None, None

    rows, columns, metric = (b, a, metric.mT) if fold_b else (a, b, metric)
    half = a.dtype == torch.float16
    if half:
        rows = rows.float()
        columns = columns.float() if normalize else columns
    inverse_rows = inverse_columns = None
    if normalize:
        folded, inverse_rows = sides.unit_fold(rows, metric)
        columns, inverse_columns = sides.unit_fold(columns, IDENTITY)
    else:
        folded = _folded(rows, metric, False)
    if half:
        folded, columns = float16_operands(folded, columns)
    left, right = (columns, folded) if fold_b else (folded, columns)
    if out_dtype == a.dtype:
        with full_precision(a):
            S = torch.matmul(left, right.mT)
    else:
        S = kernels.pairwise.pairwise(left, right, IDENTITY, False, matrix())
    if half:
        return S, None, None, None, None
    return S, folded, columns if normalize else None, inverse_rows, inverse_columns


@_pairwise.register_fake
def _(a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, normalize, out_dtype, kind, fold_b = rest
    S = a.new_empty((*a.shape[:-1], b.shape[-2]), dtype=out_dtype)
    rows, columns = (b, a) if fold_b else (a, b)
    keeps = kind != "one_pass" and a.dtype != torch.float16
    folded = rows.new_empty(rows.shape if keeps else 0)
    if not (keeps and normalize):
        return S, folded, *(a.new_empty(0) for _ in range(3))
    norms = (x.new_empty(math.prod(x.shape[:-1]), dtype=accumulate_dtype(x.dtype)) for x in (rows, columns))
    return S, folded, columns.new_empty(columns.shape), *norms


# A composite operator: a traced graph contains the chosen plan, not the choice.
torch.library.define(
    "gssf::pairwise",
    "(Tensor a, Tensor b, Tensor? w_diag, Tensor? w_blocks, bool normalize, ScalarType out_dtype) -> Tensor",
)


def _pairwise_by_plan(
    a: Tensor, b: Tensor, w_diag: Maybe, w_blocks: Maybe, normalize: bool, out_dtype: torch.dtype
) -> Tensor:
    plan = _plan(a, b, Metric(w_diag, w_blocks), normalize and wants_gradient(a, b, w_diag, w_blocks))
    S: Tensor = _pairwise(a, b, w_diag, w_blocks, normalize, out_dtype, plan.kind, plan.fold_b)[0]
    return S


torch.library.impl("gssf::pairwise", "CompositeImplicitAutograd", _pairwise_by_plan)


def pairwise(a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype) -> Tensor:
    """S (Z, M, N) of a (Z, M, D) and b (Z, N, D), or (M, N) of plain rows."""
    # Only a compiler needs the operator; calling the function directly saves some microseconds.
    call = torch.ops.gssf.pairwise if torch.compiler.is_compiling() else _pairwise_by_plan
    S: Tensor = call(a, b, metric.W_diag, metric.W_blocks, normalize, out_dtype)
    return S


def bilinear_gradients(
    dS: Tensor,
    a: Tensor,
    b: Tensor,
    metric: Metric,
    normalize: bool,
    needs: tuple[bool, bool, bool, bool],
    folded: Maybe = None,
    fold_b: bool | None = None,
) -> tuple[Maybe, ...]:
    """The gradients of S with respect to (a, b, W_diag, W_blocks); None for those not in `needs`.

    One kernel computes the weights' gradients together with one side's: b's if `fold_b`, by default that of the side
    with fewer rows. `folded` is T of that side, if the forward pass has kept it: then the other side's gradient is a
    plain product.
    """
    swap = b.shape[-2] < a.shape[-2] if fold_b is None else fold_b
    needs_rows, needs_columns, needs_diag, needs_blocks = needs
    if swap:
        a, b, dS, metric = b, a, dS.mT, metric.mT
        needs_rows, needs_columns = needs_columns, needs_rows
    unit_a, unit_b = (unit_rows(a), unit_rows(b)) if normalize else (a, b)
    rows, d_diag, d_blocks = gradient(dS, unit_b, unit_a, metric, (needs_rows, needs_diag, needs_blocks))
    columns = None
    if needs_columns:
        if folded is not None and folded.dtype == dS.dtype and not torch.is_grad_enabled():
            with full_precision(dS):
                columns = torch.matmul(dS.mT, folded)
        else:
            columns, _, _ = gradient(dS.mT, unit_a, None, metric.mT, (True, False, False))
    if normalize:
        rows, columns = unit_rows_vjp(a, rows), unit_rows_vjp(b, columns)
    if swap:
        rows, columns, d_blocks = columns, rows, None if d_blocks is None else d_blocks.mT
    return rows, columns, cast_like(d_diag, metric.W_diag), cast_like(d_blocks, metric.W_blocks)


def _pairwise_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Maybe, ...]) -> None:
    a, b, w_diag, w_blocks, normalize, _, _, fold_b = inputs
    ctx.normalize = normalize
    ctx.fold_b = fold_b
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
    ctx.save_for_backward(a, b, w_diag, w_blocks, *output[1:])


def _pairwise_backward(ctx: Any, dS: Maybe, *_: Maybe) -> tuple[Maybe, ...]:
    if dS is None:
        return (None,) * 8
    a, b, w_diag, w_blocks, folded, unit, *norms = ctx.saved_tensors
    metric, needs, fold_b = Metric(w_diag, w_blocks), ctx.needs_input_grad[:4], ctx.fold_b
    # The custom operator returns plain vectors for what there is not.
    if unit is not None and unit.dim() > 1 and dS.dtype == unit.dtype and not torch.is_grad_enabled():
        da, db, d_diag, d_blocks = sides.gradients(dS, a, b, metric, needs, (folded, unit, *norms), fold_b)
        grads: tuple[Maybe, ...] = da, db, cast_like(d_diag, w_diag), cast_like(d_blocks, w_blocks)
    else:
        saved = folded if folded is not None and folded.dim() > 1 else None
        grads = bilinear_gradients(dS, a, b, metric, ctx.normalize, needs, saved, fold_b)
    return (*grads, None, None, None, None)


_pairwise.register_autograd(_pairwise_backward, setup_context=_pairwise_setup, results=1)


# ------------------------------------------------------------------------------------------------------------ gradient


@operator(
    "gssf::gradient",
    "(Tensor? p, Tensor x, Tensor? y, Tensor? w_diag, Tensor? w_blocks, SymInt block_size, bool needs_rows, "
    "bool needs_diag, bool needs_blocks) -> (Tensor, Tensor, Tensor)",
)
def _gradient(
    p: Maybe, x: Tensor, y: Maybe, w_diag: Maybe, w_blocks: Maybe, block_size: int, *needs: bool
) -> tuple[Maybe, ...]:
    needs_rows, needs_diag, needs_blocks = needs
    with full_precision(x):
        # Not the library's product in float16: rounded P x may leave the range though T'(P x) does not.
        if p is not None and p.dtype == x.dtype != torch.float16:
            *batches, M, N = p.shape
            batch = batches[0] if batches else 1
            plan = choice.choose("gradient_plan", x.device, x.dtype, M, N, x.shape[-1], block_size, batch)
            if plan.kind == "fold_product":
                x = torch.matmul(p, x)
                p = None
        has_blocks = needs_blocks or (needs_rows and w_blocks is not None)
        launches = may_launch("gradient", x.dtype, x.device, has_blocks=has_blocks)
        compute = kernels.gradient.gradient if launches else torch_backend.gradient
        return compute(p, x, y, Metric(w_diag, w_blocks), block_size, (needs_rows, needs_diag, needs_blocks))


@_gradient.register_fake
def _(
    p: Maybe, x: Tensor, y: Maybe, w_diag: Maybe, w_blocks: Maybe, block_size: int, *needs: bool
) -> tuple[Tensor, ...]:
    D, rows = x.shape[-1], (*x.shape[:-2], (x if p is None else p).shape[-2])
    wide = accumulate_dtype(x.dtype if p is None else torch.promote_types(p.dtype, x.dtype))
    return (
        x.new_empty((*rows, D) if needs[0] else 0),
        x.new_empty(D if needs[1] else 0, dtype=wide if needs[1] else x.dtype),
        x.new_empty((D // block_size, block_size, block_size), dtype=wide) if needs[2] else x.new_empty(0),
    )


def gradient(
    p: Maybe, x: Tensor, y: Maybe, metric: Metric, needs: tuple[bool, bool, bool]
) -> tuple[Maybe, Maybe, Maybe]:
    """(T'(R), Σ_i y_i ⊙ R_i, y_gᵀ R_g) of R = P x, or R = x without P; None for those not in `needs`.

    p (Z, M, N), x (Z, N, D), y (Z, M, D), or all without Z; needs is (rows, W_diag, W_blocks).
    """
    if not any(needs):
        return None, None, None
    grads = _gradient(p, x, y, metric.W_diag, metric.W_blocks, metric.block_size, *needs)
    rows, d_diag, d_blocks = (grad if wanted else None for grad, wanted in zip(grads, needs, strict=True))
    return rows, d_diag, d_blocks


def _gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    p, x, y, w_diag, w_blocks, _, *needs = inputs
    ctx.set_materialize_grads(False)
    missing = (grad for grad, wanted in zip(output, needs, strict=True) if not wanted and grad is not None)
    ctx.mark_non_differentiable(*missing)
    ctx.save_for_backward(p, x, y, w_diag, w_blocks)


def _gradient_backward(ctx: Any, u: Maybe, v_diag: Maybe, v_blocks: Maybe) -> tuple[Maybe, ...]:
    """F's other partial derivatives, from the gradients u of the rows and V = (v_diag, v_blocks) of the weights'."""
    p, x, y, w_diag, w_blocks = ctx.saved_tensors
    needs_p, needs_x, needs_y, needs_diag, needs_blocks = ctx.needs_input_grad[:5]
    metric, change = Metric(w_diag, w_blocks), Metric(v_diag, v_blocks)
    # (left rows, metric) of each form that contains R: from the rows, and from the weights' gradients.
    forms: list[tuple[Tensor, Metric]] = []
    if u is not None:
        forms.append((u, metric))
    if not change.is_identity:
        forms.append((y, change))
    dp = dx = dy = d_diag = d_blocks = None
    for left, middle in forms:
        if needs_p:
            dp = add(dp, pairwise(left, x, middle, False, p.dtype))
        if needs_x and p is None:
            dx = add(dx, fold(left, middle))
        elif needs_x:
            dx = add(dx, gradient(p.mT, left, None, middle.mT, (True, False, False))[0])
    if needs_y and not change.is_identity:
        dy, _, _ = gradient(p, x, None, change, (True, False, False))
    if u is not None:
        _, d_diag, d_blocks = gradient(p, x, u, metric, (False, needs_diag, needs_blocks))
    grads = map(cast_like, (dp, dx, dy, d_diag, d_blocks), (p, x, y, w_diag, w_blocks))
    return (*grads, None, None, None, None)


_gradient.register_autograd(_gradient_backward, setup_context=_gradient_setup)
