"""The kernels that are tuned: what a result is filed under (`Key`), and what a configuration may be (`Space`).

M and N of a key come in buckets, powers of two, so that a table stays a page long whatever sizes a program meets; D and
B are a model's own and stay as they are. A table holds nothing outside its kernel's space, so that a file cannot
make a kernel launch with a tile it does not take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from reprlib import repr as shown
from typing import Any

import torch

from gssf_triton.kernels.choice import Call, Config
from gssf_triton.kernels.configs import (
    CROSS_ATTENTION_REGIONS,
    CROSS_ATTENTION_WORDS,
    MIN_DOT,
    ChunkConfig,
    CrossAttentionConfig,
    FoldConfig,
    GradientConfig,
    LateInteractionConfig,
    PairwiseConfig,
    cross_attention_fits,
    padded_block,
)
from gssf_triton.kernels.plans import FOLDS, PLANS, PlanChoice
from gssf_triton.kernels.retrieval_configs import RANKED_ROWS, RetrievalConfig

# ---------------------------------------------------------------------------------------------------------------- keys

#: Numerics → the features' dtype. float32 multiplies exactly or in TF32.
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp64": torch.float64,
}
NUMERICS = tuple(DTYPES)
#: Numerics that share tuned configurations: only the bits of a number differ.
_ALIKE = {"bf16", "fp16"}

#: Kernels whose programs own rows alone: their keys have N = 0.
ROW_KERNELS = ("fold", "paired")
#: Kernels whose keys may have N = 0: the gradient of the fold alone has no product.
WITHOUT_COLUMNS = (*ROW_KERNELS, "gradient")
#: The losses' kernel, with one similarity and with a teacher's beside it.
STREAM_KERNELS = ("stream", "stream_teacher")
#: Kernels whose M and N are the regions of an image and the words of a caption, padded to what a tile must hold.
PAIR_KERNELS = ("late_interaction", "cross_attention")
#: The farthest neighbour to take a configuration from, in doublings: beyond, the model knows better.
FARTHEST = 4.0
#: What a doubling of D counts, and another dtype or a block padded to the same size.
CHANNEL_WEIGHT = DIFFERENCE = 0.5


def numerics(dtype: torch.dtype, tf32: bool) -> str:
    """The numerics of products of `dtype`; `tf32`: float32 may round to TF32."""
    return "tf32" if tf32 and dtype == torch.float32 else next(name for name in NUMERICS if DTYPES[name] == dtype)


def bucket(rows: float) -> int:
    """The power of two nearest to `rows` by ratio; 0 stays 0.

    Example:
        >>> from gssf_triton.autotune.space import bucket
        >>> [bucket(n) for n in (0, 1, 3, 90, 91, 8192, 10**6)]
        [0, 1, 4, 64, 128, 8192, 1048576]
    """
    return 2 ** round(math.log2(rows)) if rows >= 1 else 0


@dataclass(frozen=True, order=True)
class Key:
    """What an entry of a table is filed under."""

    kernel: str
    dtype: str
    D: int
    B: int
    M: int
    N: int

    def call(self, where: torch.device | str = "cuda") -> Call:
        """A call of just this shape."""
        sizes = self.M, self.N, self.D, self.B
        return Call(self.kernel, torch.device(where), DTYPES[self.dtype], self.dtype == "tf32", *sizes)

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
    return Key(kernel, dtype, D, B, bucket(M * scale), 0 if kernel in ROW_KERNELS else bucket(N * scale))


def distance(wanted: Key, other: Key) -> float | None:
    """How unlike two keys are, in doublings; None where one's configuration is no guide to the other's.

    Blocks must pad to the same size: the kernel's code, registers and shared memory depend on it.
    """
    if wanted.kernel != other.kernel or padded_block(wanted.B) != padded_block(other.B):
        return None
    if wanted.dtype != other.dtype and {wanted.dtype, other.dtype} != _ALIKE:
        return None
    total = DIFFERENCE * ((wanted.dtype != other.dtype) + (wanted.B != other.B))
    for mine, theirs, weight in (
        (wanted.M, other.M, 1.0),
        (wanted.N, other.N, 1.0),
        (wanted.D, other.D, CHANNEL_WEIGHT),
    ):
        if mine != theirs:
            if not mine or not theirs:
                return None
            total += weight * abs(math.log2(mine / theirs))
    return total if total <= FARTHEST else None


# -------------------------------------------------------------------------------------------------------------- spaces


@dataclass(frozen=True)
class Space:
    """Every field of a configuration class with the values it may take, and what they must satisfy with the key."""

    config: type
    values: Mapping[str, tuple[Any, ...]]
    fits_key: Callable[[Any, Key], bool]

    def all(self, key: Key) -> Iterator[Config]:
        """Every legal configuration for `key`, in a fixed order."""
        for values in product(*self.values.values()):
            config = self.config(**dict(zip(self.values, values, strict=True)))
            if self.fits_key(config, key):
                yield config


def _gradient_fits(config: GradientConfig, key: Key) -> bool:
    """A program owns whole blocks, and its epilogue walks them in whole steps."""
    return padded_block(key.B) <= config.BLOCK_C and config.BLOCK_C % config.BLOCK_P == 0


def _late_interaction_fits(config: LateInteractionConfig, key: Key) -> bool:
    """As many columns as a dot takes, of words that a caption may have."""
    return config.CAPTIONS * config.WORDS >= MIN_DOT and min(8, key.N) <= config.WORDS <= key.N


def _cross_attention_fits(config: CrossAttentionConfig, key: Key) -> bool:
    """A tile holds all of a pair: its rows and words are the key's own."""
    if not cross_attention_fits(key.M, key.N):
        return False
    return (config.BLOCK_M, config.WORDS) == (key.M, key.N) and config.CAPTIONS * config.WORDS >= MIN_DOT


def _space(config: type, fits: Callable[[Any, Key], bool] = lambda *_: True, **values: tuple[Any, ...]) -> Space:
    return Space(config, values, fits)


_SIDES, _STEPS, _WARPS, _STAGES = (32, 64, 128, 256), (16, 32, 64), (4, 8), (1, 2, 3, 4)
_TILE = _space(
    PairwiseConfig,
    BLOCK_M=_SIDES, BLOCK_N=_SIDES, BLOCK_K=(*_STEPS, 128), num_warps=_WARPS, num_stages=_STAGES, GROUP_M=(2, 4, 8, 16),
)  # fmt: skip
_ROWS = _space(
    FoldConfig,
    BLOCK_M=(16, 32, 64, 128), BLOCK_K=_STEPS, num_warps=_WARPS, num_stages=(1, 2, 3), column_programs=(1, 2, 4, 8, 16),
)  # fmt: skip

#: Kernel → space. "product" is the one-pass kernel with nothing to fold, "terms" with an accumulator for each term;
#: "stream_teacher" the streaming kernel with a second similarity; "ranked" the tile of `topk` and of `ranks`.
SPACES: dict[str, Space] = {
    "pairwise": _TILE,
    "product": _TILE,
    "terms": _TILE,
    "fold": _ROWS,
    # A program owns whole rows.
    "paired": replace(_ROWS, values={**_ROWS.values, "column_programs": (2, 8)}),
    "gradient": _space(
        GradientConfig, _gradient_fits,
        BLOCK_M=_STEPS, BLOCK_N=(32, 64), BLOCK_C=_SIDES, BLOCK_P=(16, 32), num_warps=_WARPS, num_stages=(1, 2),
        max_splits=(2, 16, 32, 64), rows_apart=(False, True),
    ),
    "plan": _space(PlanChoice, kind=PLANS, fold=FOLDS),
    # The product is in the gradient kernel or the library's; which side is folded depends on which gradient it is.
    "gradient_plan": _space(PlanChoice, kind=PLANS, fold=("fewer",)),
    # A budget bounds how large a chunk may be (`model.fits`).
    "chunk": _space(
        ChunkConfig,
        rows=(256, 512, 1024, 2048, 4096, 8192, 16384), columns=(1024, 2048, 4096, 8192, 16384, 32768),
    ),
    "stream": _TILE,
    "stream_teacher": _TILE,
    "ranked": _space(
        RetrievalConfig,
        BLOCK_M=(32, 64, 128), BLOCK_N=(32, 64, 128), BLOCK_K=(32, 64), num_warps=_WARPS, num_stages=_STAGES,
        max_spans=(3, 32, 64, 128), programs=(4, 512, 1024, 2048),
    ),
    "late_interaction": _space(
        LateInteractionConfig, _late_interaction_fits,
        BLOCK_M=(32, 64), CAPTIONS=(1, 2, 4, 8, 16, 32, 64), WORDS=(1, 2, 4, 8, 16, 32), BLOCK_K=_STEPS,
        num_warps=_WARPS, num_stages=(1, 2, 3), GROUP_M=(2, 8),
    ),
    "cross_attention": _space(
        CrossAttentionConfig, _cross_attention_fits,
        BLOCK_M=tuple(2**n for n in range(4, CROSS_ATTENTION_REGIONS.bit_length())),
        CAPTIONS=(1, 2, 4, 8, 16, 32, 64, 128),
        WORDS=tuple(2**n for n in range(CROSS_ATTENTION_WORDS.bit_length())),
        BLOCK_K=_STEPS, num_warps=_WARPS, num_stages=(1, 2, 3),
    ),
}  # fmt: skip


def parse_config(kernel: str, values: object, key: Key) -> Config:
    """The configuration that `values`, as JSON gives them, describe.

    Raises:
        ValueError: a field that is missing, unknown, of another type or outside the space, or a tile that does not go
            with the key.
    """
    space = SPACES[kernel]
    if not isinstance(values, dict):
        raise ValueError(f"config must be an object, got {shown(values)}")
    names = [field.name for field in fields(space.config)]
    if sorted(values) != sorted(names):
        raise ValueError(f"config of {kernel} must have the fields {', '.join(names)}, got {', '.join(sorted(values))}")
    for name, value in values.items():
        # By type too: True == 1, and 4.0 == 4.
        if not any(type(value) is type(known) and value == known for known in space.values[name]):
            raise ValueError(f"{name} of {kernel} must be one of {space.values[name]}, got {shown(value)}")
    config: Config = space.config(**values)
    if not space.fits_key(config, key):
        raise ValueError(f"{config} is no legal tile for {key}")
    return config
