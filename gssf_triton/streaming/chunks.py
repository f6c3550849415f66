"""How large a chunk of S is: the tuner's choice, within a constant budget, so that memory grows with M + N alone."""

from __future__ import annotations

import torch

from gssf_triton.kernels import choice
from gssf_triton.kernels.configs import CHUNK_BUDGET, ChunkConfig, chunk_config


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
        ChunkConfig(rows, columns): a measured one, or 512 × 1024 on a CPU and 4096 × 16384 on a GPU.

    Example:
        >>> import torch
        >>> from gssf_triton.streaming.chunks import stream_chunk
        >>> chunk = stream_chunk(20_000, 20_000, 77, torch.float32, torch.device("cpu"))
        >>> chunk.rows > 0 and chunk.columns > 0
        True
    """
    if torch.compiler.is_compiling():
        return chunk_config(device.type)
    return choice.choose("chunk", device, dtype, M, N, D)


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
