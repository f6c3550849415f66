"""Random tensors of a cell, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _cells import DTYPES, Cell
from torch import Tensor

#: normal(*size, scale=…, mean=…)
Normal = Callable[..., Tensor]


def normal_for(cell: Cell, device: torch.device, generator: torch.Generator) -> Normal:
    """What draws this cell's tensors."""

    def normal(*size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        drawn = torch.randn(size, generator=generator, device=device)
        return drawn.mul_(scale).add_(mean).to(DTYPES[cell.dtype])

    return normal


def metric_for(cell: Cell, normal: Normal) -> dict[str, Tensor]:
    """A metric around the identity."""
    s = cell.shape
    return {
        "W_diag": normal(s.D, scale=0.3, mean=1.0),
        "W_blocks": normal(s.D // s.B, s.B, s.B, scale=s.B**-0.5),
    }
