"""The slopes that the streaming kernel stores, and their products with both sides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.reference import assert_close, tolerance
from torch import Tensor

from gssf_triton.kernels.stream_values import Operands
from gssf_triton.streaming.driver import TorchEngine
from gssf_triton.streaming.epilogues import EPILOGUES
from gssf_triton.streaming.triton import TritonEngine, adds_halves_in_float32

pytestmark = pytest.mark.kernels

HALVES = [torch.float16, torch.bfloat16]
#: Pairs: even and ragged ones, one, and more than the step that a product takes at a time.
SIZES = [(48, 48), (33, 47), (40, 1), (1, 130), (200, 300)]


@pytest.fixture
def asked() -> Iterator[None]:
    """Whether the library adds half-precision products in float32 is asked anew, and forgotten afterwards."""
    adds_halves_in_float32.cache_clear()
    yield
    adds_halves_in_float32.cache_clear()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("M", "N"), SIZES)
def test_rows_of_a_slope_end_evenly(M: int, N: int, dtype: torch.dtype, device: str) -> None:
    """So that they are stored 16 bytes at a time whatever the batch; what is beyond N is 0, and not shown."""
    t, y = ((torch.randn(n, 32, device=device) / 4).to(dtype) for n in (M, N))
    # The first is the logarithm of a softmax's sum: slopes are below 2, as a loss's are.
    rows, columns = (
        torch.rand(4, n, device=device) + torch.tensor([[4.0], [0], [0], [0]], device=device) for n in (M, N)
    )
    operands, epilogue = Operands(t, y, torch.ones(2, device=device), rows, columns), EPILOGUES["softmax_slope_both"]
    slope = TritonEngine(operands, epilogue, True).chunk(slice(0, M), slice(0, N)).slope
    assert slope is not None and slope.shape == (M, N) and slope.stride(1) == 1
    pitch = slope.stride(0)
    assert pitch % 16 == 0 and N <= pitch < N + 16
    whole = slope.as_strided((M, pitch), (pitch, 1))
    assert torch.equal(whole[:, N:], torch.zeros_like(whole[:, N:]))
    wide = operands._replace(t=t.float(), y=y.float())
    expected = TorchEngine(wide, epilogue, True).chunk(slice(0, M), slice(0, N)).slope
    assert expected is not None
    scale = 2.0**14 if dtype == torch.float16 else 1.0
    assert_close(slope.float() / scale, expected, tolerance(dtype))


def _product(M: int, N: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sums so far, a slope and the rows that it multiplies."""
    return (
        torch.randn(M, 40, device=device),
        torch.randn(M, N, device=device).to(dtype),
        torch.randn(N, 40, device=device).to(dtype),
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("M", "N"), SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_no_product_is_rounded_before_it_is_added(
    M: int, N: int, dtype: torch.dtype, transposed: bool, device: str, asked: None
) -> None:
    out, p, x = _product(M, N, dtype, device)
    if transposed:
        p = p.mT.contiguous().mT
    scale = 2.0**14 if dtype == torch.float16 else 1.0
    expected = out.double() + p.double() @ x.double() / scale
    TritonEngine.add_product(out, p, x)
    assert_close(out, expected, tolerance(torch.float32))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_library_adds_in_float32_where_it_can(
    dtype: torch.dtype, device: str, asked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, with the slope's scale undone, and asked whether it can only once."""
    calls: list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]] = []

    def addmm(
        sums: Tensor, p: Tensor, x: Tensor, *, out_dtype: torch.dtype, out: Tensor, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        calls.append((sums, p, x, {"beta": beta, "alpha": alpha, "out_dtype": out_dtype, "out": out}))
        return out.copy_(beta * sums + alpha * (p.to(out_dtype) @ x.to(out_dtype)))

    monkeypatch.setattr(torch, "addmm", addmm)
    scale = 2.0**14 if dtype == torch.float16 else 1.0
    for M, N in SIZES:
        out, p, x = _product(M, N, dtype, device)
        expected = out.double() + p.double() @ x.double() / scale
        TritonEngine.add_product(out, p, x)
        sums, left, right, named = calls.pop()
        assert sums is out and left is p and right is x
        assert named == {"beta": 1, "alpha": 1 / scale, "out_dtype": torch.float32, "out": out}
        assert_close(out, expected, tolerance(torch.float32))
    assert [call[1].shape for call in calls] == [(16, 16)], "the question"


@pytest.mark.parametrize("refusal", [TypeError("no such argument"), NotImplementedError("not on this device")], ids=str)
def test_a_library_that_cannot_is_asked_once(
    refusal: Exception, device: str, asked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def addmm(*arguments: object, **named: object) -> Tensor:
        calls.append(arguments)
        raise refusal

    monkeypatch.setattr(torch, "addmm", addmm)
    for M, N in SIZES:
        out, p, x = _product(M, N, torch.float16, device)
        expected = out.double() + p.double() @ x.double() / 2**14
        TritonEngine.add_product(out, p, x)
        assert_close(out, expected, tolerance(torch.float32))
    assert len(calls) == 1
