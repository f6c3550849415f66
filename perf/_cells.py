"""What is measured: shapes, dtypes, and the suites made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True, order=True)
class Shape:
    """M queries against N gallery rows, D channels in blocks of B."""

    M: int
    N: int
    D: int
    B: int

    def __post_init__(self) -> None:
        if min(self.M, self.N, self.D, self.B) < 1 or self.D % self.B:
            raise ValueError(f"M, N, D and B must be positive and B must divide D, got {self}")

    def __str__(self) -> str:
        return f"M{self.M}-N{self.N}-D{self.D}-B{self.B}"


@dataclass(frozen=True)
class Cell:
    """One row of the results: every contender of an operation at one shape, dtype and pass.

    `compiled` says whether torch.compile's peer runs here: compiling takes seconds a shape, which a quick suite saves.
    """

    operation: str
    mode: str
    shape: Shape
    dtype: str
    compiled: bool = True

    @property
    def key(self) -> str:
        return f"{self.operation}/{self.mode}/{self.dtype}/{self.shape}"


def grid(
    operations: Iterable[str], shapes: Iterable[Shape], dtypes: Iterable[str], compiled: Iterable[Shape] | None = None
) -> list[Cell]:
    """Every combination; both passes of a shape stand together, so that they share what is set up for it."""
    chosen = None if compiled is None else set(compiled)
    return [
        Cell(operation, mode, shape, dtype, compiled=chosen is None or shape in chosen)
        for operation in operations
        for shape in shapes
        for dtype in dtypes
        for mode in PASSES
    ]


def unique(shapes: Iterable[Shape]) -> list[Shape]:
    """Without repeats, the least work first: a run cut short has measured as many shapes as it could."""
    return sorted(set(shapes), key=lambda s: (s.M * s.N * s.D, s))


def gpu_full(operations: list[str]) -> list[Cell]:
    """M = N from 512 to 32,768 and 64 queries against a million rows, over D, B, bf16 and fp32."""
    sides = [(n, n) for n in (512, 2048, 8192, 32768)] + [(64, 10**6)]
    shapes = unique(Shape(M, N, D, B) for M, N in sides for D in (256, 512, 1024) for B in (16, 32, 64, 128))
    return grid(operations, shapes, ("bf16", "fp32"))


def gpu_quick(operations: list[str]) -> list[Cell]:
    """The corners of the full suite that say most, in about a minute."""
    shapes = unique(
        [Shape(n, n, 1024, 32) for n in (512, 2048, 8192)]
        + [Shape(8192, 8192, 1024, 128), Shape(8192, 8192, 256, 32), Shape(64, 10**5, 1024, 32)]
    )
    return grid(operations, shapes, ("bf16", "fp32"), compiled=[Shape(8192, 8192, 1024, 32)])


def cpu_full(operations: list[str]) -> list[Cell]:
    """Three lines through M = N, D and B, a tall gallery, and half precision where a CPU can bear it."""
    lines = (
        [Shape(n, n, 1024, 32) for n in (256, 512, 1024, 2048, 4096)]
        + [Shape(1024, 1024, D, 32) for D in (128, 256, 512, 1024)]
        + [Shape(1024, 1024, 1024, B) for B in (16, 32, 64, 128)]
        + [Shape(64, 50_000, 512, 32)]
    )
    return grid(operations, unique(lines), ("fp32",)) + grid(operations, [Shape(256, 256, 256, 32)], ("bf16",))


def cpu_quick(operations: list[str]) -> list[Cell]:
    """Two points on each line, within two minutes on two cores; torch.compile at one shape only."""
    base = Shape(512, 512, 512, 32)
    lines = [
        base,
        Shape(256, 256, 512, 32),
        Shape(1024, 1024, 512, 32),
        Shape(512, 512, 256, 32),
        Shape(512, 512, 1024, 32),
        Shape(512, 512, 512, 16),
        Shape(512, 512, 512, 128),
        Shape(64, 8192, 512, 32),
    ]
    return grid(operations, unique(lines), ("fp32",), compiled=[base])


#: (suite, kind of device) to the cells it holds, given the operations that belong to the suite.
SUITES = {
    ("quick", "cpu"): cpu_quick,
    ("quick", "cuda"): gpu_quick,
    ("full", "cpu"): cpu_full,
    ("full", "cuda"): gpu_full,
}


def suite_cells(suite: str, device_type: str, operations: list[str]) -> list[Cell]:
    """The cells of `suite` on a kind of device."""
    return SUITES[suite, device_type](operations)
