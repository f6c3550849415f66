"""How large a chunk of S is: the tuner's choice, within a constant budget, so that memory grows with M + N alone."""

from __future__ import annotations

import torch

from gssf_triton.kernels import choice
from gssf_triton.kernels.configs import CHUNK_BUDGET, TORCH_CHUNK_ARRAYS, ChunkConfig, chunk_config
from gssf_triton.metric import accumulate_dtype

#: S is stored if it is as large as this many chunks at most: on a CPU 1,024 × 1,024, which a loss takes 2 to 8 arrays
#: of 4 MiB for in float32.
STORED_CHUNKS = 2


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
        ChunkConfig(rows, columns): a measured one, or 512 × 1024 on a CPU and 16384 × 32768 on a GPU.

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
    """Rows and columns of S (M, N) that are held at a time, by a loop that holds `entry_bytes` an entry of a chunk.

    On a GPU that may be as much as its products with both sides, (M, D) and (N, D), take: more than the budget.
    """
    chosen = stream_chunk(M, N, D, dtype, device)
    rows, columns = min(chosen.rows, max(M, 1)), min(chosen.columns, max(N, 1))
    budget = CHUNK_BUDGET["cpu" if device.type == "cpu" else "cuda"]
    if device.type != "cpu":
        budget = max(budget, (M + N) * D * accumulate_dtype(dtype).itemsize)
    while rows * columns * entry_bytes > budget:
        rows, columns = (rows, -(-columns // 2)) if columns >= rows else (-(-rows // 2), columns)
    return rows, columns


def is_stored(M: int | torch.SymInt, N: int | torch.SymInt, D: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether S (M, N) is small enough to be stored, so that the backward pass need not compute it again.

    Only torch's engine stores it. The kernel does not: at the bandwidth of a GPU's memory it is faster to multiply
    again below 2,900 channels (see perf/NOTES.md).
    """
    # Traced sizes are not compared: that would be a guard.
    if torch.compiler.is_compiling() or isinstance(M, torch.SymInt) or isinstance(N, torch.SymInt):
        return False
    chunk = stream_chunk(M, N, D, dtype, device)
    held = CHUNK_BUDGET["cpu" if device.type == "cpu" else "cuda"] // (TORCH_CHUNK_ARRAYS * dtype.itemsize)
    return bool(STORED_CHUNKS * min(chunk.rows * chunk.columns, held) >= M * N)
