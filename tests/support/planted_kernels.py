"""Kernels that are wrong or slow on a GPU on purpose: each breaks one rule of the compile gate."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrow_store_kernel(
    x_ptr, stride_xm, s_ptr, stride_sm, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HINT: tl.constexpr
):  # fmt: skip
    """Clamped columns without the hint that they are neighbours: every lane stores a number of its own."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    clamped = tl.where(offs_n < N, offs_n, 0)
    if HINT:
        clamped = tl.max_contiguous(tl.multiple_of(clamped, BLOCK_N), BLOCK_N)
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + tl.arange(0, BLOCK_N)[None, :])
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(s_ptr + offs_m[:, None] * stride_sm + clamped[None, :], x * 2, mask=mask)


@triton.jit
def product_kernel(
    a_ptr, stride_am, stride_ak, b_ptr, stride_bn, stride_bk, s_ptr, stride_sm, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """S = a bᵀ; with GATHER the channels of b come in an order that the compiler cannot follow."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        offs_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak)
        if GATHER:
            offs_k = offs_k ^ 1
        b = tl.load(b_ptr + offs_n[None, :] * stride_bn + offs_k[:, None] * stride_bk)
        s = tl.dot(a, b, s)
    tl.store(s_ptr + offs_m[:, None] * stride_sm + offs_n[None, :], s.to(s_ptr.dtype.element_ty))
