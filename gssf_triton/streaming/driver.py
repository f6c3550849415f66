"""Walk S in chunks of constant size, in a fixed order: memory grows with M + N, and results are deterministic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gssf_triton.kernels.configs import TORCH_CHUNK_ARRAYS
from gssf_triton.kernels.stream_values import Epilogue, Kept, Operands
from gssf_triton.metric import accumulate_dtype
from gssf_triton.slices import slices
from gssf_triton.streaming.chunks import chunk_shape
from gssf_triton.streaming.epilogues import EPILOGUES, Chunk, index_bits
from gssf_triton.streaming.triton import TritonEngine


@dataclass(frozen=True)
class TorchEngine:
    """Chunks by torch's own products and the torch form of the epilogue. `TritonEngine` has the same methods."""

    #: How many arrays of a chunk's size, of the operands' dtype, are alive at once.
    ARRAYS: ClassVar[int] = TORCH_CHUNK_ARRAYS

    x: Operands
    epilogue: Epilogue
    wants_slope: bool

    def chunk(self, rows: slice, columns: slice) -> Kept:
        """What the epilogue keeps of S[rows, columns]: states (outputs, R) and (outputs, C), totals, slope (R, C)."""
        return self.epilogue.torch(Chunk(self.x.chunk(rows, columns), self.epilogue, self.wants_slope))

    @staticmethod
    def add_product(out: Tensor, p: Tensor, x: Tensor) -> None:
        """out += p @ x, in out's dtype; undoing whatever scale the engine gives its slopes."""
        out.addmm_(p, x)


ENGINES: dict[str, type[TorchEngine | TritonEngine]] = {"torch": TorchEngine, "triton": TritonEngine}


class Result(NamedTuple):
    """What an epilogue keeps of all of S.

    Attributes:
        rows: The rows' states, (outputs, M).
        columns: The columns' states, (outputs, N).
        totals: Its sums, (totals,).
        d_t: slope @ y, (M, D); empty where no slope is asked for.
        d_y: slopeᵀ @ t, (N, D); empty where no slope is asked for.
    """

    rows: Tensor
    columns: Tensor
    totals: Tensor
    d_t: Tensor
    d_y: Tensor


def _nothing_yet(x: Operands, epilogue: Epilogue, wants_slope: bool) -> Result:
    """The result of an S without a number."""
    wide = accumulate_dtype(x.t.dtype)

    def empty_state(values: tuple[float, ...], length: int) -> Tensor:
        state = x.t.new_empty((len(values), length), dtype=wide)
        for output, value in enumerate(values):
            (index_bits(state[output]) if output == epilogue.index else state[output]).fill_(value)
        return state

    d_t, d_y = (x.t.new_zeros(side.shape if wants_slope else 0, dtype=wide) for side in (x.t, x.y))
    rows, columns = empty_state(epilogue.rows, x.t.shape[0]), empty_state(epilogue.columns, x.y.shape[0])
    return Result(rows, columns, x.t.new_zeros(epilogue.totals, dtype=wide), d_t, d_y)


def _merge_into(state: Tensor, epilogue: Epilogue, new: Tensor | None, run: slice, start: int) -> None:
    """Merge a chunk's state into the whole side's; its indices count from `start`."""
    if new is None:
        return
    new = new.to(state.dtype)
    if epilogue.index is not None:
        at = new[epilogue.index]
        index_bits(at).copy_(at.long() + start)
    state[:, run] = epilogue.merge(state[:, run], new)


def _walk(x: Operands, epilogue: Epilogue, wants_slope: bool, backend: str) -> Result:
    """The result, chunk by chunk."""
    (M, D), N, t = x.t.shape, x.y.shape[0], x.t
    engine = ENGINES[backend](x, epilogue, wants_slope)
    chunk = chunk_shape(M, N, D, t.dtype, t.device, entry_bytes=engine.ARRAYS * t.element_size())
    result = _nothing_yet(x, epilogue, wants_slope)
    totals = [result.totals]
    for rows in slices(0, M, chunk[0]):
        for columns in slices(0, N, chunk[1]):
            kept = engine.chunk(rows, columns)
            _merge_into(result.rows, epilogue, kept.rows, rows, columns.start)
            _merge_into(result.columns, epilogue, kept.columns, columns, rows.start)
            if kept.totals is not None:
                totals.append(kept.totals.to(result.totals.dtype))
            if kept.slope is not None:
                engine.add_product(result.d_t[rows], kept.slope, x.y[columns])
                engine.add_product(result.d_y[columns], kept.slope.mT, t[rows])
    return result._replace(totals=torch.stack(totals).sum(0))


@torch.library.custom_op(
    "gssf::stream",
    mutates_args=(),
    schema="(str epilogue, bool wants_slope, str backend, Tensor t, Tensor y, Tensor scalars, Tensor? rows, "
    "Tensor? columns, Tensor? row_ids, Tensor? column_ids, Tensor? teacher_t, Tensor? teacher_y, SymInt offset)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def stream_op(epilogue: str, wants_slope: bool, backend: str, *operands: Any) -> tuple[Tensor, ...]:
    """`stream` as one operator to autograd's and the compiler's eyes; its arguments are flat."""
    x = Operands(*operands)
    with torch.autocast(x.t.device.type, enabled=False):
        return tuple(_walk(x, EPILOGUES[epilogue], wants_slope, backend))


@stream_op.register_fake
def _(epilogue: str, wants_slope: bool, backend: str, *operands: Any) -> tuple[Tensor, ...]:
    return tuple(_nothing_yet(Operands(*operands), EPILOGUES[epilogue], wants_slope))


def stream(epilogue: str, x: Operands, *, wants_slope: bool = False, backend: str) -> Result:
    """What the epilogue of this name keeps of S = t yᵀ, and with `wants_slope` its slope's products with both sides.

    S is never stored. One `torch.library` operator, without a gradient of its own.
    """
    return Result(*stream_op(epilogue, wants_slope, backend, *x))
