"""The gradient kernel: R = P·x in registers, and what comes out of it in the epilogue.

With P = dS and x = b it gives da = T'(R), dW_diag = Σ_i a_i ⊙ R_i and dW_g = a_gᵀ R_g; with P = dSᵀ, x = a and the
blocks transposed it gives db. R itself is never stored. Without P, R is x: the gradients of the fold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.autotune import lookup
from gssf_triton.kernels.configs import GradientConfig
from gssf_triton.kernels.fold import fold
from gssf_triton.kernels.launch import (
    Metric,
    acc_type,
    accumulator,
    items_a_grid,
    launch,
    matrix,
    needs_wide_channels,
    options,
    pointer,
    precision,
)
from gssf_triton.kernels.tile import cast, clamped_rows, dot, nearest, side_of, stride_of


@triton.jit
def lane_parts(lanes, D, B: tl.constexpr, BLOCK_B: tl.constexpr):
    """(group, channel within it, channel, validity) of lanes; without blocks every lane is its own channel."""
    if BLOCK_B == 0:
        return lanes * 0, lanes, lanes, lanes < D
    else:
        group = lanes // BLOCK_B
        inner = lanes % BLOCK_B
        offs = group * B + inner
        return group, inner, offs, (inner < B) & (offs < D)


@triton.jit(do_not_specialize=["stride_pz", "stride_pm", "stride_pn", "batch", "M", "N", "lane_count", "splits"])
def gradient_kernel(
    p_ptr,
    stride_pz,
    stride_pm,
    stride_pn,
    x_ptr,
    stride_xz,
    stride_xn,
    stride_xd,
    y_ptr,
    stride_yz,
    stride_ym,
    stride_yd,
    w_diag_ptr,
    stride_wd,
    w_blocks_ptr,
    stride_wg,
    stride_wp,
    stride_wq,
    rows_ptr,
    stride_rz,
    stride_rm,
    stride_rd,
    dw_diag_ptr,
    dw_blocks_ptr,
    batch,
    M,
    N,
    D,
    lane_count,
    splits,
    B: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_DIAG: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    GRAD_DIAG: tl.constexpr,
    GRAD_BLOCKS: tl.constexpr,
    EVEN_P: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    EPILOGUE_PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """rows = T'(R), dW_diag = Σ_i y_i ⊙ R_i, dW_g = y_gᵀ R_g of R = P x (PRODUCT) or R = x.

    One program owns BLOCK_C lanes, whole groups of them, and every `splits`-th tile of rows. Weight gradients are
    summed over its tiles in order, in a slice of the partial sums (splits, …) that no other program writes; the
    launcher adds the slices up. So the result never depends on which program comes first.

    R and the epilogue's products are in ACC: for half-precision features on tensor cores in TF32, whose range is
    float32's, since float16 would lose small gradients, and these products are only BLOCK_C / N of the work. The
    epilogue walks BLOCK_P lanes at a time to bound its registers.
    """
    tl.static_assert(BLOCK_C % BLOCK_P == 0)
    # What TF32 cuts off is a tenth of what bfloat16 rounds off.
    ROUNDING: tl.constexpr = "none" if x_ptr.dtype.element_ty == tl.bfloat16 else EPILOGUE_PRECISION
    columns = tl.cdiv(lane_count, BLOCK_C)
    column = tl.program_id(0) % columns
    split = tl.program_id(0) // columns
    lanes = column * BLOCK_C + tl.arange(0, BLOCK_C)
    group_q, inner_q, offs_q, valid_q = lane_parts(lanes, D, B, BLOCK_B)
    if WIDE:
        channel_q = offs_q.to(tl.int64)
    else:
        channel_q = offs_q
    tiles_m = tl.cdiv(M, BLOCK_M)
    for tile in range(split, batch * tiles_m, splits):
        z = (tile // tiles_m).to(tl.int64)
        offs_m, rows_m = clamped_rows(tile % tiles_m, M, BLOCK_M)
        mask_m = offs_m < M
        x_base = x_ptr + z * stride_xz
        if PRODUCT:
            p_rows = p_ptr + z * stride_of(stride_pz, EVEN_P) + rows_m * stride_of(stride_pm, EVEN_P)
            p_mask = (offs_m < side_of(M, stride_pm, EVEN_P))[:, None]
            r = tl.zeros([BLOCK_M, BLOCK_C], ACC)
            for step in range(0, tl.cdiv(N, BLOCK_N)):
                offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
                # Not `clamped_rows`: what lies past x's last row may be NaN, and 0 times that would be in every sum.
                rows_n = tl.where(offs_n < N, offs_n, 0).to(tl.int64)
                p = tl.load(
                    p_rows[:, None] + (offs_n.to(tl.int64) * stride_of(stride_pn, EVEN_P))[None, :],
                    mask=p_mask & (offs_n < side_of(N, stride_pn, EVEN_P))[None, :],
                    other=0.0,
                )
                x_ptrs = x_base + (rows_n * stride_xn)[:, None] + (channel_q * stride_xd)[None, :]
                x = tl.load(x_ptrs, mask=valid_q[None, :], other=0.0)
                r = dot(p, cast(x, p.dtype), r, PRECISION)
        else:
            x_ptrs = x_base + (rows_m * stride_xn)[:, None] + (channel_q * stride_xd)[None, :]
            r = tl.load(x_ptrs, mask=mask_m[:, None] & valid_q[None, :], other=0.0).to(ACC)

        if GRAD_DIAG:
            y_rows = y_ptr + z * stride_yz + (rows_m * stride_ym)[:, None] + (channel_q * stride_yd)[None, :]
            y = tl.load(y_rows, mask=mask_m[:, None] & valid_q[None, :], other=0.0).to(ACC)
            diag_slot = dw_diag_ptr + split.to(tl.int64) * D + offs_q
            dw_diag = tl.sum(y * r, axis=0)
            if tile > split:
                dw_diag += tl.load(diag_slot, mask=valid_q, other=0.0)
            tl.store(diag_slot, dw_diag, mask=valid_q)

        if ROWS and not HAS_BLOCKS:
            w_diag = tl.load(w_diag_ptr + offs_q * stride_wd, mask=valid_q, other=0.0).to(ACC)
            row_ptrs = rows_ptr + z * stride_rz + (rows_m * stride_rm)[:, None] + (channel_q * stride_rd)[None, :]
            tl.store(
                row_ptrs, cast(r * w_diag[None, :], rows_ptr.dtype.element_ty), mask=mask_m[:, None] & valid_q[None, :]
            )

        if GRAD_BLOCKS or (ROWS and HAS_BLOCKS):
            operand = nearest(r, ROUNDING)
            for first in range(0, BLOCK_C, BLOCK_P):
                lanes_p = column * BLOCK_C + first + tl.arange(0, BLOCK_P)
                group_p, inner_p, offs_p, valid_p = lane_parts(lanes_p, D, B, BLOCK_B)
                if WIDE:
                    channel_p = offs_p.to(tl.int64)
                else:
                    channel_p = offs_p
                same_group = (group_p[:, None] == group_q[None, :]) & valid_p[:, None] & valid_q[None, :]
                if ROWS and HAS_BLOCKS:
                    # The diagonal rides in the weight tile: slicing it out of R's registers is not possible.
                    w_ptrs = w_blocks_ptr + (group_p * stride_wg + inner_p * stride_wp)[:, None]
                    w = tl.load(w_ptrs + (inner_q * stride_wq)[None, :], mask=same_group, other=0.0).to(ACC)
                    if HAS_DIAG:
                        diag_p = tl.load(w_diag_ptr + offs_p * stride_wd, mask=valid_p, other=0.0).to(ACC)
                        on_diagonal = (offs_p[:, None] == offs_q[None, :]) & same_group
                        w += tl.where(on_diagonal, diag_p[:, None], 0.0)
                    w = nearest(w, ROUNDING)
                    out = dot(operand, tl.trans(w), tl.zeros([BLOCK_M, BLOCK_P], ACC), EPILOGUE_PRECISION)
                    out_ptrs = (
                        rows_ptr + z * stride_rz + (rows_m * stride_rm)[:, None] + (channel_p * stride_rd)[None, :]
                    )
                    tl.store(out_ptrs, cast(out, rows_ptr.dtype.element_ty), mask=mask_m[:, None] & valid_p[None, :])
                if GRAD_BLOCKS:
                    y_ptrs = y_ptr + z * stride_yz + (rows_m * stride_ym)[None, :] + (channel_p * stride_yd)[:, None]
                    y_t = tl.load(y_ptrs, mask=mask_m[None, :] & valid_p[:, None], other=0.0).to(ACC)
                    if y_ptr.dtype.element_ty == tl.float32:  # TF32 holds every half-precision number
                        y_t = nearest(y_t, ROUNDING)
                    dw = dot(y_t, operand, tl.zeros([BLOCK_P, BLOCK_C], ACC), EPILOGUE_PRECISION)
                    slot = dw_blocks_ptr + split.to(tl.int64) * D * B + (offs_p * B)[:, None] + inner_q[None, :]
                    if tile > split:
                        dw += tl.load(slot, mask=same_group, other=0.0)
                    tl.store(slot, dw, mask=same_group)
        # The next tile reads back the partial sums of this one, which other threads of the program may have written.
        tl.debug_barrier()


def gradient(
    p: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    metric: Metric,
    block_size: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(T'(R), dW_diag, dW_blocks) of R = P x, those of them that `needs` asks for; the others None.

    Args:
        p: (Z, M, N), or None for R = x.
        x: (Z, N, D), or (Z, M, D) without p.
        y: The rows that meet R in the weight gradients, (Z, M, D) in x's dtype; None where none is needed.
        metric: The weights that fold R; W_blocks is used transposed, as the gradient with respect to a has it.
        block_size: B of dW_blocks (the metric may lack the blocks).
        needs: Which of (rows, dW_diag, dW_blocks) to compute.

    Returns:
        Rows (Z, M, D) in x's dtype; dW_diag (D,) and dW_blocks (G, B, B) in float32 (float64 for float64).
    """
    needs_rows, needs_diag, needs_blocks = needs
    assert not needs_rows or not metric.is_identity
    batch, _, D = x.shape
    M, N = (x.shape[1], 0) if p is None else (p.shape[1], p.shape[2])
    product_dtype = x.dtype if p is None else torch.promote_types(p.dtype, x.dtype)
    wide = torch.promote_types(product_dtype, torch.float32)
    kernel_block = block_size if needs_blocks or metric.W_blocks is not None else 0
    tf32 = True if x.dtype in (torch.float16, torch.bfloat16) else None
    config = lookup.gradient(M, N, D, kernel_block, product_dtype, x.device, batch=batch, tf32=tf32)
    if config.rows_apart and needs_rows:
        R = x if p is None else torch.matmul(p.to(product_dtype), x.to(product_dtype))
        _, sum_diag, sum_blocks = gradient(None, R, y, metric, block_size, (False, needs_diag, needs_blocks))
        folded = fold(R.reshape(batch * M, D), metric.transposed, normalize=False)
        return folded.view(batch, M, D).to(x.dtype), sum_diag, sum_blocks

    row_tiles = batch * triton.cdiv(M, config.BLOCK_M)
    # All row tiles side by side, unless each would need its own slice of the weights' partial sums, or there are more
    # than a grid holds: a program walks as many as it takes.
    splits = min(row_tiles, config.max_splits if needs_diag or needs_blocks else items_a_grid(max(D, 1)))

    work = batch and M and D and (p is None or N)
    make = torch.empty if work else torch.zeros
    rows = make((batch, M, D), dtype=x.dtype, device=x.device) if needs_rows else None
    dw_diag = make((splits, D), dtype=wide, device=x.device) if needs_diag else None
    dw_blocks = None
    if needs_blocks:
        dw_blocks = make((splits, D // block_size, block_size, block_size), dtype=wide, device=x.device)
    if work and (needs_rows or needs_diag or needs_blocks):
        p = None if p is None else p.to(product_dtype)
        _launch(p, x, y, metric, kernel_block, rows, dw_diag, dw_blocks, splits, config)
    return (
        rows,
        None if dw_diag is None else dw_diag.sum(0),
        None if dw_blocks is None else dw_blocks.sum(0),
    )


def _launch(
    p: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    metric: Metric,
    block_size: int,
    rows: Tensor | None,
    dw_diag: Tensor | None,
    dw_blocks: Tensor | None,
    splits: int,
    config: GradientConfig,
) -> None:
    batch, _, D = x.shape
    M, N = (x.shape[1], 0) if p is None else (p.shape[1], p.shape[2])
    padded = triton.next_power_of_2(block_size) if block_size else 0
    lanes = D // block_size * padded if block_size else D
    product_dtype = x.dtype if p is None else p.dtype
    from_half = x.dtype in (torch.float16, torch.bfloat16)
    acc = accumulator(product_dtype)
    launch(
        gradient_kernel,
        (triton.cdiv(lanes, config.BLOCK_C) * splits,),
        x.device,
        **matrix("p", p, "zmn", x),
        **pointer("x", x, "znd", x),
        **pointer("y", y, "zmd", x),
        **metric.arguments(x, cast=False) | {"B": block_size, "BLOCK_B": padded},
        **pointer("rows", rows, "zmd", x, stride="r"),
        dw_diag_ptr=x if dw_diag is None else dw_diag,
        dw_blocks_ptr=x if dw_blocks is None else dw_blocks,
        batch=batch, M=M, N=N, D=D, lane_count=lanes, splits=splits,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_C=config.BLOCK_C, BLOCK_P=config.BLOCK_P,
        PRODUCT=p is not None, ROWS=rows is not None, GRAD_DIAG=dw_diag is not None, GRAD_BLOCKS=dw_blocks is not None,
        WIDE=needs_wide_channels(x, *(t for t in (y, rows) if t is not None)),
        PRECISION=precision(product_dtype, x.device, from_half=from_half),
        EPILOGUE_PRECISION=precision(acc, x.device, from_half=from_half, whole_rows=True),
        ACC=acc_type(acc),
        **options(config),
    )  # fmt: skip
