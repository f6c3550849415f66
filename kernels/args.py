"""The kernels' arguments: a few named tuples, and a `Tile` with everything a launch is compiled for.

Triton flattens a NamedTuple into its fields and specialises each. A stride of 1 and an absent weight (None) are
compiled in; multiples of 16 are known as such. Sizes of a batch must not be specialised, or every batch would compile
anew. So they are separate parameters, and so are the strides of a matrix of pairs (`PairMatrix`). Triton 3.6 cannot ask
whether a tuple that holds a None is one, as that of a matrix without a batch does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import triton.language as tl


class Matrix(NamedTuple):
    """A batch of matrices: a pointer, and the strides of the batch, of rows and of channels."""

    ptr: Any
    batch: Any
    row: Any
    channel: Any


class Rows(NamedTuple):
    """A tile's rows: pointers to their first channels, [BLOCK], and the stride of channels."""

    at: Any
    channel: Any


class PairMatrix(NamedTuple):
    """Matrices with one entry for each pair, such as S. Their strides depend on the batch: not specialised.

    The stride along the contiguous side is None. A separate constant EVEN says that this side and all other strides are
    multiples of 16. (Separate, because a tuple made in a kernel turns constants other than None into run-time values.)
    """

    ptr: Any
    batch: Any
    row: Any
    column: Any


class Vector(NamedTuple):
    """A pointer and a stride."""

    ptr: Any
    stride: Any


class Blocks(NamedTuple):
    """Square blocks (G, B, B): a pointer and three strides."""

    ptr: Any
    group: Any
    p: Any
    q: Any


class Weights(NamedTuple):
    """A metric's weights: a `Vector` and `Blocks`, either of them None. Without both T is the identity."""

    diag: Any
    blocks: Any


@dataclass(frozen=True, eq=False)
class Tile(str):
    """Everything that a launch is compiled for.

    It is a text, too: Triton compares constants, and gives them to its hooks as JSON. Launches with the same values
    share one object (`launch.tile`).

    Attributes:
        BLOCK_M: Rows of a.
        BLOCK_N: Rows of b.
        BLOCK_K: Lanes a step.
        GROUP_M: Row tiles a column of the tile order.
        B: Size of the metric's blocks; 0 without blocks.
        BLOCK_B: B rounded up to a power of two.
        EVEN_D: Every lane of every chunk is a channel.
        WIDE: Channel × stride needs 64 bits.
        PRECISION: Triton's `input_precision`.
        ACC: The accumulators' dtype.
    """

    BLOCK_M: int
    BLOCK_K: int = 0
    BLOCK_N: int = 0
    GROUP_M: int = 1
    B: int = 0
    BLOCK_B: int = 0
    EVEN_D: bool = False
    WIDE: bool = False
    PRECISION: str = "ieee"
    ACC: Any = tl.float32

    def __new__(cls, *values: Any, **given: Any) -> Any:
        defaults = {field.name: field.default for field in fields(cls)}
        return super().__new__(cls, f"{cls.__name__}({defaults | dict(zip(defaults, values, strict=False)) | given})")

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, field.name).value for field in fields(self))

    def __post_init__(self) -> None:
        # Triton 3.6 reads plain fields as run-time values.
        for field in fields(self):
            object.__setattr__(self, field.name, tl.constexpr(getattr(self, field.name)))
