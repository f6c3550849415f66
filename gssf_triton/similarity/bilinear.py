"""The operators every other is a partial derivative of: fold, pairwise and gradient.

They are derivatives of one form, F(P, y, x, W) = Σ_ij P_ij y_iᵀ(W ⊙ U)x_j, linear in each of its four arguments, so the
derivatives of each, of any order, are operators of this file:

    ∂F/∂P = pairwise(y, x, W)              ∂F/∂y = gradient(P, x, W).rows = T'(P x)
    ∂F/∂W = gradient(P, x, y).weights      ∂F/∂x = gradient(Pᵀ, y, Wᵀ).rows = T(Pᵀ y)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gssf_triton.autotune import lookup
from gssf_triton.constants import NORM_EPS
from gssf_triton.kernels.plans import Plan
from gssf_triton.kernels.toolchain import may_launch
from gssf_triton.precision import float16_operands, full_precision
from gssf_triton.similarity import forms
from gssf_triton.similarity.torch_backend import accumulate_dtype, as_rows

Weights = tuple[Tensor | None, Tensor | None]

#: What a size that even the tracer does not know is taken to be.
UNKNOWN_SIZE = 8192


def _block_size(W_blocks: Tensor | None) -> int:
    return 0 if W_blocks is None else W_blocks.shape[-1]


def _transposed(W_blocks: Tensor | None) -> Tensor | None:
    return None if W_blocks is None else W_blocks.mT


def add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y


def cast_like(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient in its tensor's dtype."""
    return None if x is None or like is None else x.to(like.dtype)


def _size(n: int | torch.SymInt) -> int:
    """A size to choose by. Of a symbolic one what it was when it was traced, with no guard: any plan is right."""
    if isinstance(n, torch.SymInt):
        return int(n.node.hint) if n.node.has_hint() else UNKNOWN_SIZE
    return n


def _plan(a: Tensor, b: Tensor, W_blocks: Tensor | None, normalize: bool) -> Plan:
    batch, M, N, D = (_size(n) for n in (*a.shape[:2], b.shape[1], a.shape[2]))
    plan = lookup.plan(batch, M, N, D, _size(_block_size(W_blocks)), a.dtype, a.device)
    if plan.kind != "one_pass":
        return plan
    # Before it meets b, T(a) would have to be in float16's range.
    overflows = a.dtype == torch.float16
    # Without blocks it is called with the diagonal.
    if overflows or not may_launch("pairwise", a.dtype, a.device, has_diag=True, has_blocks=W_blocks is not None):
        return Plan("fold_product", plan.fold_b)
    return plan


# ---------------------------------------------------------------------------------------------------------------- fold


@torch.library.custom_op(
    "gssf::fold", mutates_args=(), schema="(Tensor x, Tensor? w_diag, Tensor? w_blocks, bool normalize) -> Tensor"
)
def _fold(x: Tensor, w_diag: Tensor | None, w_blocks: Tensor | None, normalize: bool) -> Tensor:
    return forms.fold(x, w_diag, w_blocks, normalize)


@_fold.register_fake
def _(x: Tensor, w_diag: Tensor | None, w_blocks: Tensor | None, normalize: bool) -> Tensor:
    return x.new_empty(x.shape)


def fold(x: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, normalize: bool = False) -> Tensor:
    """T(x) of x (M, D); without weights the rows themselves, normalised."""
    return _fold(x, W_diag, W_blocks, normalize)


def unit_rows(x: Tensor) -> Tensor:
    """x (..., D) with its rows on the unit sphere."""
    return fold(as_rows(x), None, None, normalize=True).view(x.shape)


def unit_rows_vjp(x: Tensor, grad: Tensor | None) -> Tensor | None:
    """Gradient with respect to x, given the one with respect to x / max(‖x‖, eps)."""
    if grad is None:
        return None
    wide_x, wide_grad = x.to(accumulate_dtype(x.dtype)), grad.to(accumulate_dtype(x.dtype))
    norm = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
    unit = wide_x / norm.clamp_min(NORM_EPS)
    radial = torch.where(norm > NORM_EPS, (unit * wide_grad).sum(-1, keepdim=True), 0)
    return ((wide_grad - unit * radial) / norm.clamp_min(NORM_EPS)).to(x.dtype)


def _fold_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w_diag, w_blocks, normalize = inputs
    ctx.normalize = normalize
    ctx.save_for_backward(x, w_diag, w_blocks)


def _fold_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w_diag, w_blocks = ctx.saved_tensors
    needs_x, needs_diag, needs_blocks, _ = ctx.needs_input_grad
    if w_diag is None and w_blocks is None:
        return unit_rows_vjp(x, grad) if ctx.normalize else grad, None, None, None
    unit = unit_rows(x) if ctx.normalize else x
    rows, d_diag, d_blocks = gradient(
        None, grad[None], unit[None], (w_diag, w_blocks), (needs_x, needs_diag, needs_blocks)
    )
    if rows is not None:
        rows = unit_rows_vjp(x, rows[0]) if ctx.normalize else rows[0]
    return rows, cast_like(d_diag, w_diag), cast_like(d_blocks, w_blocks), None


_fold.register_autograd(_fold_backward, setup_context=_fold_setup)


# ------------------------------------------------------------------------------------------------------------ pairwise


# The plan is an argument, chosen once outside: what a compiled graph was traced with is what it runs, whatever a table
# says by then, and the shape of the second result never depends on anything else.
@torch.library.custom_op(
    "gssf::pairwise_planned",
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor? w_diag, Tensor? w_blocks, bool normalize, ScalarType out_dtype, str kind, "
    "bool fold_b) -> (Tensor, Tensor)",
)
def _pairwise(
    a: Tensor,
    b: Tensor,
    w_diag: Tensor | None,
    w_blocks: Tensor | None,
    normalize: bool,
    out_dtype: torch.dtype,
    kind: str,
    fold_b: bool,
) -> tuple[Tensor, Tensor]:
    """(S, T of the folded side), the latter empty where one pass computes S."""
    from gssf_triton.kernels import pairwise as kernels
    from gssf_triton.kernels.launch import Metric

    def matrix() -> Tensor:
        return torch.empty((a.shape[0], a.shape[1], b.shape[1]), dtype=out_dtype, device=a.device)

    if kind == "one_pass":
        # A tile folds its rows of a as well as those of b: by one kernel, whichever side has fewer.
        return kernels.pairwise(a, b, Metric(w_diag, w_blocks), normalize, matrix()), a.new_empty(0)

    rows, columns, blocks = (b, a, _transposed(w_blocks)) if fold_b else (a, b, w_blocks)
    half = a.dtype == torch.float16
    if half:
        rows = rows.float()
        columns = columns.float() if normalize else columns
    folded = forms.fold(as_rows(rows), w_diag, blocks, normalize).view(rows.shape)
    if normalize:
        columns = forms.fold(as_rows(columns), None, None, True).view(columns.shape)
    if half:
        folded, columns = float16_operands(folded, columns)
    left, right = (columns, folded) if fold_b else (folded, columns)
    if kind == "fold_product" and out_dtype == a.dtype:
        with full_precision(a):
            S = torch.matmul(left, right.mT)
    else:
        S = kernels.pairwise(left, right, Metric(None, None), False, matrix())
    # float16's has a unit of its own, and its gradients are accumulated without it.
    return S, a.new_empty(0) if half else folded


@_pairwise.register_fake
def _(
    a: Tensor,
    b: Tensor,
    w_diag: Tensor | None,
    w_blocks: Tensor | None,
    normalize: bool,
    out_dtype: torch.dtype,
    kind: str,
    fold_b: bool,
) -> tuple[Tensor, Tensor]:
    S = a.new_empty((a.shape[0], a.shape[1], b.shape[1]), dtype=out_dtype)
    side = b if fold_b else a
    return S, side.new_empty(0 if kind == "one_pass" or a.dtype == torch.float16 else side.shape)


# Made of other operators: the choice of a plan is no part of a traced graph, its outcome is.
torch.library.define(
    "gssf::pairwise",
    "(Tensor a, Tensor b, Tensor? w_diag, Tensor? w_blocks, bool normalize, ScalarType out_dtype) -> Tensor",
)


def _pairwise_by_plan(
    a: Tensor, b: Tensor, w_diag: Tensor | None, w_blocks: Tensor | None, normalize: bool, out_dtype: torch.dtype
) -> Tensor:
    plan = _plan(a, b, w_blocks, normalize)
    S: Tensor = _pairwise(a, b, w_diag, w_blocks, normalize, out_dtype, plan.kind, plan.fold_b)[0]
    return S


torch.library.impl("gssf::pairwise", "CompositeImplicitAutograd", _pairwise_by_plan)


def pairwise(
    a: Tensor, b: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, normalize: bool, out_dtype: torch.dtype
) -> Tensor:
    """S (Z, M, N) of a (Z, M, D) and b (Z, N, D)."""
    # A compiler sees one operator; without one that would only be a detour of some microseconds to the same function.
    call = torch.ops.gssf.pairwise if torch.compiler.is_compiling() else _pairwise_by_plan
    S: Tensor = call(a, b, W_diag, W_blocks, normalize, out_dtype)
    return S


def bilinear_gradients(
    dS: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Weights,
    normalize: bool,
    needs: tuple[bool, bool, bool, bool],
    folded: Tensor | None = None,
    fold_b: bool | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of S with respect to (a, b, W_diag, W_blocks), those that `needs` asks for.

    The weights' gradients ride on the fold of one side: b's where `fold_b`, and where that is None the one with fewer
    rows. `folded` is T of that side, where the forward pass has it at hand: then the other side's gradient is a plain
    product.
    """
    w_diag, w_blocks = weights
    swap = b.shape[1] < a.shape[1] if fold_b is None else fold_b
    needs_rows, needs_columns, needs_diag, needs_blocks = needs
    if swap:
        a, b, dS, w_blocks = b, a, dS.mT, _transposed(w_blocks)
        needs_rows, needs_columns = needs_columns, needs_rows
    unit_a, unit_b = (unit_rows(a), unit_rows(b)) if normalize else (a, b)
    rows, d_diag, d_blocks = gradient(dS, unit_b, unit_a, (w_diag, w_blocks), (needs_rows, needs_diag, needs_blocks))
    columns = None
    if needs_columns:
        if folded is not None and folded.dtype == dS.dtype and not torch.is_grad_enabled():
            with full_precision(dS):
                columns = torch.matmul(dS.mT, folded)
        else:
            columns, _, _ = gradient(dS.mT, unit_a, None, (w_diag, _transposed(w_blocks)), (True, False, False))
    if normalize:
        rows, columns = unit_rows_vjp(a, rows), unit_rows_vjp(b, columns)
    if swap:
        rows, columns, d_blocks = columns, rows, _transposed(d_blocks)
    return rows, columns, cast_like(d_diag, w_diag), cast_like(d_blocks, w_blocks)


def _pairwise_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, w_diag, w_blocks, normalize, _, _, fold_b = inputs
    ctx.normalize = normalize
    ctx.fold_b = fold_b
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(a, b, w_diag, w_blocks, output[1])


def _pairwise_backward(ctx: Any, dS: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dS is None:
        return (None,) * 8
    a, b, w_diag, w_blocks, folded = ctx.saved_tensors
    saved = folded if folded.dim() == 3 else None
    needs = ctx.needs_input_grad[:4]
    grads = bilinear_gradients(dS, a, b, (w_diag, w_blocks), ctx.normalize, needs, saved, ctx.fold_b)
    return (*grads, None, None, None, None)


_pairwise.register_autograd(_pairwise_backward, setup_context=_pairwise_setup)


# ------------------------------------------------------------------------------------------------------------ gradient


@torch.library.custom_op(
    "gssf::gradient",
    mutates_args=(),
    schema="(Tensor? p, Tensor x, Tensor? y, Tensor? w_diag, Tensor? w_blocks, SymInt block_size, bool needs_rows, "
    "bool needs_diag, bool needs_blocks) -> (Tensor, Tensor, Tensor)",
)
def _gradient(
    p: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    w_diag: Tensor | None,
    w_blocks: Tensor | None,
    block_size: int,
    needs_rows: bool,
    needs_diag: bool,
    needs_blocks: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with full_precision(x):
        # P x may leave float16's range where T'(P x) does not: there it is never the library's, rounded product.
        if p is not None and p.dtype == x.dtype != torch.float16:
            plan = lookup.gradient_plan(p.shape[0], p.shape[1], p.shape[2], x.shape[2], block_size, x.dtype, x.device)
            if plan.kind == "fold_product":
                x = torch.matmul(p, x)
                p = None
        grads = forms.gradient(p, x, y, w_diag, w_blocks, block_size, (needs_rows, needs_diag, needs_blocks))
    rows, d_diag, d_blocks = (x.new_empty(0) if grad is None else grad for grad in grads)
    return rows, d_diag, d_blocks


@_gradient.register_fake
def _(
    p: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    w_diag: Tensor | None,
    w_blocks: Tensor | None,
    block_size: int,
    needs_rows: bool,
    needs_diag: bool,
    needs_blocks: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, D = x.shape[0], x.shape[1] if p is None else p.shape[1], x.shape[2]
    wide = torch.promote_types(x.dtype if p is None else torch.promote_types(p.dtype, x.dtype), torch.float32)
    empty = x.new_empty(0)
    return (
        x.new_empty((batch, rows, D)) if needs_rows else empty,
        x.new_empty(D, dtype=wide) if needs_diag else x.new_empty(0),
        x.new_empty((D // block_size, block_size, block_size), dtype=wide) if needs_blocks else x.new_empty(0),
    )


def gradient(
    p: Tensor | None, x: Tensor, y: Tensor | None, weights: Weights, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(T'(R), Σ_i y_i ⊙ R_i, y_gᵀ R_g) of R = P x, or R = x without P; None for those `needs` does not ask for.

    p (Z, M, N), x (Z, N, D), y (Z, M, D); needs is (rows, W_diag, W_blocks).
    """
    if not any(needs):
        return None, None, None
    grads = _gradient(p, x, y, *weights, _block_size(weights[1]), *needs)
    rows, d_diag, d_blocks = (grad if wanted else None for grad, wanted in zip(grads, needs, strict=True))
    return rows, d_diag, d_blocks


def _gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    p, x, y, w_diag, w_blocks, _, *needs = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(grad for grad, wanted in zip(output, needs, strict=True) if not wanted))
    ctx.save_for_backward(p, x, y, w_diag, w_blocks)


def _gradient_backward(
    ctx: Any, u: Tensor | None, v_diag: Tensor | None, v_blocks: Tensor | None
) -> tuple[Tensor | None, ...]:
    """F's other partial derivatives: u meets the rows, V = (v_diag, v_blocks) the weights' gradients."""
    p, x, y, w_diag, w_blocks = ctx.saved_tensors
    needs_p, needs_x, needs_y, needs_diag, needs_blocks = ctx.needs_input_grad[:5]
    # (left rows, metric) of each form that ends in R: the rows' own, and the weights'.
    forms: list[tuple[Tensor, Weights]] = []
    if u is not None:
        forms.append((u, (w_diag, w_blocks)))
    if v_diag is not None or v_blocks is not None:
        forms.append((y, (v_diag, v_blocks)))
    dp = dx = dy = d_diag = d_blocks = None
    for left, weights in forms:
        if needs_p:
            dp = add(dp, pairwise(left, x, *weights, False, p.dtype))
        if needs_x and p is None:
            dx = add(dx, fold(as_rows(left), *weights).view(left.shape))
        elif needs_x:
            transposed = (weights[0], _transposed(weights[1]))
            dx = add(dx, gradient(p.mT, left, None, transposed, (True, False, False))[0])
    if needs_y and (v_diag is not None or v_blocks is not None):
        dy, _, _ = gradient(p, x, None, (v_diag, v_blocks), (True, False, False))
    if u is not None:
        _, d_diag, d_blocks = gradient(p, x, u, (w_diag, w_blocks), (False, needs_diag, needs_blocks))
    grads = (
        cast_like(dp, p),
        cast_like(dx, x),
        cast_like(dy, y),
        cast_like(d_diag, w_diag),
        cast_like(d_blocks, w_blocks),
    )
    return (*grads, None, None, None, None)


_gradient.register_autograd(_gradient_backward, setup_context=_gradient_setup)
