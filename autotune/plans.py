"""Which plan computes a call, and which side is folded: the one place where that is decided.

* one pass: one kernel folds a's tile in registers and multiplies it, S is the only thing written. It recomputes T(a)'s
  tile in every column tile: B / BLOCK_N more work on the tensor cores.
* fold, then product: the fold kernel writes T(a), the library multiplies. Two launches and 2·M·D more numbers through
  memory, but the product runs at the library's rate.

The estimate below is arithmetic with the ceilings of one H200 (bf16 products about 790 TFLOP/s in the library, copies
about 4.3 TB/s); the rates of our own product and the launch cost are assumptions, not measurements. What matters is
only where the two plans cross.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

PLANS = ("one_pass", "fold_product")

#: Seconds a launch costs where the device waits for the host.
LAUNCH_SECONDS = 4e-6
#: Bytes a second through device memory, reads and writes together.
BYTES_PER_SECOND = 4.3e12
#: The library's product in half precision, FLOP/s; in float32 on the FMA units and in TF32.
LIBRARY_FLOPS = {"half": 790e12, "float": 55e12, "tf32": 390e12, "double": 50e12}
#: Our product's share of the library's rate.
ONE_PASS_EFFICIENCY = 0.7
#: Column tile of the one-pass kernel: the fold is recomputed for each.
ONE_PASS_BLOCK_N = 128

_forced: ContextVar[str | None] = ContextVar("gssf_forced_plan", default=None)


@dataclass(frozen=True)
class Plan:
    """`kind` is one of `PLANS`; `fold_b` folds b's side, as S = a T'(b)ᵀ."""

    kind: str
    fold_b: bool


@contextmanager
def force_plan(kind: str) -> Iterator[None]:
    """Take this plan for every call inside, whatever the estimate says.

    Example:
        >>> from gssf_triton.autotune.plans import choose_plan, force_plan
        >>> with force_plan("one_pass"):
        ...     choose_plan(1, 8192, 8192, 1024, 32, 2).kind
        'one_pass'
    """
    if kind not in PLANS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, PLANS))}, got {kind!r}")
    token = _forced.set(kind)
    try:
        yield
    finally:
        _forced.reset(token)


def _rate(itemsize: int) -> float:
    if itemsize == 2:
        return LIBRARY_FLOPS["half"]
    if itemsize == 8:
        return LIBRARY_FLOPS["double"]
    return LIBRARY_FLOPS["float" if torch.get_float32_matmul_precision() == "highest" else "tf32"]


def one_pass_seconds(batch: int, M: int, N: int, D: int, B: int, itemsize: int) -> float:
    """Estimate of the one-pass kernel: compute or memory, whichever is longer, and one launch."""
    flops = 2.0 * batch * M * N * D * (1 + B / ONE_PASS_BLOCK_N)
    moved = batch * itemsize * ((M + N) * D + M * N)
    return max(flops / (_rate(itemsize) * ONE_PASS_EFFICIENCY), moved / BYTES_PER_SECOND) + LAUNCH_SECONDS


def fold_product_seconds(batch: int, M: int, N: int, D: int, B: int, itemsize: int) -> float:
    """Estimate of fold, then the library's product; `M` is the folded side."""
    fold = batch * itemsize * 2.0 * M * D / BYTES_PER_SECOND + LAUNCH_SECONDS
    moved = batch * itemsize * ((M + N) * D + M * N)
    product = max(2.0 * batch * M * N * D / _rate(itemsize), moved / BYTES_PER_SECOND) + LAUNCH_SECONDS
    return fold + product


def choose_plan(batch: int, M: int, N: int, D: int, B: int, itemsize: int) -> Plan:
    """The plan for S (batch, M, N) over D channels in blocks of B (0: no block term), features of `itemsize` bytes.

    The fewer rows are folded: the fold's cost is proportional to them, in memory and in work.
    """
    fold_b = N < M
    rows, columns = (N, M) if fold_b else (M, N)
    kind = _forced.get()
    if kind is None:
        one_pass = one_pass_seconds(batch, rows, columns, D, B, itemsize)
        kind = "one_pass" if one_pass <= fold_product_seconds(batch, rows, columns, D, B, itemsize) else "fold_product"
    return Plan(kind, fold_b)
