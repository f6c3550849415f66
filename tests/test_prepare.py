"""Both ends of a loss's product, against float64: features to operands, and their gradients back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import reference
from support.reference import TOLERANCE, assert_close, far_apart, features, tolerance, weights
from torch import Tensor
from torch.nn.functional import normalize as unit_rows
from triton.runtime import interpreter

from gssf_triton.kernels import choice, fold, gradient, prepare
from gssf_triton.kernels.configs import gradient_config
from gssf_triton.metric import IDENTITY, Metric

pytestmark = [
    pytest.mark.kernels,
    # The interpreter computes with NumPy, which says so where numbers overflow, as some here do.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]

HALVES = (torch.float16, torch.bfloat16)
#: What an operand in float16 may be off by: rounding leaves 0.2 thousandths.
OPERAND = 0.3 * TOLERANCE[torch.float16]
#: (rows, groups, block size): ragged, padded to powers of two, split over steps, one row.
SHAPES = {"B16": (37, 3, 16), "B24": (33, 4, 24), "B100": (5, 2, 100), "one row": (1, 5, 17)}


@dataclass
class Side:
    """An operand, as a loss makes it and as the definition has it."""

    x: Tensor
    metric: Metric
    normalize: bool

    def __post_init__(self) -> None:
        self.given = {name: w for name, w in vars(self.metric).items() if w is not None}
        half = self.x.dtype in HALVES
        self.unit = prepare.bound(self.metric, self.normalize, self.x) if half else None
        dtype = torch.float16 if half else self.x.dtype
        self.rows, self.inverse = prepare.prepare(self.x, self.metric, self.normalize, dtype, self.unit)

    @property
    def folded(self) -> Tensor:
        return self.rows.double() * (1 if self.unit is None else self.unit.double())

    def exact(self, x: Tensor, *given: Tensor) -> Tensor:
        """T(x̂) of float64 tensors."""
        x = unit_rows(x, dim=-1) if self.normalize else x
        return reference.transform(x, **dict(zip(self.given, given, strict=True))) if given else x

    def wide(self) -> list[Tensor]:
        return [x.detach().double().requires_grad_() for x in (self.x, *self.given.values())]

    def finish(self, R: Tensor, factor: float = 1.0, needs: tuple[bool, bool, bool] | None = None) -> list[Tensor]:
        """Those gradients of factor · R that are needed, by default all there are."""
        needs = needs or (True, "W_diag" in self.given, "W_blocks" in self.given)
        factors = torch.full((), factor, dtype=R.dtype, device=R.device)
        found = prepare.finish(R, self.x, self.rows, self.unit, self.inverse, self.metric, factors, needs)
        assert tuple(grad is not None for grad in found) == needs
        return [grad for grad in found if grad is not None]

    def check(self, operand: float = OPERAND) -> None:
        """The operand, and the gradients of random ones."""
        leaves, tol = self.wide(), tolerance(self.x.dtype)
        expected = self.exact(*leaves)
        assert_close(self.folded, expected, operand if self.x.dtype in HALVES else tol, name="operand")
        R = torch.randn_like(self.x, dtype=torch.promote_types(self.x.dtype, torch.float32))
        found, exact = self.finish(R, 0.25), torch.autograd.grad(expected, leaves, 0.25 * R.double())
        for name, grad, known in zip(("x", *self.given), found, exact, strict=True):
            assert grad.dtype == (self.x.dtype if name == "x" else R.dtype)
            assert_close(grad, known, tol, name=f"d{name}")


def side(kind: str, shape: str, dtype: torch.dtype, normalize: bool, device: str) -> Side:
    M, G, B = SHAPES[shape]
    x = features(M, 2 * G * B, device=device).to(dtype)[:, ::2] * 3
    wide = torch.promote_types(dtype, torch.float32)
    return Side(x, Metric(**weights(kind, G, B, wide, device)) if kind else IDENTITY, normalize)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["", "diag", "blocks", "diag+blocks"])
def test_there_and_back(kind: str, dtype: torch.dtype, normalize: bool, device: str) -> None:
    side(kind, "B24", dtype, normalize, device).check()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("B16", torch.float64), ("B24", torch.float16), ("B100", torch.float16), ("one row", torch.float64)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_shapes_and_dtypes(shape: str, dtype: torch.dtype, device: str) -> None:
    """And the same bits every time."""
    s = side("diag+blocks", shape, dtype, True, device)
    s.check()
    assert s.inverse is not None and s.rows.is_contiguous()
    assert_close(s.inverse, 1 / s.x.double().norm(dim=1), tolerance(torch.float32), name="inverse norms")
    R = torch.randn_like(s.x, dtype=s.inverse.dtype)
    again = Side(s.x, s.metric, True)
    assert torch.equal(again.rows, s.rows) and torch.equal(again.inverse, s.inverse)  # type: ignore[arg-type]
    assert all(torch.equal(one, two) for one, two in zip(s.finish(R), again.finish(R), strict=True))


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "plain"])
def test_strides_and_what_is_needed(normalize: bool, device: str) -> None:
    """Weights and R of any strides, half-precision weights, and every subset of the gradients."""
    M, G, B = 35, 3, 16
    W_blocks = torch.randn(B, G, B, device=device, dtype=torch.bfloat16).transpose(0, 1).mT
    metric = Metric(torch.randn(2 * G * B, device=device)[::2], W_blocks)
    s = Side(features(G * B, M, device=device).to(torch.bfloat16).T, metric, normalize)
    R = torch.randn(G * B, M, device=device).T
    leaves = s.wide()
    exact = torch.autograd.grad(s.exact(*leaves), leaves, R.double())
    every = s.finish(R)
    for number in range(1, 8):
        needs = bool(number & 1), bool(number & 2), bool(number & 4)
        chosen = [i for i, needed in enumerate(needs) if needed]
        for i, grad in zip(chosen, s.finish(R, needs=needs), strict=True):
            assert_close(grad, exact[i], tolerance(torch.bfloat16), name=f"gradient {i} of {needs}")
            assert torch.equal(grad, every[i])


def test_channels_far_apart(device: str, tmp_path: Path) -> None:
    """Their addresses leave 32 bits."""
    metric = Metric(**weights("diag+blocks", 1, 3, device=device))
    Side(far_apart(3, 34, device, tmp_path).T, metric, True).check()


def test_rows_apart(device: str) -> None:
    """Blocks that do not fit the registers beside their gradient's operands."""
    s = side("diag+blocks", "B16", torch.float32, True, device)
    config = replace(gradient_config(16, torch.float32, "interpreter", tf32=False), rows_apart=True)
    with choice.use(gradient=config):
        s.check()


def test_whole_rows_a_program(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows enough to fill a GPU one program writes all of a row, else its inverse norm is written once."""
    monkeypatch.setattr(fold, "PROGRAMS", 2)
    x = features(66, 96, device=device)
    rows, inverse = prepare.prepare(x, IDENTITY, True, torch.float32, None)
    monkeypatch.undo()
    assert inverse is not None
    for again, like in zip(prepare.prepare(x, IDENTITY, True, torch.float32, None), (rows, inverse), strict=True):
        assert again is not None and torch.equal(again, like)


def test_empty(device: str) -> None:
    for M, D in ((0, 32), (5, 0), (0, 0)):
        for metric in (IDENTITY, Metric(torch.ones(D, device=device), torch.ones(D // 16, 16, 16, device=device))):
            for normalize in (True, False):
                s = Side(torch.ones(M, D, device=device, dtype=torch.bfloat16), metric, normalize)
                dx, *others = s.finish(torch.ones(M, D, device=device))
                assert s.rows.shape == dx.shape == (M, D) and dx.dtype == torch.bfloat16
                assert all(not other.any() for other in others)
                assert s.inverse is None or torch.equal(s.inverse, torch.full((M,), 1e12, device=device))


@pytest.mark.parametrize("kind", ["", "diag+blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_of_any_size(kind: str, dtype: torch.dtype, device: str) -> None:
    """Norms that overflow, at the smallest norm and below; NaN and Inf, of features and of gradients, in their rows."""
    x = features(40, 48, device=device)
    for row, size in enumerate((3e38, 1e25, 1e17, 1e-11, 1e-13, 1e-30, 0)):
        x[row] = size * (x[row].sign() if size == 3e38 else x[row])
    x[7, 3], x[8, 40] = float("inf"), float("nan")
    metric = Metric(**weights(kind, 3, 16, device=device)) if kind else IDENTITY
    s = Side(x.to(dtype), metric, True)
    assert s.inverse is not None and not s.inverse[:2].any() and not s.rows[:2].any()
    R = torch.randn(x.shape, device=device)
    R[9, 5], R[10] = float("inf"), float("nan")
    (dx,) = s.finish(R, needs=(True, False, False))
    assert not dx[:2].any()
    leaves = s.wide()
    expected = s.exact(*leaves)
    exact = torch.autograd.grad(expected, leaves, R.double())[0]
    for row in range(2, 40):
        ordinary = row not in (7, 8, 9, 10)
        assert s.rows[row].isfinite().all() == (row not in (7, 8))
        assert dx[row].isfinite().all() == ordinary, f"row {row}"
        if ordinary:
            size = R[row].double() / max(float(s.x[row].double().norm()), 1e-12)
            if row != 5 or dtype not in HALVES:  # 1e-18, which float16 does not hold beside 1
                assert_close(s.folded[row], expected[row], tolerance(*{dtype, s.rows.dtype}), name=f"operand {row}")
            assert_close(dx[row], exact[row], 2 * tolerance(dtype), name=f"dx {row}", size=2 * size)


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1.0, 1e4, 1e20, 1e38, float("inf"), float("nan")])
def test_a_unit_keeps_float16_in_range(size: float, device: str) -> None:
    """It is a power of two such that the operand neither overflows nor, as far as any number can, vanishes."""
    metric = Metric(**{name: None if w is None else w * size for name, w in weights("diag+blocks", 2, 16).items()})
    metric = metric.map(lambda w: w.to(device))
    for weight, normalize in ((metric, True), (metric, False), (Metric(metric.W_diag), True), (IDENTITY, False)):
        x = features(20, 32, device=device).to(torch.bfloat16)
        x[0] = 0
        x[0, 0] = 100
        x[1, 1], x[2, 2] = float("inf"), float("nan")
        if weight.is_identity and size == size:
            x *= size
        s = Side(x, weight, normalize)
        assert s.unit is not None and s.unit.dtype == torch.float32 and s.unit.shape == ()
        mantissa, _ = torch.frexp(s.unit)
        assert mantissa == 0.5 and s.unit > 0
        if size < 1e38:
            rows, exact = s.folded[3:], s.exact(*s.wide())[3:]
            assert rows.isfinite().all()
            if size > 1e-30:
                assert_close(rows, exact, OPERAND)
    assert prepare.bound(IDENTITY, True, torch.ones(2, 3, device=device)) is None


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch, device: str) -> Iterator[None]:
    """Float32 products as tensor cores have them: they drop the operands' last 13 bits."""
    if device == "cpu":
        exact, kept = interpreter.InterpreterBuilder.create_dot, np.uint32(0xFFFFE000)

        def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
            cut = (interpreter.TensorHandle((x.data.view(np.uint32) & kept).view(np.float32), x.dtype) for x in (a, b))
            return exact(self, *cut, d, *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        for module in (fold, gradient):
            monkeypatch.setattr(module, "dot_precision", lambda *_, **__: "tf32")
        gradient._numerics.cache_clear()
    yield
    gradient._numerics.cache_clear()


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_tf32_is_enough(dtype: torch.dtype, tf32: None, device: str) -> None:
    """For half-precision features: it holds all their bits; the weights are rounded to nearest, as the operand is."""
    side("blocks", "B16", dtype, True, device).check(2**0.5 * OPERAND)
