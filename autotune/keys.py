"""What a tuned configuration is filed under, and which of the others is its nearest neighbour.

M and N come in buckets, powers of two, so that a table stays a page long whatever sizes a program meets; D and B are a
model's own and stay as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gssf_triton.kernels.configs import MIN_DOT, padded_block

#: Names of the numerics that kernels differ in: float32 multiplies exactly or in TF32.
NUMERICS = ("bf16", "fp16", "fp32", "tf32", "fp64")
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
#: Numerics whose configurations may stand in for each other: only the bits of a number differ.
_ALIKE = ({"bf16", "fp16"},)

#: Kernels whose programs own rows alone: their keys have N = 0.
ROW_KERNELS = ("fold", "paired")
#: Kernels whose keys may have N = 0: the gradient of the fold alone has no product.
WITHOUT_COLUMNS = (*ROW_KERNELS, "gradient")
#: The losses' kernel, with one similarity and with a teacher's beside it.
STREAM_KERNELS = ("stream", "stream_teacher")
#: Kernels whose M and N are the regions of an image and the words of a caption, padded to what a tile must hold.
PAIR_KERNELS = ("late_interaction", "cross_attention")
#: Retrieval's tile is filed under one size, Q queries and N items: a score must have the same bits in `topk` and in
#: `ranks`, in a batch of queries and in one, in a whole gallery and in a shard of it.
RANKED_ROWS = 1024, 65_536
#: How far a neighbour may be, in doublings: beyond, the model knows better.
FARTHEST = 4.0
#: What a doubling of D counts, and a dtype or a block padded to the same size.
CHANNEL_WEIGHT = 0.5
DIFFERENCE = 0.5


def numerics(dtype: torch.dtype, tf32: bool | None = None) -> str:
    """The numerics of products of `dtype`; `tf32` as torch's setting has it where None."""
    if dtype == torch.float32:
        if tf32 is None:
            tf32 = torch.get_float32_matmul_precision() != "highest"
        return "tf32" if tf32 else "fp32"
    return _NAMES[dtype]


def dtype_of(numerics: str) -> torch.dtype:
    """The features' dtype."""
    return _DTYPES.get(numerics, torch.float32)


def bucket(rows: float) -> int:
    """The power of two nearest to `rows` by ratio; 0 stays 0.

    Example:
        >>> from gssf_triton.autotune.keys import bucket
        >>> [bucket(n) for n in (0, 1, 3, 90, 91, 8192, 10**6)]
        [0, 1, 4, 64, 128, 8192, 1048576]
    """
    return 2 ** round(math.log2(rows)) if rows >= 1 else 0


@dataclass(frozen=True, order=True)
class Key:
    """One line of a table; its device is the table's."""

    kernel: str
    dtype: str
    D: int
    B: int
    M: int
    N: int

    def __str__(self) -> str:
        rows = f"M={self.M}" if self.kernel in ROW_KERNELS else f"M={self.M} N={self.N}"
        return f"{self.kernel} {self.dtype} {rows} D={self.D} B={self.B}"


def make_key(kernel: str, dtype: str, M: int, N: int, D: int, B: int, batch: int = 1) -> Key:
    """The key of a call. A batch of matrices is filed as one of as many entries and of the same proportions."""
    if kernel in PAIR_KERNELS:
        return Key(kernel, dtype, D, B, max(padded_block(M), MIN_DOT), padded_block(N))
    if kernel == "ranked":
        M, N = RANKED_ROWS
    scale = math.sqrt(batch)
    columns = 0 if kernel in ROW_KERNELS else bucket(N * scale)
    return Key(kernel, dtype, D, B, bucket(M * scale), columns)


def distance(wanted: Key, other: Key) -> float | None:
    """How unlike two keys are, in doublings; None where one's configuration says nothing about the other's.

    Blocks must pad to the same size: the kernel's code, registers and shared memory depend on it.
    """
    if wanted.kernel != other.kernel or padded_block(wanted.B) != padded_block(other.B):
        return None
    if wanted.dtype != other.dtype and {wanted.dtype, other.dtype} not in _ALIKE:
        return None
    total = DIFFERENCE * ((wanted.dtype != other.dtype) + (wanted.B != other.B))
    for mine, theirs, weight in (
        (wanted.M, other.M, 1.0),
        (wanted.N, other.N, 1.0),
        (wanted.D, other.D, CHANNEL_WEIGHT),
    ):
        if mine == theirs:
            continue
        if not mine or not theirs:
            return None
        total += weight * abs(math.log2(mine / theirs))
    return total if total <= FARTHEST else None
