"""The chunk of S that the streaming losses hold at a time."""

from __future__ import annotations

from typing import cast

import torch

from gssf_triton.autotune import lookup
from gssf_triton.kernels.configs import ChunkConfig, chunk_config


def stream_chunk(M: int, N: int, D: int, dtype: torch.dtype, device: torch.device) -> ChunkConfig:
    """Rows and columns of S (M, N) to compute at a time, for features of D channels.

    The chunk may be larger than S; take the smaller of both. A CPU's is looked up by its number of threads,
    `torch.get_num_threads()`. Under torch.compile, which cannot trace a look into a file, it is the model's.

    Args:
        M: Rows of S.
        N: Columns of S.
        D: Channels.
        dtype: The features' dtype: float16, bfloat16, float32 or float64.
        device: Where the features lie.

    Returns:
        ChunkConfig(rows, columns): a table's, or 512 × 1024 on a CPU and 4096 × 16384 on a GPU.

    Example:
        >>> import torch
        >>> from gssf_triton.autotune.chunk import stream_chunk
        >>> chunk = stream_chunk(20_000, 20_000, 77, torch.float32, torch.device("cpu"))
        >>> chunk.rows > 0 and chunk.columns > 0
        True
    """
    if torch.compiler.is_compiling():
        return chunk_config(device.type)
    return cast(ChunkConfig, lookup.choose("chunk", device, dtype, M, N, D, 0))
