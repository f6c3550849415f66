"""Walk S in chunks of constant size, in a fixed order: memory grows with M + N, and results are deterministic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from gssf_triton.kernels.configs import TORCH_CHUNK_ARRAYS
from gssf_triton.streaming.epilogues import EPILOGUES, Chunk, Epilogue, Kept, index_bits, state_dtype


@dataclass(frozen=True)
class Operands:
    """The rows and columns whose products are the similarities, and the teacher's where there is one.

    `t` (M, D) is folded already. Row i matches column i + offset; equal ids are never each other's negatives.
    """

    t: Tensor
    y: Tensor
    teacher_t: Tensor | None
    teacher_y: Tensor | None
    rows: Tensor
    columns: Tensor
    row_ids: Tensor | None
    column_ids: Tensor | None
    scalars: Tensor
    offset: int


class Engine(Protocol):
    """What computes one chunk: plain torch, or the Triton kernel."""

    #: How many arrays of a chunk's size, of the operands' dtype, are alive at once.
    ARRAYS: ClassVar[int]
    #: Rows and columns of a chunk.
    chunk: tuple[int, int]

    def __init__(self, chunk: tuple[int, int]) -> None: ...

    def tile(self, operands: Operands, rows: slice, columns: slice, epilogue: str, wants_slope: bool) -> Kept:
        """Outputs as (outputs, partial states, length): the partial states in the order of their columns or rows."""
        ...

    def add_product(self, out: Tensor, p: Tensor, x: Tensor) -> None:
        """out += p @ x, in out's dtype; undoing whatever scale the engine gives its slopes."""
        ...


class TorchEngine:
    """Chunks by torch's own products, epilogues by `epilogues`: the similarities, what becomes of them, the slope."""

    ARRAYS: ClassVar[int] = TORCH_CHUNK_ARRAYS

    def __init__(self, chunk: tuple[int, int]) -> None:
        self.chunk = chunk

    def tile(self, operands: Operands, rows: slice, columns: slice, epilogue: str, wants_slope: bool) -> Kept:
        teacher = None
        if operands.teacher_t is not None and operands.teacher_y is not None:
            teacher = operands.teacher_t[rows] @ operands.teacher_y[columns].mT
        same = None
        if operands.row_ids is not None and operands.column_ids is not None:
            same = operands.row_ids[rows, None] == operands.column_ids[None, columns]
        kept = EPILOGUES[epilogue].tile(
            Chunk(
                s=operands.t[rows] @ operands.y[columns].mT,
                teacher=teacher,
                rows=operands.rows[:, rows],
                columns=operands.columns[:, columns],
                diagonal=rows.start + operands.offset - columns.start,
                same=same,
                scalars=operands.scalars,
                wants_slope=wants_slope,
            )
        )
        return Kept(kept.row_out[:, None], kept.column_out[:, None], kept.totals, kept.slope)

    def add_product(self, out: Tensor, p: Tensor, x: Tensor) -> None:
        out.addmm_(p, x)


def spans(length: int, step: int) -> Iterator[slice]:
    """[0, length) in runs of at most `step`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _empty_state(epilogue: Epilogue, values: tuple[float, ...], length: int, like: Tensor) -> Tensor:
    state = like.new_empty((len(values), length), dtype=state_dtype(like.dtype))
    for output, (row, value) in enumerate(zip(state, values, strict=True)):
        (index_bits(row) if output == epilogue.index_output else row).fill_(value)
    return state


def _merge_partials(epilogue: Epilogue, partials: Tensor) -> Tensor:
    """(outputs, P, length) as one state (outputs, length): neighbours are merged, then pairs of those, and so on."""
    states = partials
    while states.shape[1] > 1:
        even = states.shape[1] // 2 * 2
        merged = epilogue.merge(states[:, 0:even:2], states[:, 1:even:2])
        states = torch.cat((merged, states[:, even:]), dim=1)
    return states[:, 0]


def _merge_into(state: Tensor, epilogue: Epilogue, partials: Tensor, run: slice, start: int, empty: int) -> None:
    if not empty:
        return
    new = _merge_partials(epilogue, partials.to(state.dtype))
    if epilogue.index_output is not None:
        at = new[epilogue.index_output]
        index_bits(at).copy_(at.long() + start)
    state[:, run] = epilogue.merge(state[:, run], new)


@dataclass
class Result:
    """States (outputs, M) and (outputs, N), the totals, and the slope's products with both sides, if asked for."""

    row_state: Tensor
    column_state: Tensor
    totals: Tensor
    d_t: Tensor | None
    d_y: Tensor | None


def stream(engine: Engine, name: str, operands: Operands, wants_slope: bool) -> Result:
    """Everything the epilogue keeps of S, and with `wants_slope` slope @ y (M, D) and slopeᵀ @ t (N, D)."""
    epilogue = EPILOGUES[name]
    t, y = operands.t, operands.y
    M, N, wide = t.shape[0], y.shape[0], state_dtype(t.dtype)
    row_state = _empty_state(epilogue, epilogue.row_empty, M, t)
    column_state = _empty_state(epilogue, epilogue.column_empty, N, t)
    totals = [t.new_zeros(epilogue.totals, dtype=wide)]
    d_t = d_y = None
    if wants_slope:
        d_t, d_y = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (t, y))
    for rows in spans(M, engine.chunk[0]):
        for columns in spans(N, engine.chunk[1]):
            kept = engine.tile(operands, rows, columns, name, wants_slope)
            _merge_into(row_state, epilogue, kept.row_out, rows, columns.start, len(epilogue.row_empty))
            _merge_into(column_state, epilogue, kept.column_out, columns, rows.start, len(epilogue.column_empty))
            totals.append(kept.totals.to(wide))
            if d_t is not None and d_y is not None:
                assert kept.slope is not None
                engine.add_product(d_t[rows], kept.slope, y[columns])
                engine.add_product(d_y[columns], kept.slope.mT, t[rows])
    return Result(row_state, column_state, torch.stack(totals).sum(0), d_t, d_y)
