"""The matched-pairs kernel: the diagonal of S, from the tile's fold and a row-wise dot product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.autotune import lookup
from gssf_triton.kernels.launch import Metric, launch, needs_wide_channels, numerics, options, pointer
from gssf_triton.kernels.tile import (
    cast,
    channels,
    clamped_rows,
    fold_chunk,
    folded,
    inverse_norm,
    load_masked,
    scaled,
    squares_of,
)


@triton.jit(do_not_specialize=["M", "chunks"])
def paired_kernel(
    a_ptr,
    stride_am,
    stride_ad,
    b_ptr,
    stride_bm,
    stride_bd,
    w_diag_ptr,
    stride_wd,
    w_blocks_ptr,
    stride_wg,
    stride_wp,
    stride_wq,
    s_ptr,
    stride_sm,
    M,
    D,
    chunks,
    B: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_DIAG: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """s[i] = T(a[i]) · b[i] for a tile of rows, every channel of them; T(a) stays in ACC and is never rounded."""
    offs_m, rows = clamped_rows(tl.program_id(0), M, BLOCK_M)
    a_rows = a_ptr + rows * stride_am
    b_rows = b_ptr + rows * stride_bm
    s = tl.zeros([BLOCK_M], ACC)
    if NORMALIZE:
        squares_a = tl.zeros([BLOCK_M], ACC)
        squares_b = tl.zeros([BLOCK_M], ACC)
    for chunk in range(0, chunks):
        a, diagonal, block = fold_chunk(
            chunk, a_rows, stride_ad, w_diag_ptr, stride_wd, w_blocks_ptr, stride_wg, stride_wp, stride_wq, D,
            B, BLOCK_B, BLOCK_M, BLOCK_K, HAS_DIAG, HAS_BLOCKS, EVEN_D, WIDE, False, PRECISION, ACC,
        )  # fmt: skip
        offs, valid = channels(chunk, D, B, BLOCK_B, BLOCK_K, WIDE)
        b = load_masked(b_rows[:, None] + (offs * stride_bd)[None, :], valid[None, :], EVEN_D).to(ACC)
        s += tl.sum(folded(a, diagonal, block, HAS_DIAG, HAS_BLOCKS, ACC) * b, axis=1)
        if NORMALIZE:
            squares_a += tl.sum(squares_of(a, ACC), axis=1)
            squares_b += tl.sum(squares_of(b, ACC), axis=1)
    if NORMALIZE:
        s = scaled(s, inverse_norm(squares_a), inverse_norm(squares_b))
    tl.store(s_ptr + offs_m.to(tl.int64) * stride_sm, cast(s, s_ptr.dtype.element_ty), mask=offs_m < M)


def paired(a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype) -> Tensor:
    """The similarity of a[i] with b[i], (M,), of a and b (M, D)."""
    M, D = a.shape
    if M == 0 or D == 0:
        return torch.zeros(M, dtype=out_dtype, device=a.device)
    out = torch.empty(M, dtype=out_dtype, device=a.device)
    config = lookup.rows(M, D, metric.block_size, a.dtype, a.device, kernel="paired")
    launch(
        paired_kernel,
        (triton.cdiv(M, config.BLOCK_M),),
        a.device,
        **pointer("a", a, "md", a),
        **pointer("b", b, "md", a),
        **metric.arguments(a),
        **pointer("s", out, "m", a),
        M=M, D=D, chunks=triton.cdiv(metric.lanes(D), config.BLOCK_K),
        BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_K,
        NORMALIZE=normalize, EVEN_D=metric.is_even(D, config.BLOCK_K), WIDE=needs_wide_channels(a, b),
        **numerics(a),
        **options(config),
    )  # fmt: skip
    return out
