"""FLOPs and bytes of the mathematics: what an operation needs at least, not what one implementation of it spends.

Every contender that computes the same thing is credited with the same FLOPs and bytes, so one that does more work or
moves more memory shows as a slower one, never as a better one.

Conventions. A multiply and an add are two FLOPs. Bytes count each argument read once and each result written once,
with a cache that holds everything in between. The backward pass starts from dS and reads its arguments again, for in
training a loss stands between the two. r = min(M, N) is the side that is cheaper to fold.

    forward                FLOPs                        bytes / itemsize
      cosine  S = a bᵀ       2MND                         MD + ND + MN
      gssf    S = T(a) bᵀ    2MND + rD(2B + 2)            MD + ND + MN + DB + D
    backward
      cosine  da, db         4MND                         MN + 2(MD + ND)
      gssf    R = dS b       2MND
              da             rD(2B + 2)
              dW             rD(2B + 2)
              db = dSᵀ T(a)  2MND                         MN + 2(MD + ND + DB + D)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from _cells import Shape


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


def _cosine_forward(s: Shape, itemsize: int) -> Cost:
    return Cost(2 * s.M * s.N * s.D, itemsize * ((s.M + s.N) * s.D + s.M * s.N))


def _cosine_backward(s: Shape, itemsize: int) -> Cost:
    return Cost(4 * s.M * s.N * s.D, itemsize * (s.M * s.N + 2 * (s.M + s.N) * s.D))


def _fold(s: Shape) -> int:
    """FLOPs of T on the smaller side; its gradient to the rows, and to the weights, take as many each."""
    return min(s.M, s.N) * s.D * (2 * s.B + 2)


def _gssf_forward(s: Shape, itemsize: int) -> Cost:
    return _cosine_forward(s, itemsize) + Cost(_fold(s), itemsize * s.D * (s.B + 1))


def _gssf_backward(s: Shape, itemsize: int) -> Cost:
    return _cosine_backward(s, itemsize) + Cost(2 * _fold(s), 2 * itemsize * s.D * (s.B + 1))


#: The one table: (mathematics, pass) to the cost at a shape.
TABLE: dict[tuple[str, str], Callable[[Shape, int], Cost]] = {
    ("cosine", "forward"): _cosine_forward,
    ("cosine", "forward+backward"): lambda s, i: _cosine_forward(s, i) + _cosine_backward(s, i),
    ("gssf", "forward"): _gssf_forward,
    ("gssf", "forward+backward"): lambda s, i: _gssf_forward(s, i) + _gssf_backward(s, i),
}


def cost(mathematics: str, mode: str, shape: Shape, itemsize: int) -> Cost:
    """FLOPs and bytes of one call, elements of `itemsize` bytes."""
    return TABLE[mathematics, mode](shape, itemsize)
