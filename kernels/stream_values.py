"""What goes into a streamed product and what comes out of it, as plain values: no Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """All that an epilogue may know of S = t yᵀ, t (M, D) folded before: of the whole of it, or of one chunk.

    Attributes:
        t: Rows, (M, D).
        y: Columns, (N, D).
        scalars: The scale of S, then the epilogue's own.
        rows: Vectors along the rows, (count, M), or None; each epilogue says which.
        columns: Vectors along the columns, (count, N), or None.
        row_ids: (M,) integers, or None. Pairs of equal ids are never negatives of each other.
        column_ids: (N,) integers, or None.
        teacher_t: Rows of a second product, (M, E), or None.
        teacher_y: Its columns, (N, E), or None.
        offset: Row i matches column i + offset.
    """

    t: Tensor
    y: Tensor
    scalars: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    teacher_t: Tensor | None = None
    teacher_y: Tensor | None = None
    offset: int = 0

    def chunk(self, rows: slice, columns: slice) -> Operands:
        """The operands of S[rows, columns]."""

        def cut(x: Tensor | None, run: slice) -> Tensor | None:
            return None if x is None else x[run]

        return Operands(
            self.t[rows],
            self.y[columns],
            self.scalars,
            None if self.rows is None else self.rows[:, rows],
            None if self.columns is None else self.columns[:, columns],
            cut(self.row_ids, rows),
            cut(self.column_ids, columns),
            cut(self.teacher_t, rows),
            cut(self.teacher_y, columns),
            rows.start + self.offset - columns.start,
        )


class Kept(NamedTuple):
    """What an epilogue keeps of a chunk (R, C): outputs of rows and of columns, sums over it, and its slope (R, C)."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    totals: Tensor | None = None
    slope: Tensor | None = None


#: Joins two states (outputs, length) of the same rows, the first of the columns that come first.
Merge = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Epilogue:
    """What is kept of S, in both backends. CONTRIBUTING.md adds one.

    Attributes:
        torch: Computes a chunk: takes a `streaming.epilogues.Chunk`, returns what is `Kept` of it.
        triton: The function of `kernels.epilogues` that computes a tile.
        merge: Joins the states of tiles, chunks and processes.
        rows: A row's state before anything is merged: a number an output.
        columns: A column's state.
        totals: How many sums over all of S.
        index: Which output is an index: within the chunk, and in a state within the whole side (see `index_bits`).
        both: Columns are treated as rows are.
        sums: Plain sums are kept too.
        slope: Makes ∂loss/∂(scale·s) where one is asked for.
        teacher: Reads the second product.
    """

    torch: Callable[[Any], Kept]
    triton: str
    merge: Merge
    rows: tuple[float, ...] = ()
    columns: tuple[float, ...] = ()
    totals: int = 0
    index: int | None = None
    both: bool = False
    sums: bool = False
    slope: bool = False
    teacher: bool = False
