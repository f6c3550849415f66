"""The similarity by Triton's kernels: arguments of the public functions, brought into the form that operators take.

Operators take one batch dimension, or plain rows, and compute in the rows' dtype. If autocast asks for another dtype,
rows are folded in float32 and rounded for the product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gssf_triton import kernels
from gssf_triton.metric import Metric, accumulate_dtype, as_rows
from gssf_triton.operators import operator
from gssf_triton.precision import float16_operands, full_precision, product_dtype
from gssf_triton.similarity import bilinear, torch_backend
from gssf_triton.similarity.bilinear import (
    Maybe,
    add,
    bilinear_gradients,
    cast_like,
    gradient,
    unit_rows,
    unit_rows_vjp,
)
from gssf_triton.similarity.bilinear import fold as fold  # a part of the backend
from gssf_triton.similarity.sides import has_kernel


def _as_matrices(a: Tensor, b: Tensor) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """(S's shape, a (Z, M, D), b (Z, N, D)).

    If the whole batch shares b, the queries become one tall matrix. Other shared sides are broadcast by stride where
    that is possible.
    """
    M, N, D = a.shape[-2], b.shape[-2], a.shape[-1]
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape, matrices = (*batch, M, N), math.prod(batch)
    if math.prod(b.shape[:-2]) == 1:
        return shape, a.expand(*batch, M, D).reshape(1, matrices * M, D), b.reshape(1, N, D)
    return shape, a.expand(*batch, M, D).reshape(matrices, M, D), b.expand(*batch, N, D).reshape(matrices, N, D)


def _multiply(a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype) -> Tensor:
    if a.dim() == b.dim() == 2:  # most calls: views would take 20 µs, most of them in the backward pass
        return bilinear.pairwise(a, b, metric, normalize, out_dtype)
    shape, a, b = _as_matrices(a, b)
    return bilinear.pairwise(a, b, metric, normalize, out_dtype).view(shape)


def pairwise(a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype) -> Tensor:
    """S (..., M, N) of a (..., M, D) and b (..., N, D)."""
    dtype = product_dtype(a)
    if dtype == a.dtype:
        return _multiply(a, b, metric, normalize, out_dtype)
    with full_precision(a):
        t, y = torch_backend.operands(a, b, metric, normalize, fold)
        if out_dtype == dtype:
            return torch_backend.product(t, y, dtype, out_dtype)
        # The library would round the sums, a kernel does not. It takes the folded rows under the identity.
        t, y = float16_operands(t, y) if dtype == torch.float16 else (t.to(dtype), y.to(dtype))
        return _multiply(t, y, Metric(t.new_ones(t.shape[-1])), False, out_dtype)


def pairwise_terms(
    a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The diagonal and the block term of S, each (..., M, N)."""
    if a.dtype != product_dtype(a) or a.dtype == torch.float16:  # whose range T(a) may leave
        diagonal, block = Metric(metric.W_diag), Metric(None, metric.W_blocks)
        return pairwise(a, b, diagonal, normalize, out_dtype), pairwise(a, b, block, normalize, out_dtype)
    shape, a, b = _as_matrices(a, b)
    terms = _terms(a, b, metric.W_diag, metric.W_blocks, normalize, out_dtype)
    return terms[0].view(shape), terms[1].view(shape)


def paired(a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype) -> Tensor:
    """The diagonal of S, (..., N): a[i] against b[i]."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    a, b = (as_rows(x.expand(shape)) for x in (a, b))
    if a.dtype == torch.float16:
        # The kernel multiplies in the rows' dtype, and products with weights may leave float16's range.
        a, b = a.float(), b.float()
    s: Tensor = _paired(a, b, metric.W_diag, metric.W_blocks, normalize, out_dtype)
    return s.view(shape[:-1])


# -------------------------------------------------------------------------------------------------------------- paired


@operator(
    "gssf::paired",
    "(Tensor a, Tensor b, Tensor? w_diag, Tensor? w_blocks, bool normalize, ScalarType out_dtype) -> Tensor",
)
def _paired(a: Tensor, b: Tensor, w_diag: Maybe, w_blocks: Maybe, normalize: bool, out_dtype: torch.dtype) -> Tensor:
    """The diagonal of S, (N,), of a and b (N, D)."""
    metric = Metric(w_diag, w_blocks)
    compute = kernels.paired.paired if has_kernel("paired", a, metric) else torch_backend.paired
    return compute(a, b, metric, normalize, out_dtype)


@_paired.register_fake
def _(a: Tensor, *rest: Any) -> Tensor:
    return a.new_empty(a.shape[0], dtype=rest[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    *tensors, normalize, _ = inputs
    ctx.normalize = normalize
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _paired_backward(ctx: Any, ds: Maybe) -> tuple[Maybe, ...]:
    if ds is None:
        return (None,) * 6
    a, b, w_diag, w_blocks = ctx.saved_tensors
    metric = Metric(w_diag, w_blocks)
    needs_a, needs_b, needs_diag, needs_blocks = ctx.needs_input_grad[:4]
    # In float32: ds of a mean over many pairs times b would leave float16's range.
    wide = torch.promote_types(accumulate_dtype(a.dtype), ds.dtype)
    wide_a, wide_b, wide_ds = a.to(wide), b.to(wide), ds.to(wide)[:, None]
    unit_a, unit_b = (unit_rows(wide_a), unit_rows(wide_b)) if ctx.normalize else (wide_a, wide_b)
    needs = (needs_a, needs_diag, needs_blocks)
    rows, d_diag, d_blocks = gradient(None, (wide_ds * unit_b)[None], unit_a[None], metric, needs)
    da = None if rows is None else rows[0]
    db = wide_ds * fold(unit_a, metric) if needs_b else None
    if ctx.normalize:
        da, db = unit_rows_vjp(wide_a, da), unit_rows_vjp(wide_b, db)
    return *map(cast_like, (da, db, d_diag, d_blocks), (a, b, w_diag, w_blocks)), None, None


_paired.register_autograd(_paired_backward, setup_context=_setup)


# --------------------------------------------------------------------------------------------------------------- terms


@operator(
    "gssf::pairwise_terms",
    "(Tensor a, Tensor b, Tensor w_diag, Tensor w_blocks, bool normalize, ScalarType out_dtype) -> (Tensor, Tensor)",
)
def _terms(
    a: Tensor, b: Tensor, w_diag: Tensor, w_blocks: Tensor, normalize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(diagonal, block) terms of S, each (Z, M, N), of a (Z, M, D) and b (Z, N, D)."""
    metric = Metric(w_diag, w_blocks)
    launches = has_kernel("pairwise", a, metric)
    compute = kernels.pairwise.pairwise_terms if launches else torch_backend.pairwise_terms
    return compute(a, b, metric, normalize, out_dtype)


@_terms.register_fake
def _(a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    diagonal = a.new_empty((a.shape[0], a.shape[1], b.shape[1]), dtype=rest[-1])
    return diagonal, torch.empty_like(diagonal)


def _terms_backward(ctx: Any, d_diagonal: Maybe, d_block: Maybe) -> tuple[Maybe, ...]:
    a, b, w_diag, w_blocks = ctx.saved_tensors
    needs_a, needs_b, needs_diag, needs_blocks = ctx.needs_input_grad[:4]
    da = db = grad_diag = grad_blocks = None
    if d_diagonal is not None:
        needs = (needs_a, needs_b, needs_diag, False)
        da, db, grad_diag, _ = bilinear_gradients(d_diagonal, a, b, Metric(w_diag), ctx.normalize, needs)
    if d_block is not None:
        needs, metric = (needs_a, needs_b, False, needs_blocks), Metric(None, w_blocks)
        da_block, db_block, _, grad_blocks = bilinear_gradients(d_block, a, b, metric, ctx.normalize, needs)
        da, db = add(da, da_block), add(db, db_block)
    return da, db, grad_diag, grad_blocks, None, None


_terms.register_autograd(_terms_backward, setup_context=_setup)
