"""The slopes that the streaming kernel stores, and their products with both sides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.reference import assert_close, tolerance
from torch import Tensor

from gssf_triton import kernels
from gssf_triton.kernels import choice
from gssf_triton.kernels.configs import ChunkConfig
from gssf_triton.kernels.stream_values import Operands
from gssf_triton.streaming.driver import stream
from gssf_triton.streaming.epilogues import EPILOGUES, Chunk
from gssf_triton.streaming.triton import add_product, adds_halves_in_float32

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
    [(_, _, slope)] = kernels.stream.Pass(operands, epilogue, (M, N)).parts()
    assert slope is not None and slope.shape == (M, N) and slope.stride(1) == 1
    pitch = slope.stride(0)
    assert pitch % 16 == 0 and N <= pitch < N + 16
    whole = slope.as_strided((M, pitch), (pitch, 1))
    assert torch.equal(whole[:, N:], torch.zeros_like(whole[:, N:]))
    wide = operands._replace(t=t.float(), y=y.float())
    expected = epilogue.torch(Chunk(wide, epilogue, True)).slope
    assert expected is not None
    scale = 2.0**14 if dtype == torch.float16 else 1.0
    assert_close(slope.float() / scale, expected, tolerance(dtype))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing wrote is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("name", ["sigmoid", "hinge_all", "softmax_slope_both", "distillation_slope"])
@pytest.mark.parametrize("chunk", [ChunkConfig(64, 64), ChunkConfig(20, 96)], ids=str)
def test_chunks_add_up(name: str, chunk: ChunkConfig, device: str, poisoned: None) -> None:
    """Several tiles a chunk and several chunks, ragged ones at the end: states, sums and both products."""
    M, N, epilogue = 70, 100, EPILOGUES[name]
    t, y, *teacher = (torch.randn(n, D, device=device) / D**0.25 for D in (12, 7) for n in (M, N))
    rows, columns = (torch.rand(4, n, device=device) + 1 for n in (M, N))
    x = Operands(
        t, y, torch.tensor([1.3, -0.2], device=device), rows[: 3 if epilogue.teacher else 4], columns, offset=3
    )
    if epilogue.teacher:
        x = x._replace(teacher_t=teacher[0], teacher_y=teacher[1])
    wide = Operands(*(part.double() if isinstance(part, Tensor) else part for part in x))
    expected = stream(name, wide, wants_slope=True, backend="torch")
    with choice.use(chunk=chunk):
        found = stream(name, x, wants_slope=True, backend="triton")
        again = stream(name, x, wants_slope=True, backend="triton")
    kept = [*zip(found._fields, found, again, expected, strict=True)]
    assert [name for name, *values in kept if None in values] == ["stored", "tops"]
    for field, ours, repeated, theirs in kept[:-2]:
        assert torch.equal(ours, repeated), field
        assert ours.shape == theirs.shape and (not theirs.numel() or _error(ours, theirs) < 1e-6), field


def _error(x: Tensor, expected: Tensor) -> float:
    return float((x - expected).norm() / expected.norm())


def _product(M: int, N: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sums so far, a slope and the rows that it multiplies."""
    return (
        torch.randn(M, 40, device=device),
        torch.randn(M, N, device=device).to(dtype),
        torch.randn(N, 40, device=device).to(dtype),
    )


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("M", "N"), SIZES)
def test_the_first_product_writes(M: int, N: int, dtype: torch.dtype, device: str, asked: None) -> None:
    """Into memory that holds anything, NaN too."""
    _, p, x = _product(M, N, dtype, device)
    out = torch.full((M, 40), torch.nan, device=device)
    add_product(out, p, x, beta=0)
    assert_close(out, p.double() @ x.double() / (2.0**14 if dtype == torch.float16 else 1.0), tolerance(torch.float32))


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
    add_product(out, p, x)
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
        add_product(out, p, x)
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
        add_product(out, p, x)
        assert_close(out, expected, tolerance(torch.float32))
    assert len(calls) == 1
