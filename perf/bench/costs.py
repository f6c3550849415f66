"""FLOPs and bytes of the mathematics: what an operation needs at least, not what one implementation of it spends.

Every contender that computes the same thing is credited with the same FLOPs and bytes, so one that does more work or
moves more memory shows as a slower one, never as a better one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import CodeType

from bench.cells import BOTH, Shape

#: How to read `TABLE`; the README has both, by report.py.
CONVENTIONS = """\
A multiply and an add are two FLOPs; exponentials, comparisons and sorting are not counted. Bytes count each argument
read once and each result written once, s bytes a feature, with a cache that holds everything in between. The backward
pass starts from the results' gradients and reads its arguments again, for in training other work stands between the
two; what a pass may compute anew instead of storing it is not credited. r is the side with fewer rows, which is cheaper
to fold: F = r·D·(2·B + 2) FLOPs for T, W = D·B + D weights. Plain cosine has F = W = 0 in the same rows. A loss
with a teacher has E channels of it, a search k results; images have R regions and captions L words
each, attention H heads."""

#: The one table: kind of mathematics → pass → (FLOPs, bytes).
TABLE: dict[str, dict[str, tuple[str, str]]] = {
    "similarity": {
        "forward": ("2*M*N*D + F", "s*(M*D + N*D + M*N + W)"),
        "backward": ("4*M*N*D + 2*F", "s*(M*N + 2*(M*D + N*D + W))"),
    },
    "loss": {"forward": ("2*M*N*D + F", "s*(M*D + N*D + W)"), "backward": ("4*M*N*D + 2*F", "2*s*(M*D + N*D + W)")},
    "distillation": {
        "forward": ("2*M*N*(D + E) + F", "s*(M*(D + E) + N*(D + E) + W)"),
        "backward": ("4*M*N*D + 2*F", "s*(M*(2*D + E) + N*(2*D + E) + 2*W)"),
    },
    "topk": {"forward": ("2*M*N*D + F", "s*(M*D + N*D + W) + 12*M*k")},
    "ranks": {"forward": ("2*M*N*D + F", "s*(M*D + N*D + W) + 16*M + 8*N")},
    "late_interaction": {
        "forward": ("2*M*R*N*L*D + F", "s*(M*R*D + N*L*D + W) + 4*M*N"),
        # Each word's gradient reaches one region.
        "backward": ("4*M*N*L*D + 2*F", "2*s*(M*R*D + N*L*D + W) + 4*M*N"),
    },
    "cross_attention": {"forward": ("4*M*R*N*L*D + 2*M*R*R*(D + N*L) + F", "s*(M*R*D + N*L*D + W) + 4*M*N")},
    "attention": {
        "forward": ("H*(4*M*N*D + F)", "s*H*(2*M*D + 2*N*D + W)"),
        "backward": ("H*(8*M*N*D + 2*F)", "s*H*(3*M*D + 4*N*D + 2*W)"),
    },
}
METRICS = ("cosine", "gssf")


@dataclass(frozen=True)
class Cost:
    """Of one call: FLOPs, and bytes through memory."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOP/byte."""
        return self.flops / self.bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@cache
def _compiled(formula: str) -> CodeType:
    return compile(formula, "the cost table", "eval")


def rows_of(mathematics: str) -> tuple[str, str]:
    """(metric, kind) of a contender's mathematics: "gssf" is its similarity, "cosine_topk" a search by cosine.

    Raises:
        KeyError: mathematics that is in no row.
    """
    metric, _, kind = mathematics.partition("_")
    kind = kind or "similarity"
    if metric not in METRICS or kind not in TABLE:
        raise KeyError(f"{mathematics} is not {' or '.join(METRICS)} with one of {', '.join(TABLE)}")
    return metric, kind


def _row(metric: str, kind: str, one_pass: str, shape: Shape, itemsize: int) -> Cost:
    sizes = shape.sizes
    fewer = min(shape.M * sizes.get("R", 1), shape.N * sizes.get("L", 1))
    folds = metric == "gssf"
    values = sizes | {
        "s": itemsize,
        "F": fewer * shape.D * (2 * shape.B + 2) if folds else 0,
        "W": shape.D * (shape.B + 1) if folds else 0,
    }
    flops, moved = (int(eval(_compiled(formula), {}, values)) for formula in TABLE[kind][one_pass])
    return Cost(flops, moved)


def cost(mathematics: str, mode: str, shape: Shape, itemsize: int) -> Cost:
    """FLOPs and bytes of one call in a mode, "forward" or "forward+backward", elements of `itemsize` bytes."""
    metric, kind = rows_of(mathematics)
    forward = _row(metric, kind, "forward", shape, itemsize)
    return forward + _row(metric, kind, "backward", shape, itemsize) if mode == BOTH else forward


def markdown(heads: list[str], rows: list[list[str]], numbers: int = 0) -> list[str]:
    """The lines of a table in Markdown; the last columns, as many as there are numbers, are aligned right."""
    rule = "|" + "---|" * (len(heads) - numbers) + "--:|" * numbers
    return [f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def table() -> str:
    """`TABLE` in Markdown."""
    rows = [
        [kind.replace("_", " "), one_pass, *(formula.replace("*", "·") for formula in formulas)]
        for kind, passes in TABLE.items()
        for one_pass, formulas in passes.items()
    ]
    return "\n".join(markdown(["", "pass", "FLOPs", "bytes"], rows))
