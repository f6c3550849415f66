"""The one-pass kernel: the similarity tile with the epilogue that stores S."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.autotune import lookup
from gssf_triton.kernels.configs import drains, stores_both
from gssf_triton.kernels.launch import (
    Metric,
    describe,
    items_a_grid,
    launch,
    matrix,
    needs_wide_channels,
    numerics,
    options,
    pointer,
    runs,
)
from gssf_triton.kernels.tile import cast, clamped_rows, grouped_tile, side_of, similarity_tile, stride_of


@triton.jit
def _store(
    s, s_diag, s_ptr, s_diag_ptr, z, offs_m, offs_n, stride_sz, stride_sm, stride_sn, M, N, TERMS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    mask = (offs_m < side_of(M, stride_sm, EVEN))[:, None] & (offs_n < side_of(N, stride_sn, EVEN))[None, :]
    rows = z * stride_of(stride_sz, EVEN) + offs_m.to(tl.int64) * stride_of(stride_sm, EVEN)
    offs = rows[:, None] + (offs_n.to(tl.int64) * stride_of(stride_sn, EVEN))[None, :]
    tl.store(s_ptr + offs, cast(s, s_ptr.dtype.element_ty), mask=mask)
    if TERMS:
        tl.store(s_diag_ptr + offs, cast(s_diag, s_diag_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_sz", "stride_sm", "stride_sn", "even_s", "M", "N", "chunks"])
def pairwise_kernel(
    a_ptr,
    stride_az,
    stride_am,
    stride_ad,
    b_ptr,
    stride_bz,
    stride_bn,
    stride_bd,
    w_diag_ptr,
    stride_wd,
    w_blocks_ptr,
    stride_wg,
    stride_wp,
    stride_wq,
    s_ptr,
    stride_sz,
    stride_sm,
    stride_sn,
    even_s,
    s_diag_ptr,
    M,
    N,
    D,
    chunks,
    B: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_DIAG: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    TERMS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_S: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    DRAIN: tl.constexpr,
):
    """S[z, i, j] = T(a[z, i]) · b[z, j]; one program owns one [BLOCK_M, BLOCK_N] tile of one matrix of the batch.

    With TERMS the block term goes to s_ptr and the diagonal one to s_diag_ptr, of the same strides. Even S is stored 16
    bytes a lane: whether it is EVEN_S tells, or, where that is None, even_s at run time, for one kernel of all sizes.
    Source: GSSF (arXiv 2410.15266), s(x, y) = xᵀ(W ⊙ U)y.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    z = (pid // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = grouped_tile(pid % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    offs_m, rows_m = clamped_rows(tile_m, M, BLOCK_M)
    offs_n, rows_n = clamped_rows(tile_n, N, BLOCK_N)
    s, s_diag = similarity_tile(
        a_ptr + z * stride_az + rows_m * stride_am, stride_ad,
        b_ptr + z * stride_bz + rows_n * stride_bn, stride_bd,
        w_diag_ptr, stride_wd, w_blocks_ptr, stride_wg, stride_wp, stride_wq, D, chunks,
        B, BLOCK_B, BLOCK_M, BLOCK_N, BLOCK_K, HAS_DIAG, HAS_BLOCKS, TERMS, NORMALIZE, EVEN_D, WIDE, PRECISION, ACC,
        DRAIN,
    )  # fmt: skip
    if EVEN_S is not None:
        _store(s, s_diag, s_ptr, s_diag_ptr, z, offs_m, offs_n, stride_sz, stride_sm, stride_sn, M, N, TERMS, EVEN_S)
    elif even_s:
        _store(s, s_diag, s_ptr, s_diag_ptr, z, offs_m, offs_n, stride_sz, stride_sm, stride_sn, M, N, TERMS, True)
    else:
        _store(s, s_diag, s_ptr, s_diag_ptr, z, offs_m, offs_n, stride_sz, stride_sm, stride_sn, M, N, TERMS, False)


def _launch(a: Tensor, b: Tensor, metric: Metric, normalize: bool, s: Tensor, s_diag: Tensor | None) -> None:
    batch, M, D = a.shape
    N = b.shape[1]
    if s.numel() == 0:
        return
    if D == 0:
        s.zero_()
        if s_diag is not None:
            s_diag.zero_()
        return
    terms = s_diag is not None
    kernel = "terms" if terms else "product" if metric.is_identity else "pairwise"
    config = lookup.tile(M, N, D, metric.block_size, a.dtype, a.device, kernel=kernel, batch=batch)
    lanes = metric.lanes(D)
    tiles = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
    if batch > items_a_grid(tiles):
        for run in runs(batch, tiles):
            _launch(a[run], b[run], metric, normalize, s[run], None if s_diag is None else s_diag[run])
        return
    stored = matrix("s", s, "zmn", a)
    even = stored.pop("EVEN_S")
    launch(
        pairwise_kernel,
        (batch * tiles,),
        a.device,
        **pointer("a", a, "zmd", a),
        **pointer("b", b, "znd", a),
        **metric.arguments(a),
        **stored,
        s_diag_ptr=s if s_diag is None else s_diag,
        M=M, N=N, D=D, chunks=triton.cdiv(lanes, config.BLOCK_K),
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, GROUP_M=config.GROUP_M,
        TERMS=terms, NORMALIZE=normalize,
        # Norms are sums of their own beside the products, which keeps ptxas from giving up.
        DRAIN=not (normalize or metric.is_identity) and drains(
            config, metric.block_size, a.dtype, describe(a.device), terms=terms
        ),
        even_s=int(even), EVEN_S=None if stores_both(describe(a.device), terms=terms) else even,
        EVEN_D=metric.is_even(D, config.BLOCK_K), WIDE=needs_wide_channels(a, b),
        **numerics(a),
        **options(config),
    )  # fmt: skip


def pairwise(a: Tensor, b: Tensor, metric: Metric, normalize: bool, out: Tensor) -> Tensor:
    """Fill out (Z, M, N), of any strides and float dtype, with S of a (Z, M, D) and b (Z, N, D)."""
    _launch(a, b, metric, normalize, out, None)
    return out


def pairwise_terms(
    a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The (diagonal, block) terms of S, each (Z, M, N), from one pass with two accumulators."""
    s = torch.empty((a.shape[0], a.shape[1], b.shape[1]), dtype=out_dtype, device=a.device)
    s_diag = torch.empty_like(s)
    _launch(a, b, metric, normalize, s, s_diag)
    return s_diag, s
