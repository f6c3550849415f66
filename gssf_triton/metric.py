"""The metric as a value, and the form of the rows that it folds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


# Not a NamedTuple: torch 2.8 cannot trace the properties of one.
@dataclass(frozen=True, eq=False)
class Metric:
    """W_diag (D,) and W_blocks (G, B, B), each of them a tensor or None; both None is the identity."""

    W_diag: Tensor | None = None
    W_blocks: Tensor | None = None

    @property
    def block_size(self) -> int:
        """B, or 0 without a block term."""
        return 0 if self.W_blocks is None else self.W_blocks.shape[-1]

    @property
    def is_identity(self) -> bool:
        return self.W_diag is None and self.W_blocks is None

    @property
    def mT(self) -> Metric:
        """The metric seen from the other side: s(x, y) with x and y swapped."""
        return Metric(self.W_diag, None if self.W_blocks is None else self.W_blocks.mT)

    def map(self, change: Callable[[Tensor], Tensor]) -> Metric:
        """The metric with `change` applied to each weight."""
        return Metric(*(None if w is None else change(w) for w in (self.W_diag, self.W_blocks)))


#: The metric of rows that are folded already.
IDENTITY = Metric()


def as_rows(x: Tensor) -> Tensor:
    """x (..., D) as one matrix of rows. The number of rows is computed: −1 would fail for D = 0."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over `dtype` are kept in: float32 at least. Not float64, which some devices lack."""
    return torch.float64 if dtype == torch.float64 else torch.float32
