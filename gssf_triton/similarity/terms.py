"""The operator of S's two terms apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gssf_triton.similarity import forms
from gssf_triton.similarity.bilinear import add, bilinear_gradients


@torch.library.custom_op(
    "gssf::pairwise_terms",
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor w_diag, Tensor w_blocks, bool normalize, ScalarType out_dtype)"
    " -> (Tensor, Tensor)",
)
def pairwise_terms(
    a: Tensor, b: Tensor, w_diag: Tensor, w_blocks: Tensor, normalize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(diagonal, block) terms of S, each (Z, M, N), of a (Z, M, D) and b (Z, N, D)."""
    return forms.pairwise_terms(a, b, w_diag, w_blocks, normalize, out_dtype)


@pairwise_terms.register_fake
def _(
    a: Tensor, b: Tensor, w_diag: Tensor, w_blocks: Tensor, normalize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    diagonal = a.new_empty((a.shape[0], a.shape[1], b.shape[1]), dtype=out_dtype)
    return diagonal, torch.empty_like(diagonal)


def _terms_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, w_diag, w_blocks, normalize, _ = inputs
    ctx.normalize = normalize
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, w_diag, w_blocks)


def _terms_backward(ctx: Any, d_diagonal: Tensor | None, d_block: Tensor | None) -> tuple[Tensor | None, ...]:
    a, b, w_diag, w_blocks = ctx.saved_tensors
    needs_a, needs_b, needs_diag, needs_blocks = ctx.needs_input_grad[:4]
    da = db = grad_diag = grad_blocks = None
    if d_diagonal is not None:
        needs = (needs_a, needs_b, needs_diag, False)
        da, db, grad_diag, _ = bilinear_gradients(d_diagonal, a, b, (w_diag, None), ctx.normalize, needs)
    if d_block is not None:
        needs = (needs_a, needs_b, False, needs_blocks)
        da_block, db_block, _, grad_blocks = bilinear_gradients(d_block, a, b, (None, w_blocks), ctx.normalize, needs)
        da, db = add(da, da_block), add(db, db_block)
    return da, db, grad_diag, grad_blocks, None, None


pairwise_terms.register_autograd(_terms_backward, setup_context=_terms_setup)
