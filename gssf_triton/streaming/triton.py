"""The host's part of the streaming kernel: parts of S in order, and products with the slopes that it stores."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from gssf_triton import kernels
from gssf_triton.kernels.configs import TRITON_CHUNK_ARRAYS
from gssf_triton.kernels.stream_values import Epilogue, Operands, Result
from gssf_triton.metric import IDENTITY, accumulate_dtype
from gssf_triton.streaming.chunks import chunk_shape


def walk(x: Operands, epilogue: Epilogue, wants_slope: bool, stores: bool) -> Result:
    """What the epilogue keeps of S: a merge a side, and one launch; a launch a chunk where slopes take several."""
    (M, D), N, t, y = x.t.shape, x.y.shape[0], x.t, x.y
    chunk = M, N
    if wants_slope:
        chunk = chunk_shape(M, N, D, t.dtype, t.device, entry_bytes=TRITON_CHUNK_ARRAYS * t.element_size())
    wide, is_whole = accumulate_dtype(t.dtype), chunk[0] >= M and chunk[1] >= N
    d_t, d_y = (side.new_empty(*side.shape, dtype=wide) if wants_slope else None for side in (t, y))
    if is_whole:
        kept, *stored = kernels.stream.whole(x, epilogue, wants_slope, stores)
        if kept.slope is not None and d_t is not None and d_y is not None:
            add_product(d_t, kept.slope, y, beta=0)
            add_product(d_y, kept.slope.mT, t, beta=0)
        return Result.of(x, kept, d_t, d_y, *stored)
    streamed = kernels.stream.Pass(x, epilogue, chunk)
    for rows, columns, slope in streamed.parts():
        assert slope is not None and d_t is not None and d_y is not None
        # The first product of a run of rows, or of columns, writes; others add.
        add_product(d_t[rows], slope, y[columns], beta=int(columns.start > 0))
        add_product(d_y[columns], slope.mT, t[rows], beta=int(rows.start > 0))
    return Result.of(x, streamed.kept(), d_t, d_y)


def add_product(out: Tensor, p: Tensor, x: Tensor, *, beta: int = 1) -> None:
    """out = beta · out + p @ x, in out's dtype; undoing the scale of slopes (`kernels.stream.slope_scale`)."""
    alpha = 1 / kernels.stream.slope_scale(p.dtype)
    if p.dtype == out.dtype:
        out.addmm_(p, x, beta=beta)
        return
    if adds_halves_in_float32(p.dtype, out.dtype, p.device):
        torch.addmm(out, p, x, beta=beta, alpha=alpha, out_dtype=out.dtype, out=out)
        return
    # This library would round a half-precision product to half precision before it is added. Ours takes whole steps of
    # the sum alone, which need no masks: what is left of a batch would be another kernel for every kind of size.
    longest = kernels.launch.LONGEST_STEP
    steps = p.shape[1] // longest * longest
    out.addmm_(p[:, steps:].to(out.dtype), x[steps:].to(out.dtype), beta=beta, alpha=alpha)
    if steps:
        product = torch.empty((1, *out.shape), dtype=out.dtype, device=out.device)
        kernels.pairwise.pairwise(p[None, :, :steps], x[:steps].mT[None], IDENTITY, False, product)
        out.add_(product[0], alpha=alpha)


@cache
def adds_halves_in_float32(dtype: torch.dtype, sums: torch.dtype, device: torch.device) -> bool:
    """True where the library adds products of `dtype` to a matrix of `sums` with none of them rounded to `dtype`.

    Found out once, by a small product: newer versions of torch do so on some devices.
    """
    x, out = torch.zeros((16, 16), dtype=dtype, device=device), torch.zeros((16, 16), dtype=sums, device=device)
    try:
        torch.addmm(out, x, x, out_dtype=sums, out=out)
    except (RuntimeError, TypeError):  # not on this device, and no such argument
        return False
    return True
