"""The search space of each kernel, as data, and what makes a configuration legal there.

A table may hold nothing that is not in its kernel's space: whatever a file says, a launch is a tile the kernel takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from reprlib import repr as shown
from typing import Any

from gssf_triton.autotune.keys import Key
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
from gssf_triton.kernels.retrieval_configs import RetrievalConfig

Config = (
    PairwiseConfig
    | FoldConfig
    | GradientConfig
    | ChunkConfig
    | PlanChoice
    | RetrievalConfig
    | LateInteractionConfig
    | CrossAttentionConfig
)


def _anything(config: Any, key: Key) -> bool:
    return True


@dataclass(frozen=True)
class Space:
    """Every field of a configuration class with the values it may take.

    Attributes:
        config: The configuration's class.
        values: Field → values.
        fits_key: What the fields must satisfy together, and with the key.
        is_deterministic: Whether the same call gives the same bits with this configuration. No kernel adds in an order
            that is left to chance, so all do today; the look-up and the tuner ask all the same.
    """

    config: type
    values: Mapping[str, tuple[Any, ...]]
    fits_key: Callable[[Any, Key], bool] = _anything
    is_deterministic: Callable[[Any], bool] = lambda config: True

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
    """All of a pair in a tile, whose rows and words are therefore the key's own."""
    if not cross_attention_fits(key.M, key.N):
        return False
    return (config.BLOCK_M, config.WORDS) == (key.M, key.N) and config.CAPTIONS * config.WORDS >= MIN_DOT


_TILE = Space(
    PairwiseConfig,
    {
        "BLOCK_M": (32, 64, 128, 256),
        "BLOCK_N": (32, 64, 128, 256),
        "BLOCK_K": (16, 32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3, 4),
        "GROUP_M": (2, 4, 8, 16),
    },
)
_ROWS = Space(
    FoldConfig,
    {
        "BLOCK_M": (16, 32, 64, 128),
        "BLOCK_K": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
        "column_programs": (1, 2, 4, 8, 16),
    },
)
#: A program of the matched-pairs kernel owns whole rows.
_PAIRS = Space(FoldConfig, {**_ROWS.values, "column_programs": (2, 8)})
_GRADIENT = Space(
    GradientConfig,
    {
        "BLOCK_M": (16, 32, 64),
        "BLOCK_N": (32, 64),
        "BLOCK_C": (32, 64, 128, 256),
        "BLOCK_P": (16, 32),
        "num_warps": (4, 8),
        "num_stages": (1, 2),
        "max_splits": (2, 16, 32, 64),
        "rows_apart": (False, True),
    },
    _gradient_fits,
)
_PLAN = Space(PlanChoice, {"kind": PLANS, "fold": FOLDS})
#: The gradient's product is in its kernel or the library's; what is folded is settled by which gradient it is.
_GRADIENT_PLAN = Space(PlanChoice, {"kind": ("one_pass", "fold_product"), "fold": ("fewer",)})
#: How large a chunk may be is the budget's word (`model.fits`).
_CHUNK = Space(
    ChunkConfig,
    {"rows": (256, 512, 1024, 2048, 4096, 8192), "columns": (1024, 2048, 4096, 8192, 16384, 32768)},
)
_RANKED = Space(
    RetrievalConfig,
    {
        "BLOCK_M": (32, 64, 128),
        "BLOCK_N": (32, 64, 128),
        "BLOCK_K": (32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3, 4),
        "max_spans": (3, 32, 64, 128),
        "programs": (4, 512, 1024, 2048),
    },
)
_LATE_INTERACTION = Space(
    LateInteractionConfig,
    {
        "BLOCK_M": (32, 64),
        "CAPTIONS": (1, 2, 4, 8, 16, 32, 64),
        "WORDS": (1, 2, 4, 8, 16, 32),
        "BLOCK_K": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
        "GROUP_M": (2, 8),
    },
    _late_interaction_fits,
)
_CROSS_ATTENTION = Space(
    CrossAttentionConfig,
    {
        "BLOCK_M": tuple(2**n for n in range(4, CROSS_ATTENTION_REGIONS.bit_length())),
        "CAPTIONS": (1, 2, 4, 8, 16, 32, 64, 128),
        "WORDS": tuple(2**n for n in range(CROSS_ATTENTION_WORDS.bit_length())),
        "BLOCK_K": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
    _cross_attention_fits,
)

#: Kernel → space. "product" is the one-pass kernel with nothing to fold, "terms" with an accumulator for each term;
#: "stream_teacher" the streaming kernel with a second similarity; "ranked" what `topk` and `ranks` have in common.
SPACES: dict[str, Space] = {
    "pairwise": _TILE,
    "product": _TILE,
    "terms": _TILE,
    "fold": _ROWS,
    "paired": _PAIRS,
    "gradient": _GRADIENT,
    "plan": _PLAN,
    "gradient_plan": _GRADIENT_PLAN,
    "chunk": _CHUNK,
    "stream": _TILE,
    "stream_teacher": _TILE,
    "ranked": _RANKED,
    "late_interaction": _LATE_INTERACTION,
    "cross_attention": _CROSS_ATTENTION,
}

#: Kernels that torch runs, on whatever device: the others are Triton's.
TORCH_KERNELS = ("chunk",)


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
        if not any(type(value) is type(choice) and value == choice for choice in space.values[name]):
            raise ValueError(f"{name} of {kernel} must be one of {space.values[name]}, got {shown(value)}")
    config: Config = space.config(**values)
    if not space.fits_key(config, key):
        raise ValueError(f"{config} is no legal tile for {key}")
    return config
