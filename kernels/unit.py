"""The gradient of rows that are put on the unit sphere, without an array between its steps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.kernels.configs import finish_config
from gssf_triton.kernels.launch import architecture, cdiv, launch, matrix, tile
from gssf_triton.kernels.tile import NORM_EPS, cast, channels, clamped_rows, inverse_norm, load_chunk, rows_of
from gssf_triton.kernels.warm import empty, remembered


@triton.jit(do_not_specialize=["M", "chunks"])
def unit_kernel(x, grad, out, M, D, chunks, TILE: tl.constexpr):
    """dx = (g − û ⟨û, g⟩) / n of û = x / n, n = max(‖x‖₂, 1e-12), which is a constant where it is 1e-12.

    One program owns BLOCK_M rows and reads them three times, all but the first from cache. Sums are in ACC. Source: the
    derivative of torch.nn.functional.normalize.
    """
    offs_m, rows_m = clamped_rows(tl.program_id(0), M, TILE.BLOCK_M)
    x_rows, g_rows = rows_of(x, rows_m), rows_of(grad, rows_m)
    squares = tl.zeros([TILE.BLOCK_M], TILE.ACC)
    for chunk in range(0, chunks):
        value = load_chunk(x_rows, chunk, D, TILE).to(TILE.ACC)
        squares += tl.sum(value * value, axis=1)
    inverse = inverse_norm(squares)[:, None]
    inner = tl.zeros([TILE.BLOCK_M], TILE.ACC)
    for chunk in range(0, chunks):
        unit = load_chunk(x_rows, chunk, D, TILE).to(TILE.ACC) * inverse
        inner += tl.sum(unit * load_chunk(g_rows, chunk, D, TILE).to(TILE.ACC), axis=1)
    inner = tl.where(tl.sqrt(squares) <= NORM_EPS, 0.0, inner)[:, None]
    for chunk in range(0, chunks):
        unit = load_chunk(x_rows, chunk, D, TILE).to(TILE.ACC) * inverse
        dx = (load_chunk(g_rows, chunk, D, TILE).to(TILE.ACC) - unit * inner) * inverse
        offs, valid = channels(chunk, D, TILE)
        ptrs = out.ptr + (offs_m.to(tl.int64) * out.row)[:, None] + (offs * out.channel)[None, :]
        tl.store(ptrs, cast(dx, out.ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & valid[None, :])


@remembered
def unit_vjp(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient with respect to x (M, D), in x's dtype, of `grad` with respect to its rows on the unit sphere."""
    out = empty(x.shape, x.dtype, x.device)
    if out.numel() == 0:
        return out
    (M, D), config = x.shape, finish_config(torch.promote_types(x.dtype, grad.dtype), architecture(x.device))
    launch(
        unit_kernel, (cdiv(M, config.BLOCK_M),), x.device, config,
        x=matrix(x), grad=matrix(grad), out=matrix(out), M=M, D=D, chunks=cdiv(D, config.BLOCK_K),
        TILE=tile(config, x, grad, out),
    )  # fmt: skip
    return out
