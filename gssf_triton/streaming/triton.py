"""The host's part of the streaming kernel: tiles merged to chunks, and products with the slopes that it stores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from gssf_triton import kernels
from gssf_triton.kernels.configs import TRITON_CHUNK_ARRAYS
from gssf_triton.kernels.stream_values import Epilogue, Kept, Merge, Operands
from gssf_triton.metric import IDENTITY


def merge_tiles(merge: Merge, states: Tensor | None) -> Tensor | None:
    """(outputs, tiles, length) as one state (outputs, length): neighbours are merged, then pairs of them, and so on."""
    if states is None:
        return None
    while states.shape[1] > 1:
        even = states.shape[1] // 2 * 2
        merged = merge(states[:, 0:even:2], states[:, 1:even:2])
        states = torch.cat((merged, states[:, even:]), dim=1)
    return states[:, 0]


@dataclass(frozen=True)
class TritonEngine:
    """Chunks by `stream_kernel`, which stores slopes alone; half-precision operands have half-precision slopes."""

    ARRAYS: ClassVar[int] = TRITON_CHUNK_ARRAYS

    x: Operands
    epilogue: Epilogue
    wants_slope: bool

    def chunk(self, rows: slice, columns: slice) -> Kept:
        # The tile is chosen by all of S: equal rows must have equal similarities in the last chunk, too.
        whole = self.x.t.shape[0], self.x.y.shape[0]
        kept = kernels.stream.stream(self.x.chunk(rows, columns), self.epilogue, self.wants_slope, whole)
        return Kept(
            merge_tiles(self.epilogue.merge, kept.rows),
            merge_tiles(self.epilogue.merge, kept.columns),
            None if kept.totals is None else kept.totals.sum(1),
            kept.slope,
        )

    @staticmethod
    def add_product(out: Tensor, p: Tensor, x: Tensor) -> None:
        if p.dtype == out.dtype:
            out.addmm_(p, x)
            return
        alpha = 1 / kernels.stream.slope_scale(p.dtype)
        if adds_halves_in_float32(p.dtype, out.dtype, p.device):
            torch.addmm(out, p, x, alpha=alpha, out_dtype=out.dtype, out=out)
            return
        # This library would round a half-precision product to half precision before it is added. Ours takes whole steps
        # of the sum alone, which need no masks: what is left of a batch would be another kernel for every kind of size.
        longest = kernels.launch.LONGEST_STEP
        steps = p.shape[1] // longest * longest
        if steps:
            product = torch.empty((1, *out.shape), dtype=out.dtype, device=out.device)
            kernels.pairwise.pairwise(p[None, :, :steps], x[:steps].mT[None], IDENTITY, False, product)
            out.add_(product[0], alpha=alpha)
        out.addmm_(p[:, steps:].to(out.dtype), x[steps:].to(out.dtype), alpha=alpha)


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
