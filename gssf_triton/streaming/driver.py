"""What an epilogue keeps of S, in a fixed order: memory grows with M + N, and results are deterministic.

Torch walks S in chunks of constant size. The kernel takes all of S in one launch, but where slopes take several chunks.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gssf_triton.kernels.configs import TORCH_CHUNK_ARRAYS
from gssf_triton.kernels.stream_values import Epilogue, Operands, Result
from gssf_triton.metric import accumulate_dtype
from gssf_triton.operators import is_plain
from gssf_triton.slices import slices
from gssf_triton.streaming import triton
from gssf_triton.streaming.chunks import chunk_shape
from gssf_triton.streaming.epilogues import EPILOGUES, Chunk, index_bits

__all__ = ["Result", "stream", "stream_op"]


def _nothing_yet(x: Operands, epilogue: Epilogue, wants_slope: bool) -> Result:
    """The result of an S without a number."""
    wide = accumulate_dtype(x.t.dtype)

    def empty_state(values: tuple[float, ...], length: int) -> Tensor:
        state = x.t.new_empty((len(values), length), dtype=wide)
        for output, value in enumerate(values):
            (index_bits(state[output]) if output == epilogue.index else state[output]).fill_(value)
        return state

    d_t, d_y = (side.new_zeros(side.shape, dtype=wide) if wants_slope else None for side in (x.t, x.y))
    rows, columns = empty_state(epilogue.rows, x.t.shape[0]), empty_state(epilogue.columns, x.y.shape[0])
    totals = x.t.new_zeros(epilogue.totals_of(wants_slope), dtype=wide)
    return Result(rows, columns, totals, d_t, d_y)


def _walk(x: Operands, epilogue: Epilogue, wants_slope: bool, stores: bool) -> Result:
    """The result by torch's own products, chunk by chunk; of one chunk, what the epilogue keeps of it."""
    (M, D), N, t = x.t.shape, x.y.shape[0], x.t
    step = chunk_shape(M, N, D, t.dtype, t.device, entry_bytes=TORCH_CHUNK_ARRAYS * t.element_size())
    if not stores and all(size <= most for size, most in zip((M, N), step, strict=True)):
        kept = epilogue.torch(Chunk(x, epilogue, wants_slope))
        return Result.of(x, kept, *(() if kept.slope is None else (kept.slope @ x.y, kept.slope.mT @ t)))
    result = _nothing_yet(x, epilogue, wants_slope)
    if stores:
        result = result._replace(stored=t.new_empty(M, N))
    totals = [result.totals]
    for rows in slices(0, M, step[0]):
        for columns in slices(0, N, step[1]):
            chunk = Chunk(x, epilogue, wants_slope, rows, columns)
            if stores:
                result.stored[rows, columns] = chunk.s
            kept = epilogue.torch(chunk)
            for states, new, run in ((result.rows, kept.rows, rows), (result.columns, kept.columns, columns)):
                if new is not None:
                    states[:, run] = epilogue.merge(states[:, run], new)
            if kept.totals is not None:
                totals.append(kept.totals)
            if kept.slope is not None:
                result.d_t[rows].addmm_(kept.slope, x.y[columns])
                result.d_y[columns].addmm_(kept.slope.mT, t[rows])
    return result._replace(totals=torch.stack(totals).sum(0))


def _run(epilogue: str, wants_slope: bool, stores: bool, backend: str, x: Operands) -> Result:
    record, device = EPILOGUES[epilogue], x.t.device.type
    if not (x.t.shape[0] and x.y.shape[0]):
        return _nothing_yet(x, record, wants_slope)
    walk = triton.walk if backend == "triton" else _walk
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        return walk(x, record, wants_slope, stores)


@torch.library.custom_op(
    "gssf::stream",
    mutates_args=(),
    schema="(str epilogue, bool wants_slope, bool stores, str backend, Tensor t, Tensor y, Tensor scalars, "
    "Tensor? rows, Tensor? columns, Tensor? row_ids, Tensor? column_ids, Tensor? teacher_t, Tensor? teacher_y, "
    "SymInt offset, Tensor? stored, Tensor? tops) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def stream_op(epilogue: str, wants_slope: bool, stores: bool, backend: str, *operands: Any) -> tuple[Tensor, ...]:
    """`stream` as one operator to the compiler's eyes; its arguments are flat."""
    x = Operands(*operands)
    return _flat(x, _run(epilogue, wants_slope, stores, backend, x))


@stream_op.register_fake
def _(epilogue: str, wants_slope: bool, stores: bool, backend: str, *operands: Any) -> tuple[Tensor, ...]:
    # Nothing is stored where a compiler looks: the sizes of tiles would have to be known.
    assert not stores
    x = Operands(*operands)
    return _flat(x, _nothing_yet(x, EPILOGUES[epilogue], wants_slope))


def _flat(x: Operands, result: Result) -> tuple[Tensor, ...]:
    """The result as an operator's, which are tensors: empty ones for None."""
    return tuple(x.t.new_empty(0) if part is None else part for part in result)


def stream(epilogue: str, x: Operands, *, wants_slope: bool = False, stores: bool = False, backend: str) -> Result:
    """What the epilogue of this name keeps of S = t yᵀ, and with `wants_slope` its slope's products with both sides.

    S is stored only with `stores`, for a later pass. One `torch.library` operator where something traces, without a
    gradient of its own.
    """
    if is_plain(*(value for value in x if not isinstance(value, int))):
        return _run(epilogue, wants_slope, stores, backend, x)
    return Result(*stream_op(epilogue, wants_slope, stores, backend, *x))
