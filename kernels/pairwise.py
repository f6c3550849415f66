"""The one-pass kernel: the similarity tile with the epilogue that stores S."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.kernels import choice
from gssf_triton.kernels.args import PairMatrix
from gssf_triton.kernels.configs import PairwiseConfig, drains, stores_both
from gssf_triton.kernels.launch import (
    architecture,
    batch_of,
    blocks_like,
    cdiv,
    items_a_grid,
    lanes,
    launch,
    pair_strides,
    runs,
    tile,
    weights,
)
from gssf_triton.kernels.tile import (
    batch_rows,
    cast,
    clamped_rows,
    grouped_tile,
    pair_columns,
    pair_mask,
    pair_rows,
    similarity_tile,
)
from gssf_triton.kernels.warm import remembered
from gssf_triton.metric import Metric


@triton.jit
def _store(s, s_diag, out, s_diag_ptr, z, offs_m, offs_n, M, N, EVEN: tl.constexpr):
    mask = pair_mask(out, offs_m, offs_n, M, N, EVEN)
    offs = pair_rows(out, z, offs_m, EVEN)[:, None] + pair_columns(out, offs_n, EVEN)[None, :]
    tl.store(out.ptr + offs, cast(s, out.ptr.dtype.element_ty), mask=mask)
    if s_diag_ptr is not None:
        tl.store(s_diag_ptr + offs, cast(s_diag, s_diag_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_sz", "stride_sm", "stride_sn", "even_s", "M", "N", "chunks"])
def pairwise_kernel(
    a, b, weights, s_ptr, s_diag_ptr, stride_sz, stride_sm, stride_sn, even_s, M, N, D, chunks,
    TILE: tl.constexpr, NORMALIZE: tl.constexpr, DRAIN: tl.constexpr, EVEN_S: tl.constexpr,
):  # fmt: skip
    """S[z, i, j] = T(a[z, i]) · b[z, j]; one program owns one [BLOCK_M, BLOCK_N] tile of one matrix of the batch.

    With s_diag_ptr the block term goes to s_ptr and the diagonal one to s_diag_ptr, of the same strides. Even S is
    stored 16 bytes a lane: EVEN_S says whether it is, or, where that is None, even_s at run time, for one kernel of all
    sizes. Source: GSSF (arXiv 2410.15266), s(x, y) = xᵀ(W ⊙ U)y.
    """
    tiles_m = tl.cdiv(M, TILE.BLOCK_M)
    tiles_n = tl.cdiv(N, TILE.BLOCK_N)
    pid = tl.program_id(0)
    z = (pid // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = grouped_tile(pid % (tiles_m * tiles_n), tiles_m, tiles_n, TILE.GROUP_M)
    offs_m, rows_m = clamped_rows(tile_m, M, TILE.BLOCK_M)
    offs_n, rows_n = clamped_rows(tile_n, N, TILE.BLOCK_N)
    s, s_diag = similarity_tile(
        batch_rows(a, z, rows_m), batch_rows(b, z, rows_n), weights, D, chunks, TILE, s_diag_ptr is not None, NORMALIZE,
        DRAIN,
    )  # fmt: skip
    out = PairMatrix(s_ptr, stride_sz, stride_sm, stride_sn)
    if EVEN_S is not None:
        _store(s, s_diag, out, s_diag_ptr, z, offs_m, offs_n, M, N, EVEN_S)
    elif even_s:
        _store(s, s_diag, out, s_diag_ptr, z, offs_m, offs_n, M, N, True)
    else:
        _store(s, s_diag, out, s_diag_ptr, z, offs_m, offs_n, M, N, False)


@cache
def _settings(config: PairwiseConfig, B: int, dtype: torch.dtype, arch: str, terms: bool) -> tuple[bool, bool]:
    """(DRAIN, whether one kernel stores even and ragged S)."""
    return drains(config, B, dtype, arch, terms=terms), stores_both(arch, terms=terms)


@remembered
def _launch(a: Tensor, b: Tensor, metric: Metric, normalize: bool, s: Tensor, s_diag: Tensor | None) -> None:
    (*batches, M, D), N, B = a.shape, b.shape[-2], metric.block_size
    batch = batches[0] if batches else 1
    if s.numel() == 0:
        return
    if D == 0:
        for out in (s,) if s_diag is None else (s, s_diag):
            out.zero_()
        return
    terms, identity = s_diag is not None, metric.is_identity
    kernel: Literal["terms", "product", "pairwise"] = "terms" if terms else "product" if identity else "pairwise"
    config = choice.choose(kernel, a.device, a.dtype, M, N, D, B, batch)
    tiles = cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)
    if batch > items_a_grid(tiles):
        for run in runs(batch, tiles):
            _launch(a[run], b[run], metric, normalize, s[run], None if s_diag is None else s_diag[run])
        return
    strides = pair_strides(s)
    # Norms are sums of their own beside the products, which keeps ptxas from giving up: no drain.
    drain, both = _settings(config, B, a.dtype, architecture(a.device), terms)
    launch(
        pairwise_kernel, (batch * tiles,), a.device, config,
        a=batch_of(a), b=batch_of(b), weights=weights(metric), s_ptr=s, s_diag_ptr=s_diag,
        stride_sz=strides.batch, stride_sm=strides.row, stride_sn=strides.column, even_s=int(strides.even),
        M=M, N=N, D=D, chunks=cdiv(lanes(D, B), config.BLOCK_K),
        TILE=tile(config, a, b, B=B), NORMALIZE=normalize,
        DRAIN=drain and not (normalize or identity), EVEN_S=None if both else strides.even,
    )  # fmt: skip


def pairwise(a: Tensor, b: Tensor, metric: Metric, normalize: bool, out: Tensor) -> Tensor:
    """Fill out (Z, M, N), of any strides and float dtype, with S of a (Z, M, D) and b (Z, N, D); or plain rows."""
    _launch(a, b, blocks_like(a, metric), normalize, out, None)
    return out


def pairwise_terms(
    a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The (diagonal, block) terms of S, each (Z, M, N), from one pass with two accumulators."""
    s = torch.empty((a.shape[0], a.shape[1], b.shape[1]), dtype=out_dtype, device=a.device)
    s_diag = torch.empty_like(s)
    _launch(a, b, blocks_like(a, metric), normalize, s, s_diag)
    return s_diag, s
