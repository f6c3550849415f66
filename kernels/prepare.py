"""Both ends of a loss's product: features to its operand in one launch, and the operand's gradient back in one or two.

No float32 array of the features' size lies in between. With x̂ = x · inverse (x itself where rows are not normalised) an
operand's rows are T(x̂) / unit. Of dT, the gradient with respect to T(x̂), and g = T'(dT), the one with respect to x̂:

    dx = inverse (g − x̂ ⟨x̂, g⟩),    ⟨x̂, g⟩ = ⟨T(x̂), dT⟩ = unit ⟨rows, dT⟩,    dW_diag = Σ x̂ ⊙ dT,    dW_g = x̂_gᵀ dT_g.
"""

from __future__ import annotations

from math import sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.constants import NORM_EPS
from gssf_triton.kernels.configs import finish_config
from gssf_triton.kernels.fold import folded_rows
from gssf_triton.kernels.gradient import Scaling, partial_sums, summed
from gssf_triton.kernels.launch import architecture, cdiv, launch, matrix, tile
from gssf_triton.kernels.tile import cast, channels, clamped_rows, load_chunk, rows_of
from gssf_triton.kernels.warm import empty, remembered
from gssf_triton.metric import Metric, accumulate_dtype

#: Inverse norms above this are of rows no longer than NORM_EPS; a millionth less, since they are rounded.
LARGEST_INVERSE = tl.constexpr((1 - 1e-6) / NORM_EPS)

#: Units lie in this range, so that their inverses are normal numbers, and HEADROOM binary orders below the bound: then
#: T(x̂) / unit is at most 2¹⁴, with room for what rounds on the way, and 2²⁸ times float16's smallest normal number.
SMALLEST_UNIT, LARGEST_UNIT, HEADROOM = 2.0**-100, 2.0**113, 13
#: The bits of float32's exponent, and what a doubling adds to them.
EXPONENT, DOUBLING = 0x7F800000, 1 << 23


def largest(x: Tensor) -> Tensor:
    """The largest |x| of the rows (M, D) that are finite, (), float32; 0 of nothing. Others must not scale these."""
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    rows = torch.linalg.vector_norm(x.detach(), ord=torch.inf, dim=1)
    return torch.nan_to_num(rows, 0.0, 0.0).amax().to(torch.float32)


def unit_of(metric: Metric, reach: Tensor | None) -> Tensor | None:
    """The unit of T(x̂) in float16, a power of two, () float32; None for 1, of normalised rows that are not folded.

    It is from a bound, without a pass over T(x̂): |T(x̂)_q| ≤ max |W_diag| + √B max |W_blocks| of normalised rows, and of
    others the same with B in place of √B, times their `reach`. Weights that are not finite leave no similarity finite,
    so their unit may be any.
    """
    W_diag, W_blocks = (None if w is None else w.abs().amax().float() for w in (metric.W_diag, metric.W_blocks))
    times = sqrt(metric.block_size) if reach is None else metric.block_size
    if W_diag is not None and W_blocks is not None:
        limit = torch.add(W_diag, W_blocks, alpha=times)
    elif W_blocks is not None:
        limit = W_blocks * times
    elif W_diag is not None:
        limit = W_diag
    elif reach is None:
        return None
    else:
        limit, reach = reach, None
    if reach is not None:
        limit = limit * reach
    limit = limit.clamp(SMALLEST_UNIT * 2**HEADROOM, LARGEST_UNIT * 2**HEADROOM)
    return limit.view(torch.int32).bitwise_and_(EXPONENT).sub_(HEADROOM * DOUBLING).view(torch.float32)


def bound(metric: Metric, normalize: bool, x: Tensor) -> Tensor | None:
    """`unit_of` the operand of x (M, D)."""
    return unit_of(metric, None if normalize else largest(x)) if x.numel() else None


def prepare(
    x: Tensor, metric: Metric, normalize: bool, dtype: torch.dtype, unit: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(T(x̂) / unit, inverse norms) of x (M, D), in one launch.

    Args:
        x: Features of any float dtype and strides.
        metric: The weights to fold, or none.
        normalize: Put rows on the unit sphere first.
        dtype: The operand's.
        unit: A power of two, (); None for 1.

    Returns:
        The operand (M, D) in `dtype`, contiguous, and 1 / max(‖x‖₂, 1e-12) (M,) in float32 at least: 0 where the norm
        overflows, as torch.nn.functional.normalize has it; None where rows are not normalised.
    """
    blocks = metric.W_blocks
    if blocks is not None and blocks.dtype != x.dtype:
        metric = Metric(metric.W_diag, blocks.to(accumulate_dtype(x.dtype)))
    return folded_rows(x, metric, normalize, dtype, unit, normalize)


@triton.jit(do_not_specialize=["M", "chunks"])
def finish_kernel(
    r, rows, inverse_ptr, unit_ptr, factor_ptr, dx, scale_ptr, radial_ptr, M, D, chunks, TILE: tl.constexpr
):  # fmt: skip
    """What gradients of normalised rows need of dT = factor · r: a `Scaling`, or with no fold dx itself if not None.

    One program owns BLOCK_M rows and reads them once, or for dx twice, the second time from cache. Sums are in ACC.
    """
    ACC: tl.constexpr = TILE.ACC
    offs_m, rows_m = clamped_rows(tl.program_id(0), M, TILE.BLOCK_M)
    mask_m = offs_m < M
    r_rows = rows_of(r, rows_m)
    t_rows = rows_of(rows, rows_m)
    products = tl.zeros([TILE.BLOCK_M, TILE.BLOCK_K], ACC)
    for chunk in range(0, chunks):
        products += load_chunk(r_rows, chunk, D, TILE).to(ACC) * load_chunk(t_rows, chunk, D, TILE).to(ACC)
    unit = 1.0
    if unit_ptr is not None:
        unit = tl.load(unit_ptr).to(ACC)
    inverse = tl.load(inverse_ptr + rows_m)
    scale = inverse
    if factor_ptr is not None:
        scale *= tl.load(factor_ptr).to(ACC)
    # The smallest norm is a constant: nothing flows through it.
    inner = tl.where(inverse > LARGEST_INVERSE, 0.0, tl.sum(products, axis=1) * unit)
    if scale_ptr is not None:
        tl.store(scale_ptr + offs_m, scale, mask=mask_m)
        tl.store(radial_ptr + offs_m, scale * inner, mask=mask_m)
    else:
        for chunk in range(0, chunks):
            offs, valid = channels(chunk, D, TILE)
            t = load_chunk(t_rows, chunk, D, TILE).to(ACC) * unit
            g = load_chunk(r_rows, chunk, D, TILE).to(ACC) - t * inner[:, None]
            ptrs = dx.ptr + (offs_m.to(tl.int64) * dx.row)[:, None] + (offs * dx.channel)[None, :]
            out = cast(g * scale[:, None], dx.ptr.dtype.element_ty)
            tl.store(ptrs, out, mask=mask_m[:, None] & valid[None, :])


def finish(
    R: Tensor, x: Tensor, rows: Tensor, unit: Tensor | None, inverse: Tensor | None, metric: Metric,
    factor: Tensor | None, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, dW_diag, dW_blocks), those of them that `needs` says, of dT = factor · R, the gradient of T(x̂).

    Two launches where rows are normalised and folded, else one, and the sums of the weights' partial sums.

    Args:
        R: (M, D).
        x: The features, (M, D).
        rows: Their operand, as `prepare` returned it.
        unit: The operand's; None for 1.
        inverse: As `prepare` returned them.
        metric: As `prepare` took it.
        factor: (), float32 (float64 for float64 features); None for 1, of normalised rows.
        needs: Which of (dx, dW_diag, dW_blocks) to compute.

    Returns:
        dx in x's dtype, the others in float32 at least. 0 in rows whose norm overflows;
        norms up to 1e-12 are constants.
    """
    if metric.is_identity and inverse is None:
        assert factor is not None
        return torch.mul(R, factor, out=torch.empty_like(R, dtype=x.dtype)) if needs[0] else None, None, None
    dx, d_diag, d_blocks = _finish(R, x, rows, unit, inverse, metric, factor, needs)
    return dx, summed(d_diag, 1), summed(d_blocks, 3)


@remembered
def _finish(
    R: Tensor, x: Tensor, rows: Tensor, unit: Tensor | None, inverse: Tensor | None, metric: Metric,
    factor: Tensor | None, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`finish`, with the weights' `partial_sums`."""
    if metric.is_identity:
        assert inverse is not None
        dx = empty(x.shape, x.dtype, x.device) if needs[0] else None
        if dx is not None:
            _finish_rows(R, rows, unit, inverse, factor, dx)
        return dx, None, None
    scale, radial = factor, None
    if inverse is not None and needs[0]:
        scale, radial = (empty(inverse.shape, inverse.dtype, inverse.device) for _ in range(2))
        _finish_rows(R, rows, unit, inverse, factor, Scaling(scale, x.dtype, radial))
    elif inverse is not None:
        scale = inverse if factor is None else inverse * factor
    scaling = None if scale is None else Scaling(scale, x.dtype, radial, None if radial is None else inverse)
    return partial_sums(None, R, x, metric, metric.block_size, needs, scaling)


def _finish_rows(
    R: Tensor, rows: Tensor, unit: Tensor | None, inverse: Tensor, factor: Tensor | None, out: Tensor | Scaling
) -> None:
    """Write dx, or the `Scaling` of the gradient that folds it."""
    if R.numel() == 0:
        return
    (M, D), config = R.shape, finish_config(R.dtype, architecture(R.device))
    dx, scale, radial = (out, None, None) if isinstance(out, Tensor) else (None, out.scale, out.radial)
    launch(
        finish_kernel, (cdiv(M, config.BLOCK_M),), R.device, config,
        r=matrix(R), rows=matrix(rows), inverse_ptr=inverse, unit_ptr=unit, factor_ptr=factor,
        dx=None if dx is None else matrix(dx), scale_ptr=scale, radial_ptr=radial,
        M=M, D=D, chunks=cdiv(D, config.BLOCK_K), TILE=tile(config, R, rows),
    )  # fmt: skip
