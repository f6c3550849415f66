"""The plans of S, and the model's choice of one and of the side to fold.

* one pass: one kernel folds a's tile in registers and multiplies it, S is the only thing written. It recomputes T(a)'s
  tile in every column tile: B / BLOCK_N more work on the tensor cores.
* fold, then the library's product: the fold kernel writes T(a), the library multiplies. Two launches and 2·M·D more
  numbers through memory, but the product runs at the library's rate.

The estimate below is arithmetic with the ceilings of one H200 (bf16 products about 790 TFLOP/s in the library, copies
about 4.3 TB/s); the rates of our own product and the launch cost are assumptions, not measurements. What matters is
only where the two plans cross.
"""

from __future__ import annotations

from dataclasses import dataclass

PLANS = ("one_pass", "fold_product")
#: The side a table's plan folds: rows may differ within a bucket, and the side must follow them.
FOLDS = ("fewer", "more")

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
#: The first release of Triton of which the one-pass kernel's products overlap on sm_90. ptxas serialises what older
#: ones make of it in small tiles and in TF32 (C7515), whichever assembler's it is.
OVERLAPPING_TRITON = (3, 8)


@dataclass(frozen=True)
class Plan:
    """`kind` is one of `PLANS`; `fold_b` folds b's side, as S = a T'(b)ᵀ."""

    kind: str
    fold_b: bool


@dataclass(frozen=True)
class PlanChoice:
    """A plan for all shapes of a bucket.

    `fold` is the side of "fewer" or of "more" rows (a has fewer in a tie); an override may also say "a" or "b".
    """

    kind: str
    fold: str = "fewer"

    def resolve(self, M: int, N: int) -> Plan:
        """The plan for S (M, N)."""
        return Plan(self.kind, {"fewer": N < M, "more": N >= M, "a": False, "b": True}[self.fold])


def as_compiled(choice: PlanChoice, arch: str, triton: tuple[int, ...]) -> PlanChoice:
    """The model's choice for the kernels that a release of Triton makes of an architecture.

    The estimate of one pass is of products that overlap. Without it, fold and the library's product is the best plan.

    Example:
        >>> from gssf_triton.kernels.plans import PlanChoice, as_compiled
        >>> as_compiled(PlanChoice("one_pass", "fewer"), "sm_90", (3, 6))
        PlanChoice(kind='fold_product', fold='fewer')
    """
    if choice.kind == "one_pass" and arch.startswith("sm_90") and triton < OVERLAPPING_TRITON:
        return PlanChoice("fold_product", choice.fold)
    return choice


def library_rate(itemsize: int, tf32: bool) -> float:
    """FLOP/s of the library's product."""
    if itemsize == 2:
        return LIBRARY_FLOPS["half"]
    if itemsize == 8:
        return LIBRARY_FLOPS["double"]
    return LIBRARY_FLOPS["tf32" if tf32 else "float"]


def one_pass_seconds(batch: int, M: int, N: int, D: int, B: int, itemsize: int, tf32: bool) -> float:
    """Estimate of the one-pass kernel: compute or memory, whichever is longer, and one launch."""
    flops = 2.0 * batch * M * N * D * (1 + B / ONE_PASS_BLOCK_N)
    moved = batch * itemsize * ((M + N) * D + M * N)
    return max(flops / (library_rate(itemsize, tf32) * ONE_PASS_EFFICIENCY), moved / BYTES_PER_SECOND) + LAUNCH_SECONDS


def fold_product_seconds(batch: int, M: int, N: int, D: int, B: int, itemsize: int, tf32: bool) -> float:
    """Estimate of fold, then the library's product; `M` is the folded side."""
    fold = batch * itemsize * 2.0 * M * D / BYTES_PER_SECOND + LAUNCH_SECONDS
    moved = batch * itemsize * ((M + N) * D + M * N)
    compute = 2.0 * batch * M * N * D / library_rate(itemsize, tf32)
    return fold + max(compute, moved / BYTES_PER_SECOND) + LAUNCH_SECONDS


#: Plan → the estimate of its time, folding the M rows. Of equal estimates the first plan is taken.
PLAN_SECONDS = {"one_pass": one_pass_seconds, "fold_product": fold_product_seconds}


def modelled_plan(batch: int, M: int, N: int, D: int, B: int, itemsize: int, *, tf32: bool) -> Plan:
    """The model's plan for S (batch, M, N) over D channels in blocks of B (0: no block term), of `itemsize` bytes each.

    The fewer rows are folded: the fold's cost is proportional to them, in memory and in work.
    """
    fold_b = N < M
    rows, columns = (N, M) if fold_b else (M, N)
    kind = min(PLANS, key=lambda kind: PLAN_SECONDS[kind](batch, rows, columns, D, B, itemsize, tf32))
    return Plan(kind, fold_b)
