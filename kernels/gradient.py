"""The gradient kernel: R = P·x in registers, and what comes out of it in the epilogue.

With P = dS and x = b it gives da = T'(R), dW_diag = Σ_i a_i ⊙ R_i and dW_g = a_gᵀ R_g; with P = dSᵀ, x = a and the
blocks transposed it gives db. R itself is never stored. Without P, R is x: the gradients of the fold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.kernels import choice
from gssf_triton.kernels.args import PairMatrix, Tile, Vector
from gssf_triton.kernels.configs import dot_precision, tf32_allowed
from gssf_triton.kernels.fold import fold
from gssf_triton.kernels.launch import (
    PairStrides,
    acc_type,
    architecture,
    batch_of,
    cdiv,
    items_a_grid,
    lanes,
    launch,
    pair_strides,
    tile,
    weights,
)
from gssf_triton.kernels.tile import cast, clamped_rows, dot, nearest, pair_columns, pair_mask, pair_rows
from gssf_triton.kernels.toolchain import adds_chains, overwrites_operands
from gssf_triton.kernels.warm import empty, remembered
from gssf_triton.metric import Metric, accumulate_dtype


@dataclass(frozen=True, eq=False)
class GradientTile(Tile):
    """BLOCK_C lanes a program, whole blocks of them; BLOCK_P of them at a time in the epilogue."""

    BLOCK_C: int = 0
    BLOCK_P: int = 0
    EPILOGUE_PRECISION: str = "ieee"


class Scaling(NamedTuple):
    """What the rows of R = x are scaled by, and what is taken off the result: that of the unit rows' gradient.

    Attributes:
        scale: R = scale · x, one number a row, (M,), or one for all, ().
        dtype: Of y's features, and so of the result.
        radial: (M,): radial · (inverse · y) is taken off T'(R). None takes nothing off.
        inverse: (M,). Not in one number with the former, which leaves float32's range where rows are long.
    """

    scale: Tensor
    dtype: torch.dtype
    radial: Tensor | None = None
    inverse: Tensor | None = None


@triton.jit
def lane_parts(lanes, D, TILE: tl.constexpr):
    """(group, channel within it, channel, validity) of lanes; without blocks every lane is its own channel."""
    if TILE.BLOCK_B == 0:
        return lanes * 0, lanes, lanes, lanes < D
    else:
        group = lanes // TILE.BLOCK_B
        inner = lanes % TILE.BLOCK_B
        offs = group * TILE.B + inner
        return group, inner, offs, (inner < TILE.B) & (offs < D)


@triton.jit
def pointers(x, z, rows, channels, WIDE: tl.constexpr):
    """Pointers [rows, channels] into matrix z of a `Matrix`."""
    if WIDE:
        channels = channels.to(tl.int64)
    return x.ptr + z * x.batch + (rows * x.row)[:, None] + (channels * x.channel)[None, :]


@triton.jit(do_not_specialize=["stride_pz", "stride_pm", "stride_pn", "batch", "M", "N", "lane_count", "splits"])
def gradient_kernel(
    p_ptr, x, y, weights, rows, dw_diag_ptr, dw_blocks_ptr, scale, radial_ptr, inverse_ptr, stride_pz, stride_pm,
    stride_pn, batch, M, N, D, lane_count, splits, EVEN_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """rows = T'(R), dW_diag = Σ_i y_i ⊙ R_i, dW_g = y_gᵀ R_g of R = P x, or R = x without P; those that are not None.

    Without P, the rows of R may be scaled by a `Vector` and radial · (inverse · y) be taken off T'(R), for a batch of
    one.

    One program owns BLOCK_C lanes, whole groups of them, and every `splits`-th tile of rows. Weight gradients are
    summed over its tiles in order, in a slice of the partial sums (splits, …) that no other program writes; the
    launcher adds the slices up. So the result never depends on which program comes first.

    R and the epilogue's products use ACC. For half-precision features they run on tensor cores in TF32: float16 would
    underflow small gradients, and these products are only BLOCK_C / N of the work. The epilogue walks BLOCK_P lanes at
    a time to bound its registers.
    """
    tl.static_assert(TILE.BLOCK_C % TILE.BLOCK_P == 0)
    ACC: tl.constexpr = TILE.ACC
    # What TF32 cuts off is a tenth of what bfloat16 rounds off.
    ROUNDING: tl.constexpr = "none" if x.ptr.dtype.element_ty == tl.bfloat16 else TILE.EPILOGUE_PRECISION
    columns = tl.cdiv(lane_count, TILE.BLOCK_C)
    column = tl.program_id(0) % columns
    split = tl.program_id(0) // columns
    lanes_q = column * TILE.BLOCK_C + tl.arange(0, TILE.BLOCK_C)
    group_q, inner_q, offs_q, valid_q = lane_parts(lanes_q, D, TILE)
    tiles_m = tl.cdiv(M, TILE.BLOCK_M)
    for tile_m in range(split, batch * tiles_m, splits):
        z = (tile_m // tiles_m).to(tl.int64)
        offs_m, rows_m = clamped_rows(tile_m % tiles_m, M, TILE.BLOCK_M)
        mask_m = offs_m < M
        if p_ptr is not None:
            p = PairMatrix(p_ptr, stride_pz, stride_pm, stride_pn)
            p_rows = p_ptr + pair_rows(p, z, rows_m, EVEN_P)
            r = tl.zeros([TILE.BLOCK_M, TILE.BLOCK_C], ACC)
            for step in range(0, tl.cdiv(N, TILE.BLOCK_N)):
                offs_n = step * TILE.BLOCK_N + tl.arange(0, TILE.BLOCK_N)
                # Not `clamped_rows`: what lies past x's last row may be NaN, and 0 times that would be in every sum.
                rows_n = tl.where(offs_n < N, offs_n, 0).to(tl.int64)
                mask = pair_mask(p, offs_m, offs_n, M, N, EVEN_P)
                p_ptrs = p_rows[:, None] + pair_columns(p, offs_n, EVEN_P)[None, :]
                p_tile = tl.load(p_ptrs, mask=mask, other=0.0)
                x_tile = tl.load(pointers(x, z, rows_n, offs_q, TILE.WIDE), mask=valid_q[None, :], other=0.0)
                r = dot(p_tile, cast(x_tile, p_tile.dtype), r, TILE.PRECISION)
        else:
            x_ptrs = pointers(x, z, rows_m, offs_q, TILE.WIDE)
            r = tl.load(x_ptrs, mask=mask_m[:, None] & valid_q[None, :], other=0.0).to(ACC)
            if scale is not None:
                r *= tl.load(scale.ptr + rows_m * scale.stride, mask=mask_m, other=0.0).to(ACC)[:, None]

        if dw_diag_ptr is not None:
            y_ptrs = pointers(y, z, rows_m, offs_q, TILE.WIDE)
            y_tile = tl.load(y_ptrs, mask=mask_m[:, None] & valid_q[None, :], other=0.0).to(ACC)
            diag_slot = dw_diag_ptr + split.to(tl.int64) * D + offs_q
            dw_diag = tl.sum(y_tile * r, axis=0)
            if tile_m > split:
                dw_diag += tl.load(diag_slot, mask=valid_q, other=0.0)
            tl.store(diag_slot, dw_diag, mask=valid_q)

        if rows is not None and weights.blocks is None:
            diag = weights.diag
            w_diag = tl.load(diag.ptr + offs_q * diag.stride, mask=valid_q, other=0.0).to(ACC)
            out = r * w_diag[None, :]
            mask = mask_m[:, None] & valid_q[None, :]
            if radial_ptr is not None:
                y_tile = tl.load(pointers(y, z, rows_m, offs_q, TILE.WIDE), mask=mask, other=0.0).to(ACC)
                out -= tl.load(radial_ptr + rows_m)[:, None] * (tl.load(inverse_ptr + rows_m)[:, None] * y_tile)
            out = cast(out, rows.ptr.dtype.element_ty)
            tl.store(pointers(rows, z, rows_m, offs_q, TILE.WIDE), out, mask=mask)

        if dw_blocks_ptr is not None or (rows is not None and weights.blocks is not None):
            operand = nearest(r, ROUNDING)
            for first in range(0, TILE.BLOCK_C, TILE.BLOCK_P):
                lanes_p = column * TILE.BLOCK_C + first + tl.arange(0, TILE.BLOCK_P)
                group_p, inner_p, offs_p, valid_p = lane_parts(lanes_p, D, TILE)
                same_group = (group_p[:, None] == group_q[None, :]) & valid_p[:, None] & valid_q[None, :]
                if rows is not None and weights.blocks is not None:
                    # The diagonal rides in the weight tile: slicing it out of R's registers is not possible.
                    blocks = weights.blocks
                    w_ptrs = blocks.ptr + (group_p * blocks.group + inner_p * blocks.p)[:, None]
                    w = tl.load(w_ptrs + (inner_q * blocks.q)[None, :], mask=same_group, other=0.0).to(ACC)
                    if weights.diag is not None:
                        diag_ptrs = weights.diag.ptr + offs_p * weights.diag.stride
                        diag_p = tl.load(diag_ptrs, mask=valid_p, other=0.0).to(ACC)
                        on_diagonal = (offs_p[:, None] == offs_q[None, :]) & same_group
                        w += tl.where(on_diagonal, diag_p[:, None], 0.0)
                    w = nearest(w, ROUNDING)
                    mask = mask_m[:, None] & valid_p[None, :]
                    # Begun with, not taken off afterwards: that takes half as many registers again.
                    out = tl.zeros([TILE.BLOCK_M, TILE.BLOCK_P], ACC)
                    if radial_ptr is not None:
                        y_p = tl.load(pointers(y, z, rows_m, offs_p, TILE.WIDE), mask=mask, other=0.0).to(ACC)
                        out -= tl.load(radial_ptr + rows_m)[:, None] * (tl.load(inverse_ptr + rows_m)[:, None] * y_p)
                    out = cast(dot(operand, tl.trans(w), out, TILE.EPILOGUE_PRECISION), rows.ptr.dtype.element_ty)
                    tl.store(pointers(rows, z, rows_m, offs_p, TILE.WIDE), out, mask=mask)
                if dw_blocks_ptr is not None:
                    channel_p = offs_p
                    if TILE.WIDE:
                        channel_p = offs_p.to(tl.int64)
                    y_t_ptrs = y.ptr + z * y.batch + (rows_m * y.row)[None, :] + (channel_p * y.channel)[:, None]
                    y_t = tl.load(y_t_ptrs, mask=mask_m[None, :] & valid_p[:, None], other=0.0).to(ACC)
                    if y.ptr.dtype.element_ty == tl.float32:  # TF32 holds every half-precision number
                        y_t = nearest(y_t, ROUNDING)
                    dw = dot(y_t, operand, tl.zeros([TILE.BLOCK_P, TILE.BLOCK_C], ACC), TILE.EPILOGUE_PRECISION)
                    slot = dw_blocks_ptr + split.to(tl.int64) * D * TILE.B + (offs_p * TILE.B)[:, None]
                    slot += inner_q[None, :]
                    if tile_m > split:
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
        Rows (Z, M, D) in x's dtype; dW_diag (D,) and dW_blocks (G, B, B) in float32 (float64 for float64). All may
        lack Z.
    """
    rows, d_diag, d_blocks = partial_sums(p, x, y, metric, block_size, needs)
    return rows, summed(d_diag, 1), summed(d_blocks, 3)


def summed(slices: Tensor | None, dim: int) -> Tensor | None:
    """Partial sums added up, with `dim` dimensions in the end."""
    return slices if slices is None or slices.dim() == dim else slices.sum(0)


@remembered
def partial_sums(
    p: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    metric: Metric,
    block_size: int,
    needs: tuple[bool, bool, bool],
    scaling: Scaling | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`gradient`, but the weights' gradients may be slices (splits, …) whose sum they are.

    With `scaling`, of R = x without p and without Z, rows and y are in its dtype.
    """
    needs_rows, needs_diag, needs_blocks = needs
    assert not needs_rows or not metric.is_identity
    assert scaling is None or (p is None and x.dim() == 2)
    *batches, length, D = x.shape
    batch = batches[0] if batches else 1
    M, N = (length, 0) if p is None else p.shape[-2:]
    product_dtype = x.dtype if p is None else torch.promote_types(p.dtype, x.dtype)
    wide = accumulate_dtype(product_dtype)
    kernel_block = block_size if needs_blocks or metric.W_blocks is not None else 0
    features = x.dtype if scaling is None else scaling.dtype
    tf32 = True if features in (torch.float16, torch.bfloat16) else None
    config = choice.choose("gradient", x.device, product_dtype, M, N, D, kernel_block, batch, tf32=tf32)
    if scaling is not None and kernel_block:
        arch = architecture(x.device)
        few = min(config.BLOCK_M, 32 if config.BLOCK_C <= 128 else 16)
        if overwrites_operands(arch):
            # Products of few rows are safe. They hold all of their operands in registers.
            config = replace(config, BLOCK_M=few, BLOCK_P=16, num_stages=2)
        elif arch.startswith("sm_8"):
            config = replace(config, BLOCK_M=few)  # else some spill what the scaling holds
    if config.rows_apart and needs_rows:
        R = x if p is None else torch.matmul(p.to(product_dtype), x.to(product_dtype))
        of_weights = False, needs_diag, needs_blocks
        _, dw_diag, dw_blocks = partial_sums(None, R, y, metric, block_size, of_weights, scaling)
        folded = fold(R.reshape(batch * M, D), metric.mT, normalize=False).view(R.shape)
        if scaling is not None:
            folded *= scaling.scale[..., None]
            if scaling.radial is not None and scaling.inverse is not None and y is not None:
                folded.addcmul_(scaling.radial[:, None], scaling.inverse[:, None] * y, value=-1)
        return folded.to(features), dw_diag, dw_blocks

    row_tiles = batch * cdiv(M, config.BLOCK_M)
    # All row tiles side by side, unless each would need its own slice of the weights' partial sums, or there are more
    # than a grid holds: a program walks as many as it takes.
    splits = min(row_tiles, config.max_splits if needs_diag or needs_blocks else items_a_grid(max(D, 1)))

    work = batch and M and D and (p is None or N)
    slices = () if splits == 1 else (splits,)
    rows = empty((*batches, M, D), features, x.device) if needs_rows else None
    dw_diag = empty((*slices, D), wide, x.device) if needs_diag else None
    dw_blocks = None
    if needs_blocks:
        dw_blocks = empty((*slices, D // block_size, block_size, block_size), wide, x.device)
    if not work or not any(needs):
        for grad in (rows, dw_diag, dw_blocks):
            if grad is not None:
                grad.zero_()
        return rows, dw_diag, dw_blocks
    p = None if p is None else p.to(product_dtype)
    tf32, arch = tf32_allowed(), architecture(x.device)
    scale = None if scaling is None else Vector(scaling.scale, scaling.scale.dim())
    radial, inverse = (None, None) if scaling is None or rows is None else (scaling.radial, scaling.inverse)
    strides = PairStrides(None, None, None, False) if p is None else pair_strides(p)
    launch(
        gradient_kernel, (cdiv(lanes(D, kernel_block), config.BLOCK_C) * splits,), x.device, config,
        p_ptr=p, x=batch_of(x), y=None if y is None else batch_of(y), weights=weights(metric),
        rows=None if rows is None else batch_of(rows), dw_diag_ptr=dw_diag, dw_blocks_ptr=dw_blocks,
        scale=scale, radial_ptr=radial, inverse_ptr=inverse,
        stride_pz=strides.batch, stride_pm=strides.row, stride_pn=strides.column,
        batch=batch, M=M, N=N, D=D, lane_count=lanes(D, kernel_block), splits=splits, EVEN_P=strides.even,
        TILE=tile(
            config, *(t for t in (x, y, rows) if t is not None), B=kernel_block, kind=GradientTile,
            **_numerics(product_dtype, features, arch, tf32, scaling is None or adds_chains(arch)),
        ),
    )  # fmt: skip
    return rows, dw_diag, dw_blocks


@cache
def _numerics(dtype: torch.dtype, features: torch.dtype, arch: str, tf32: bool, chains: bool) -> dict[str, Any]:
    """Of products of `dtype`, and of the epilogue's, which are in float32 at least and in TF32 for half precision.

    `chains`: exact float32 may be three products of the epilogue's; if not, it runs on the slower FMA units.
    """
    acc, tf32 = accumulate_dtype(dtype), tf32 or features in (torch.float16, torch.bfloat16)
    return {
        "PRECISION": dot_precision(dtype, arch, tf32=tf32),
        "EPILOGUE_PRECISION": dot_precision(acc, arch, tf32=tf32, whole_rows=chains),
        "ACC": acc_type(acc),
    }
