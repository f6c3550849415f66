"""The order of retrieval: higher score first, equal scores by the lower index, NaN above everything (as torch.topk).

Scores are compared as integers of the same order (`order_keys`), so that there is one way to compare, NaN and −0
included. One key, `absent`, lies below that of every score, −inf too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gssf_triton.kernels.retrieval_configs import strip_rows
from gssf_triton.slices import slices

_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
_FLOAT = {integer: floating for floating, integer in _INTEGER.items()}


def key_dtype(dtype: torch.dtype) -> torch.dtype:
    """The integers that scores of `dtype`, float32 or float64, are ordered by."""
    return _INTEGER[dtype]


def absent(dtype: torch.dtype) -> int:
    """The key of a dropped or missing item: below the key of −inf."""
    return torch.iinfo(dtype).min


def _flip(bits: Tensor) -> Tensor:
    """Sign-and-magnitude to two's complement, and back."""
    info = torch.iinfo(bits.dtype)
    return (bits >> (info.bits - 1)).bitwise_and_(info.max).bitwise_xor_(bits)


def order_keys(scores: Tensor) -> Tensor:
    """Integers that compare as the scores do; equal scores, −0 and 0, and any two NaN have equal keys."""
    # Adding 0 turns −0 into 0.
    keys = _flip((scores + 0.0).view(_INTEGER[scores.dtype]))
    return keys.masked_fill_(scores.isnan(), torch.iinfo(keys.dtype).max)


def scores_of(keys: Tensor) -> Tensor:
    """The scores that `order_keys` came from; −inf for the key of a missing item."""
    missing = keys == absent(keys.dtype)
    return _flip(keys).view(_FLOAT[keys.dtype]).masked_fill_(missing, float("-inf"))


def leading(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest keys of every row of (R, C) and their columns, equal keys by the lower column; k at most C.

    Scores will do as keys if no row's k-th is −inf and none is NaN.

    torch.topk does not say which of equal entries it takes, nor in which order it gives them. Only where the k-th and
    the next are equal can it have taken the wrong ones: those rows are sorted whole. Rows that hold equal entries
    elsewhere are put in order; most rows hold none.
    """
    if k == keys.shape[1]:
        ordered, columns = keys.sort(dim=1, descending=True, stable=True)
        return ordered, columns
    found, columns = keys.topk(k + 1, dim=1)
    undecided = found[:, k - 1] == found[:, k]
    found, columns = found[:, :k], columns[:, :k]
    tied = found[:, 1:] == found[:, :-1]
    if not keys.is_floating_point():
        # Absent entries have no order among themselves.
        there = found != absent(keys.dtype)
        undecided &= there[:, -1:].any(dim=1)
        tied &= there[:, 1:]
    undecided, tied = undecided.nonzero()[:, 0], tied.any(dim=1).nonzero()[:, 0]
    if tied.numel():
        ascending = columns[tied].sort(dim=1).values
        found[tied], order = keys[tied].gather(1, ascending).sort(dim=1, descending=True, stable=True)
        columns[tied] = ascending.gather(1, order)
    if undecided.numel():
        ordered, places = keys[undecided].sort(dim=1, descending=True, stable=True)
        found[undecided], columns[undecided] = ordered[:, :k], places[:, :k]
    return found, columns


def merge(keys: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k leading entries of lists laid side by side, (R, L): equal keys must lie in the order of their indices.

    Unlike `leading` it reads no value on the host: a kernel's search stays asynchronous, and can be captured.
    """
    keys, order = keys.sort(dim=1, descending=True, stable=True)
    return keys[:, :k], indices.gather(1, order[:, :k])


def places(row: Tensor, counts: Tensor) -> Tensor:
    """The place of each entry in its row; the entries lie in order of `row`, `counts` of them in each."""
    return torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row]


#: Merging lists takes as much memory a place as this many scores of a strip.
ARRAYS_PER_PLACE = 4


@dataclass
class Lists:
    """The k best items of every query so far: order keys and indices (Q, k), best first."""

    keys: Tensor
    indices: Tensor

    @classmethod
    def empty(cls, Q: int, k: int, dtype: torch.dtype, device: torch.device) -> Lists:
        integer = key_dtype(dtype)
        keys = torch.full((Q, k), absent(integer), dtype=integer, device=device)
        return cls(keys, torch.full((Q, k), -1, dtype=torch.int64, device=device))

    def strips(self, width: int) -> Iterator[slice]:
        """Queries, a few at a time, as `strip_rows` has it."""
        return slices(0, self.keys.shape[0], strip_rows(width, self.keys.itemsize, self.keys.device.type))

    def result(self) -> tuple[Tensor, Tensor]:
        """(values, indices), in the lists' place; −inf and −1 where too few items may be ranked."""
        values = self.keys.view(_FLOAT[self.keys.dtype])
        for rows in self.strips(self.keys.shape[1]):
            self.indices[rows].masked_fill_(self.keys[rows] == absent(self.keys.dtype), -1)
            values[rows] = scores_of(self.keys[rows])
        return values, self.indices

    def add(self, rows: slice, keys: Tensor, indices: Tensor, among: Tensor | None = None) -> None:
        """Merge further lists, all of later items, into these rows, or into the rows `among` these."""
        at = rows if among is None else among + rows.start
        k = self.keys.shape[1]
        self.keys[at], self.indices[at] = merge(
            torch.cat((self.keys[at], keys), dim=1), torch.cat((self.indices[at], indices), dim=1), k
        )
