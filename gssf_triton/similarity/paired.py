"""The operator of matched pairs: a[i] against b[i]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gssf_triton.similarity import forms
from gssf_triton.similarity.bilinear import cast_like, fold, gradient, unit_rows, unit_rows_vjp
from gssf_triton.similarity.torch_backend import accumulate_dtype


@torch.library.custom_op(
    "gssf::paired",
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor? w_diag, Tensor? w_blocks, bool normalize, ScalarType out_dtype) -> Tensor",
)
def paired(
    a: Tensor, b: Tensor, w_diag: Tensor | None, w_blocks: Tensor | None, normalize: bool, out_dtype: torch.dtype
) -> Tensor:
    """The diagonal of S, (N,), of a and b (N, D)."""
    return forms.paired(a, b, w_diag, w_blocks, normalize, out_dtype)


@paired.register_fake
def _(
    a: Tensor, b: Tensor, w_diag: Tensor | None, w_blocks: Tensor | None, normalize: bool, out_dtype: torch.dtype
) -> Tensor:
    return a.new_empty(a.shape[0], dtype=out_dtype)


def _paired_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, w_diag, w_blocks, normalize, _ = inputs
    ctx.normalize = normalize
    ctx.save_for_backward(a, b, w_diag, w_blocks)


def _paired_backward(ctx: Any, ds: Tensor) -> tuple[Tensor | None, ...]:
    a, b, w_diag, w_blocks = ctx.saved_tensors
    needs_a, needs_b, needs_diag, needs_blocks = ctx.needs_input_grad[:4]
    # In float32: ds of a mean over many pairs times b would leave float16's range.
    wide = torch.promote_types(accumulate_dtype(a.dtype), ds.dtype)
    wide_a, wide_b, wide_ds = a.to(wide), b.to(wide), ds.to(wide)[:, None]
    unit_a, unit_b = (unit_rows(wide_a), unit_rows(wide_b)) if ctx.normalize else (wide_a, wide_b)
    needs = (needs_a, needs_diag, needs_blocks)
    rows, d_diag, d_blocks = gradient(None, (wide_ds * unit_b)[None], unit_a[None], (w_diag, w_blocks), needs)
    da = None if rows is None else rows[0]
    db = wide_ds * fold(unit_a, w_diag, w_blocks) if needs_b else None
    if ctx.normalize:
        da, db = unit_rows_vjp(wide_a, da), unit_rows_vjp(wide_b, db)
    return cast_like(da, a), cast_like(db, b), cast_like(d_diag, w_diag), cast_like(d_blocks, w_blocks), None, None


paired.register_autograd(_paired_backward, setup_context=_paired_setup)
