"""What goes into a streamed product and what comes out of it, as plain values: no Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from gssf_triton.metric import accumulate_dtype


class Operands(NamedTuple):
    """All that an epilogue may know of S = t yᵀ, t (M, D) folded before.

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
        stored: S as an earlier pass has stored it (`kernels.stream.Stored`), or None: it is computed.
        tops: The rest of it.
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
    stored: Tensor | None = None
    tops: Tensor | None = None


class Kept(NamedTuple):
    """What an epilogue keeps of a chunk (R, C): outputs of rows and of columns, sums over it, and its slope (R, C)."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    totals: Tensor | None = None
    slope: Tensor | None = None


class Result(NamedTuple):
    """What an epilogue keeps of all of S.

    Attributes:
        rows: The rows' states, (outputs, M).
        columns: The columns' states, (outputs, N).
        totals: Its sums, (totals,); empty where it makes a slope and none is asked for.
        d_t: slope @ y, (M, D), where a slope is asked for.
        d_y: slopeᵀ @ t, (N, D), where a slope is asked for.
        stored: S, for a later pass, where that is asked for.
        tops: The rest of it.

    The latter are None where there is nothing, of a compiled operator empty.
    """

    rows: Tensor
    columns: Tensor
    totals: Tensor
    d_t: Any = None
    d_y: Any = None
    stored: Any = None
    tops: Any = None

    @classmethod
    def of(cls, x: Operands, kept: Kept, *more: Tensor | None) -> Result:
        """What is kept of all of S, then the slope's products and what is stored."""

        def result(found: Tensor | None, *shape: int) -> Tensor:
            return x.t.new_empty(shape, dtype=accumulate_dtype(x.t.dtype)) if found is None else found

        rows, columns = result(kept.rows, 0, x.t.shape[0]), result(kept.columns, 0, x.y.shape[0])
        return cls(rows, columns, result(kept.totals, 0), *more)


#: Joins two states (outputs, length) of the same rows, the first of the columns that come first.
Merge = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What is kept of S, in both backends. CONTRIBUTING.md adds one.

    Attributes:
        torch: Computes a chunk: takes a `streaming.epilogues.Chunk`, returns what is `Kept` of it.
        triton: The function of `kernels.epilogues` that computes a tile.
        merge: Joins the states of chunks and processes; the function of `kernels.epilogues` of its name joins tiles'.
        rows: A row's state before anything is merged: a number an output.
        columns: A column's state.
        totals: How many sums over all of S.
        index: Which output is an index within the whole side, as an integer's bits (`streaming.epilogues.index_bits`).
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

    def totals_of(self, wants_slope: bool) -> int:
        """How many sums are made: those of a slope only with it."""
        return self.totals if wants_slope or not self.slope else 0
