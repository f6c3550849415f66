"""TF32 as tensor cores do it: they drop a float32 operand's last 13 bits, where Triton's interpreter keeps them all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from bench.check import steps
from bench.check.calls import CALLS, Call
from gssf_triton.kernels import launch
from gssf_triton.kernels.configs import dot_precision
from gssf_triton.kernels.pairwise import pairwise
from gssf_triton.kernels.tile import nearest

pytestmark = pytest.mark.kernels

#: Float32 numbers hold 23 bits after the point, TF32 numbers 10.
DROPPED = 13
KEPT = np.uint32(0xFFFFFFFF << DROPPED & 0xFFFFFFFF)


@pytest.fixture
def dropping(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Products in TF32, where a GPU would take them, lose the bits that they lose there."""
    if device != "cpu":
        return
    exact = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        if "TF32" in str(precision) and "X3" not in str(precision).upper():
            a, b = (interpreter.TensorHandle((x.data.view(np.uint32) & KEPT).view(np.float32), x.dtype) for x in (a, b))
        return exact(self, a, b, d, precision, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(launch, "dot_precision", lambda dtype, arch, **how: dot_precision(dtype, "sm_90", **how))


def test_bits_are_dropped(dropping: None, device: str) -> None:
    """Of a product that is given no rounded operand: the matched product of ones with 1 + 2⁻¹¹ is 1."""
    torch.set_float32_matmul_precision("high")
    ones, more = torch.ones(16, 16, device=device), torch.full((16, 16), 1 + 2.0**-11, device=device)
    S = pairwise(ones[None], more[None], launch.Metric(None, None), False, torch.empty(1, 16, 16, device=device))
    assert (S == 16).all()


@triton.jit
def nearest_kernel(x_ptr, y_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, nearest(tl.load(x_ptr + offs), PRECISION))


def test_operands_are_rounded_to_nearest(device: str) -> None:
    bits = torch.randint(-(2**31), 2**31, (1024,), dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    x[:8] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 1e-45])
    bits[8] = 0x7FFFFFFF  # the NaN that a GPU makes
    bits[9] = 0x3F800FFF  # just below the middle of two TF32 numbers, …
    bits[10] = 0x3F801000  # … in the middle, …
    bits[11] = 0x3F801001  # … just above
    x = x.to(device)
    y = torch.empty_like(x)
    nearest_kernel[(1,)](x, y, N=1024, PRECISION="tf32")
    x, y = x.cpu(), y.cpu()
    assert torch.equal(y.isnan(), x.isnan()) and torch.equal(y.isinf(), x.isinf())
    ordinary = x.isfinite() & (x.abs() < 2.0**127)
    assert (y[ordinary].view(torch.int32) & (2**DROPPED - 1) == 0).all()
    step = torch.exp2(torch.floor(torch.log2(x.double().abs())).clamp_min(-126) - 10)
    assert ((y.double() - x.double()).abs()[ordinary] <= step[ordinary] / 2).all()
    assert y[9:12].tolist() == [1.0, 1 + 2.0**-10, 1 + 2.0**-10]
    nearest_kernel[(1,)](x.to(device), y := torch.empty_like(x).to(device), N=1024, PRECISION="ieee")
    assert torch.equal(y.cpu().view(torch.int32), x.view(torch.int32))


def calls() -> list[Call]:
    return [call for call in CALLS if not call.exact and not call.fused]


@pytest.mark.parametrize("call", calls(), ids=lambda call: call.name)
def test_errors_stay_within_the_contract(
    call: Call, dropping: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of values and gradients, in float32 where TF32 is allowed and in float16, whose folded gradients take it."""
    monkeypatch.setattr(steps, "CALLS", [call])
    monkeypatch.setattr(steps, "NUMERICS", {name: steps.NUMERICS[name] for name in ("tf32", "fp16")})
    found = list(steps.errors(steps.Machine(torch.device(device), float("inf"))))
    assert len(found) == 2 and all(f["ok"] for f in found), found
