"""Sizes of retrieval: the chunks the torch backend streams and the kernels' tiles, from pure functions of the shape.

Both are chosen without looking at k, so that `topk` and `ranks` compute every score by the same instructions and agree
on its last bit. Like the rest of `configs` the tiles rest on the compile gate and have not been timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gssf_triton.kernels.configs import is_small_memory

#: Chunks are this many columns wide, or a multiple of it: whole tiles of every library's product.
COLUMN_STEP = 64

#: Retrieval's tile is chosen for this many queries and items, whatever their number: a score must have the same bits in
#: `topk` and in `ranks`, in a batch of queries and in one, in a whole gallery and in a shard of it.
RANKED_ROWS = 1024, 65_536

#: The longest list a program of the top-k kernel keeps in its registers; longer ones are chosen from chunks of S.
LARGEST_KERNEL_K = 64

#: Of a query with more matches than this all items are sorted, rather than each looked up among the matches. On a CPU
#: the latter takes half of a plain sort's time with 4 matches, and four times as long with 2,000.
FEW_MATCHES = 8
#: NumPy sorts whole numbers in half of torch's time, but in one thread.
NUMPY_SORT_THREADS = 2


#: Bytes of scores that are held at once, by device type, where a chunk is not larger by itself.
SCORE_BYTES = {"cpu": 48 << 20, "cuda": 128 << 20}
#: Bytes that are made of a chunk's scores at a time, by device type, and arrays an entry: they bound the memory.
STRIP_BYTES, STRIP_ARRAYS = {"cpu": 8 << 20, "cuda": 64 << 20}, 4


@dataclass(frozen=True)
class StreamChunks:
    """`rows` queries meet `columns` gallery items at a time; a gallery on disk is read `block_rows` rows at a time."""

    rows: int
    columns: int
    block_rows: int


@dataclass(frozen=True)
class RetrievalConfig:
    """Tile of scores [BLOCK_M, BLOCK_N], BLOCK_K channels a step; a row of them is cut into at most `max_spans` spans.

    `programs` is what the spans are to add up to: enough to fill the largest GPU a few times over.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    max_spans: int = 64
    programs: int = 1024

    def spans(self, row_tiles: int, column_tiles: int) -> int:
        """How many programs share the column tiles of one row tile."""
        wanted = -(-self.programs // max(row_tiles, 1))
        return max(1, min(wanted, self.max_spans, column_tiles))


def chunk_scores(device_type: str) -> int:
    """How many scores a chunk holds: 32 MiB on a CPU in float64, 128 MiB on a GPU."""
    return 1 << 22 if device_type == "cpu" else 1 << 24


def chunks_held(chunk_bytes: int, device_type: str) -> int:
    """How many chunks' scores may be held at once."""
    return max(1, SCORE_BYTES["cpu" if device_type == "cpu" else "cuda"] // max(chunk_bytes, 1))


def strip_rows(width: int, itemsize: int, device_type: str) -> int:
    """How many rows of scores are looked through at a time, each with the memory of STRIP_ARRAYS · width scores.

    A chunk is as large as its product needs. What is made of it (order keys, masks, indices) need not be.
    """
    return max(1, STRIP_BYTES["cpu" if device_type == "cpu" else "cuda"] // (STRIP_ARRAYS * max(width, 1) * itemsize))


def stream_chunks(Q: int, N: int, D: int, itemsize: int, device_type: str) -> StreamChunks:
    """Chunks for Q queries against N items over D channels.

    A chunk of scores of 16 MiB is large enough for the product to run at the library's full rate and small enough to
    be looked through from cache; few queries take a longer run of the gallery at a time. All chunks are equally wide,
    to within COLUMN_STEP: the last one is filled up to the others' width, which should cost little.
    """
    rows, scores = 1024 if device_type == "cpu" else 4096, chunk_scores(device_type)
    widest = min(max(scores // max(min(Q, rows), 1), 4096), 1 << 16)
    count = max(1, -(-N // widest))
    columns = max(1, -(-N // (count * COLUMN_STEP))) * COLUMN_STEP
    # 32 MiB of a gallery on disk at a time, whole chunks of it; on a GPU enough to hide the transfer's latency.
    block_bytes = (32 << 20) if device_type == "cpu" else (256 << 20)
    chunks = max(1, block_bytes // (columns * max(D, 1) * itemsize))
    return StreamChunks(rows, columns, columns * chunks)


def sorted_rows(N: int, device_type: str) -> int:
    """How many queries' N items are sorted at a time: as many scores as a chunk has, products of 16 rows at least."""
    return max(16, chunk_scores(device_type) // max(N, 1))


def padded_k(k: int) -> int:
    """The list's length in the top-k kernel: a power of two."""
    return 1 << (k - 1).bit_length() if k else 1


def retrieval_config(dtype: torch.dtype, arch: str, precision: str) -> RetrievalConfig:
    """The tile of the top-k and rank kernels over folded queries, multiplied in `precision` (`dot_precision`).

    Keys of 64 bits, and the addresses of a mask, take the registers that a larger tile would need.
    """
    if arch == "interpreter":
        return RetrievalConfig(32, 32, 32, num_warps=4, num_stages=1, max_spans=3, programs=4)
    if dtype == torch.float32:
        exact = precision == "ieee" and arch.startswith("sm_")
        columns = 32 if exact and arch.startswith("sm_9") else 64
        return RetrievalConfig(32 if exact else 64, columns, 32, num_warps=8, num_stages=2)
    if is_small_memory(arch):
        return RetrievalConfig(64, 64, 32, num_warps=4, num_stages=2)
    return RetrievalConfig(64, 32 if arch.startswith("sm_10") else 64, 64, num_warps=8, num_stages=3)
