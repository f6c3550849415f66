"""How large a chunk of S is: constant, so that memory grows with M + N alone."""

from __future__ import annotations

import torch

#: (rows, columns). On a CPU a chunk and what the epilogue makes of it mostly stay within the caches (2 MiB each in
#: float32): InfoNCE at 4,096 pairs of 256 channels ran fastest so, of 256 to 1,024 rows by 1,024 to 4,096 columns. On
#: a GPU the slope's half-precision chunk is 128 MiB and large enough for the library's products to run at full rate.
CPU_CHUNK = (512, 1024)
GPU_CHUNK = (4096, 16384)


def chunk_shape(M: int, N: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Rows and columns of S that are held at a time."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
