"""What is measured: shapes and dtypes, and the cells made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True, order=True)
class Shape:
    """M queries against N gallery rows, D channels in blocks of B; `extra` are an operation's further sizes, by name.

    What M and N count is the operation's own: rows, images and captions, …
    """

    M: int
    N: int
    D: int
    B: int
    extra: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if min(self.sizes.values()) < 1 or self.D % self.B:
            raise ValueError(f"all sizes must be positive and B must divide D, got {self}")

    @classmethod
    def of(cls, M: int, N: int, D: int, B: int, **extra: int) -> Shape:
        """Shape.of(64, 10_000, 256, 32, k=10)."""
        return cls(M, N, D, B, tuple(extra.items()))

    @property
    def sizes(self) -> dict[str, int]:
        """Every size by its name, M, N, D and B first."""
        return {"M": self.M, "N": self.N, "D": self.D, "B": self.B, **dict(self.extra)}

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in self.sizes.items())


@dataclass(frozen=True)
class Cell:
    """One row of the results: every contender of an operation at one shape, dtype and pass.

    Attributes:
        compiled: torch.compile's peer runs here: compiling takes seconds a shape, which a quick suite saves.
        once: One call is checked and timed: more would take longer than a suite may spend.
        stored: S fits. Where it does not, contenders that never store it run once, and are not held to float64.
    """

    operation: str
    mode: str
    shape: Shape
    dtype: str
    compiled: bool = True
    once: bool = False
    stored: bool = True

    @property
    def key(self) -> str:
        return f"{self.operation}/{self.mode}/{self.dtype}/{self.shape}"


def lines(base: Shape, **axes: Iterable[int]) -> list[Shape]:
    """Shapes along each axis through `base`: a size, or MN for M = N."""
    moved = [(("M", "N") if axis == "MN" else (axis,), value) for axis, values in axes.items() for value in values]
    return [Shape.of(**base.sizes | dict.fromkeys(names, value)) for names, value in moved]


def least_work_first(shapes: Iterable[Shape]) -> list[Shape]:
    """Without repeats: a run cut short has measured as many shapes as it could."""
    return sorted(set(shapes), key=lambda s: (s.M * s.N * s.D, s))


def grid(
    operation: str, shapes: Iterable[Shape], *dtypes: str, compiled: Iterable[Shape] | None = None,
    modes: Sequence[str] = PASSES, once: bool = False, stored: bool = True,
) -> list[Cell]:  # fmt: skip
    """Every combination; both passes of a shape stand together, so that they share what is set up for it.

    `compiled`: the shapes that torch.compile's peer runs at; all of them where None.
    """
    chosen = None if compiled is None else set(compiled)
    return [
        Cell(operation, mode, shape, dtype, compiled=chosen is None or shape in chosen, once=once, stored=stored)
        for shape in least_work_first(shapes)
        for dtype in dtypes
        for mode in modes
    ]
