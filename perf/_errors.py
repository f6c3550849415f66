"""One call held to float64 in one numerics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from _check_calls import Call, Problem
from _losses import BARS
from _operation import FLOOR, FLOOR_TF32, relative_error
from torch import Tensor

Finding = dict[str, Any]


def finding(name: str, ok: bool, **facts: Any) -> Finding:
    return {"name": name, "ok": ok, **facts}


@dataclass(frozen=True)
class Numerics:
    """A dtype of features and the float32 precision, with what a result may err.

    `product` is the contract's largest error, `chain` a chain of products'.
    """

    name: str
    dtype: torch.dtype
    precision: str
    product: float
    chain: float

    def bound(self, call: Call) -> float:
        """The largest error of a call's results."""
        return 0.0 if call.exact else self.chain if call.chain else self.product


#: A chain's is a loss's bar, and in TF32, where a product after another adds its bias to it, as much again for each of
#: three.
NUMERICS = (
    Numerics("fp32", torch.float32, "highest", FLOOR["fp32"], BARS["fp32"]),
    Numerics("tf32", torch.float32, "high", FLOOR_TF32, 3 * FLOOR_TF32),
    Numerics("fp16", torch.float16, "highest", FLOOR["fp16"], max(FLOOR["fp16"], BARS["fp16"])),
    Numerics("bf16", torch.bfloat16, "highest", FLOOR["bf16"], max(FLOOR["bf16"], BARS["bf16"])),
)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def held_to_float64(problem: Problem, numerics: Numerics) -> tuple[Finding, dict[str, Tensor], dict[str, Tensor]]:
    """The finding, the call's results, and what they are in float64.

    Float64 is the torch backend's, which the tests hold to the definition.
    """
    call, bound = problem.call, numerics.bound(problem.call)
    exact = problem.double().results("torch")
    with precision(numerics.precision):
        found = problem.results("triton")
    if call.exact:
        worst, where = float((found["out"] != exact["out"]).double().mean()), "out"
    else:
        worst, where = max((relative_error(found[part], exact[part]), part) for part in found)
    facts = {"error": worst, "of": where, "bound": bound}
    return finding(f"{call.name}, {numerics.name}", worst <= bound, **facts), found, exact
