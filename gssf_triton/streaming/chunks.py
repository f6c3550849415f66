"""How large a chunk of S is: the tuner's choice, within a constant budget, so that memory grows with M + N alone."""

from __future__ import annotations

import torch

from gssf_triton.autotune.chunk import stream_chunk
from gssf_triton.kernels.configs import CHUNK_BUDGET


def chunk_shape(
    M: int, N: int, D: int, dtype: torch.dtype, device: torch.device, *, entry_bytes: int
) -> tuple[int, int]:
    """Rows and columns of S (M, N) that are held at a time, by a loop that holds `entry_bytes` an entry of a chunk."""
    chosen = stream_chunk(M, N, D, dtype, device)
    rows, columns = min(chosen.rows, max(M, 1)), min(chosen.columns, max(N, 1))
    budget = CHUNK_BUDGET["cpu" if device.type == "cpu" else "cuda"]
    while rows * columns * entry_bytes > budget:
        rows, columns = (rows, -(-columns // 2)) if columns >= rows else (-(-rows // 2), columns)
    return rows, columns
