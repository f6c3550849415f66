"""The losses where training goes wrong: huge scales, equal features, one pair, only positives, nothing at all, NaN."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support import reference
from support.losses_problem import LOSSES, Problem, problem
from support.reference import assert_close, tolerance
from torch import Tensor

import gssf_triton
from gssf_triton.kernels import choice
from gssf_triton.kernels.configs import ChunkConfig
from gssf_triton.losses import batch
from gssf_triton.remembered import Remembered

losses = pytest.mark.parametrize("loss", LOSSES)


def options(loss: str, teacher: Tensor | None = None) -> dict[str, object]:
    given: dict[str, object] = {} if loss == "triplet_loss" else {"logit_scale": 5.0}
    if loss == "sigmoid_loss":
        given["logit_bias"] = -2.0
    if loss == "distillation_loss":
        given |= {"teacher_a": teacher, "teacher_b": teacher}
    return given


@losses
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing(loss: str, reduction: str, backend: str, device: str) -> None:
    """An empty batch: 0, with gradients of 0."""
    p = problem(loss, 0, reduction=reduction, device=device)
    out = p.call(backend)
    assert out.shape == ((0,) if reduction == "none" else ())
    assert float(out.detach().sum()) == 0
    out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in p.leaves.values())


def test_one_pair(backend: str, device: str) -> None:
    """No negative: InfoNCE and the hinge are exactly 0, and so are their gradients."""
    for loss in ("info_nce", "triplet_loss"):
        for hardest in (True, False):
            extra = {} if loss == "info_nce" else {"hardest": hardest}
            p = problem(loss, 1, device=device, **extra)
            out = p.call(backend)
            assert float(out.detach()) == 0
            out.backward()
            assert all(x.grad is not None and not x.grad.any() for x in p.leaves.values())
    p = problem("sigmoid_loss", 1, device=device)
    p.check(backend, factor=3)


def test_only_positives(backend: str, device: str) -> None:
    """All ids equal: no negatives for InfoNCE and the hinge, all pairs positive for the sigmoid."""
    for loss in ("info_nce", "triplet_loss", "sigmoid_loss"):
        p = problem(loss, 19, device=device)
        p.fixed["ids"] = torch.full((19,), 7, device=device)
        if loss == "sigmoid_loss":
            p.check(backend, factor=3)
            continue
        out = p.call(backend)
        out.backward()
        assert float(out.detach()) == 0
        assert all(x.grad is not None and not x.grad.any() for x in p.leaves.values())


@pytest.mark.parametrize("bias", [9.0, 16.0, 20.5, 24.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sigmoid_of_pairs_long_told_apart(bias: float, dtype: torch.dtype, backend: str, device: str) -> None:
    """Losses of 1e-4 to 1e-10 and, in float64, of 20 and more: every one with its own digits."""
    p = problem("sigmoid_loss", 9, dtype=dtype, scale=0.5, reduction="none", normalize=True, device=device)
    p.fixed["ids"] = torch.zeros(9, dtype=torch.int64, device=device)
    for sign in (1, -1):
        p.leaves["logit_bias"] = torch.tensor(sign * bias, dtype=dtype, device=device)
        expected, _ = p.exact()
        # softplus(x) is off by |x| times as much as x is.
        relative = (bias + 2) * tolerance(dtype)
        torch.testing.assert_close(p.call(backend).double().cpu(), expected.detach(), rtol=relative, atol=0)


def test_all_equal(backend: str, device: str) -> None:
    """Collapse: InfoNCE is log N, the hinge 2 · margin · N with every row and column violated, and nothing is NaN."""
    N, D = 23, 8
    a = torch.full((N, D), 0.5, device=device, requires_grad=True)
    weight = torch.ones(D, device=device)
    loss = gssf_triton.info_nce(a, a, weight, logit_scale=20.0, backend=backend)
    torch.testing.assert_close(loss, torch.tensor(math.log(N), device=device))
    (grad,) = torch.autograd.grad(loss, [a])
    assert grad.abs().max() < 1e-6
    hinge, violations = gssf_triton.triplet_loss(a, a, weight, margin=0.2, return_violations=True, backend=backend)
    torch.testing.assert_close(hinge, torch.tensor(2 * 0.2 * N, device=device))
    assert violations.tolist() == [N, N]
    hinge, violations = gssf_triton.triplet_loss(
        a, a, weight, margin=0.2, hardest=False, return_violations=True, backend=backend
    )
    torch.testing.assert_close(hinge, torch.tensor(2 * 0.2 * N * (N - 1), device=device))
    assert violations.tolist() == [N * (N - 1)] * 2


def _large_problem(loss: str, dtype: torch.dtype, device: str) -> Problem:
    """Rows of norm 1e3, unnormalised: logits of 1e8."""
    p = problem(loss, 31, G=2, B=8, dtype=dtype, scale=100.0, device=device)
    for name in ("a", "b", "teacher_a", "teacher_b"):
        for tensors in (p.leaves, p.fixed):
            if name in tensors:
                x = tensors[name]
                assert x is not None
                row_norm = x.detach().double().norm(dim=1, keepdim=True)
                tensors[name] = (x.detach().double() / row_norm * 1e3).to(dtype).requires_grad_(name in p.leaves)
    return p


def _teacher_is_decided(p: Problem) -> bool:
    """Whether no row of the teacher's has two best similarities that half precision may take for each other's."""
    teacher = {name: x.double().cpu() for name, x in p.fixed.items() if name.startswith("teacher") and x is not None}
    if not teacher:
        return True
    a, b = teacher.pop("teacher_a"), teacher.pop("teacher_b")
    T = reference.pairwise_sim(a, b, teacher.get("teacher_W_diag"), teacher.get("teacher_W_blocks"))
    best = T.topk(2, dim=1).values
    return bool((best[:, 0] - best[:, 1] > 3e-3 * T.abs().max()).all())


@losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_features_and_a_scale_of_100(loss: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Logits of 1e8 in half-precision features, finite and right."""
    p = next(p for _ in range(1000) if _teacher_is_decided(p := _large_problem(loss, dtype, device)))
    loss_value = p.call(backend)
    expected, _ = p.exact()
    torch.testing.assert_close(loss_value.double().cpu(), expected.detach(), rtol=2e-3, atol=1e-3)
    loss_value.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in p.leaves.values())


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-3), (torch.float16, 2e-3)], ids=str
)
def test_gradients_at_a_scale_of_100(dtype: torch.dtype, allowed: float, backend: str, device: str) -> None:
    """The regime of a trained CLIP: scale 100, and matching pairs about as near each other as the hardest negatives.

    A loss that keeps its similarities in half precision is off by percents here.
    """
    N, D, noise = (96, 256, 4.0) if device == "cpu" and backend == "triton" else (1024, 512, 6.0)
    p = problem("info_nce", N, G=D // 32, B=32, dtype=dtype, scale=100.0, kind="diag", normalize=True, device=device)
    a = torch.randn(N, D, dtype=torch.float64)
    noisy = a + noise * torch.randn(N, D, dtype=torch.float64)
    p.leaves["a"], p.leaves["b"] = (x.to(device, dtype).requires_grad_() for x in (a, noisy))
    p.leaves["W_diag"] = (1 + 0.1 * torch.randn(D, device=device)).requires_grad_()
    p.call(backend).backward()
    expected, exact = p.exact()
    expected.backward()
    for name, x in p.leaves.items():
        assert x.grad is not None
        reference = exact[name].grad
        assert reference is not None
        error = (x.grad.double().cpu() - reference).norm() / reference.norm()
        # The gradient itself is rounded to its tensor's dtype: bfloat16 has 8 bits.
        assert error <= allowed, f"d{name} is off by {error:.2g}"


@losses
def test_nan_is_not_hidden(loss: str, backend: str, device: str) -> None:
    """One NaN feature reaches the loss."""
    p = problem(loss, 40, device=device)
    with torch.no_grad():
        p.leaves["a"][3, 2] = float("nan")
    assert p.call(backend).isnan()


@pytest.mark.parametrize("N", [4, 150], ids=["one tile", "several tiles"])
def test_ties_give_the_gradient_to_the_lowest_index(N: int, backend: str, device: str) -> None:
    a = torch.eye(N, device=device, requires_grad=True)
    b = torch.full((N, N), 0.9, device=device)
    b.fill_diagonal_(1.0)
    b.requires_grad_()
    gssf_triton.triplet_loss(a, b, torch.ones(N, device=device), margin=0.2, backend=backend).backward()
    # Row 0's hardest negative is column 1, every other row's column 0; columns likewise. b[1] and b[0] are pushed.
    assert b.grad is not None
    expected = torch.autograd.functional.jacobian(
        lambda y: sum(
            (0.2 + (a[i] * y[1 if i == 0 else 0]).sum() - (a[i] * y[i]).sum())
            + (0.2 + (a[1 if i == 0 else 0] * y[i]).sum() - (a[i] * y[i]).sum())
            for i in range(N)
        ),
        b.detach(),
    )
    torch.testing.assert_close(b.grad, expected)


@pytest.mark.parametrize("later", [False, True], ids=["stored", "streamed"])
def test_nothing_of_an_excluded_pair_counts(later: bool, device: str) -> None:
    """A row of NaN excludes a column, whose gradient is NaN only by the pairs that count."""
    a, ids = torch.randn(4, 4, device=device), torch.tensor([0, 0, 1, 2], device=device)
    a[1, 0] = float("nan")
    b = torch.randn(4, 4, device=device, requires_grad=True)
    with choice.use(chunk=ChunkConfig(2, 2)) if later else nullcontext():
        loss = gssf_triton.info_nce(a, b, torch.ones(4, device=device), logit_scale=1.0, ids=ids, backend="torch")
    (found,) = torch.autograd.grad(loss, b)
    assert found[0].isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("size", [30.0, 1e4])
@pytest.mark.parametrize("later", [False, True], ids=["stored", "streamed"])
def test_a_margin_beside_large_similarities(size: float, later: bool, device: str) -> None:
    x, W_diag = torch.full((3, 4), size, device=device), torch.ones(4, device=device)
    with choice.use(chunk=ChunkConfig(2, 2)) if later else nullcontext():
        loss, violations = gssf_triton.triplet_loss(x, x, W_diag, margin=0.2, return_violations=True, backend="torch")
    assert loss.item() == pytest.approx(1.2) and violations.tolist() == [3, 3]


@pytest.mark.parametrize("hardest", [True, False])
def test_violations_are_counted_alike(hardest: bool, backend: str, device: str) -> None:
    """With and without a gradient, of a sum and of every pair, with ids. Of all negatives NaN is a violation."""
    a, b = (torch.randn(9, 4, device=device) for _ in "ab")
    a[2, 1] = float("nan")
    W_diag = torch.ones(4, device=device)
    for ids in (None, torch.arange(9, device=device) // 2):
        counts = [
            gssf_triton.triplet_loss(
                a, b, W_diag.clone().requires_grad_(wants), hardest=hardest, ids=ids, reduction=reduction,
                return_violations=True, backend=backend,
            )[1].tolist()
            for wants in (False, True)
            for reduction in ("sum", "none")
        ]  # fmt: skip
        assert counts[1:] == counts[:1] * 3
    _, counted = gssf_triton.triplet_loss(
        a, b, W_diag, margin=-1e3, hardest=hardest, return_violations=True, backend=backend
    )
    assert counted.tolist() == ([0, 0] if hardest else [8, 16])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_match_that_is_alone_hides_no_nan(symmetric: bool, reduction: str, backend: str, device: str) -> None:
    """Nothing else in its row is NaN where all others are excluded, or there are none."""
    a, b, W_diag = torch.randn(3, 4, device=device), torch.randn(3, 4, device=device), torch.ones(4, device=device)
    a[0, 1] = torch.nan
    leaves = a.requires_grad_(), W_diag.requires_grad_()
    ids = torch.zeros(3, dtype=torch.int64, device=device)
    loss = gssf_triton.info_nce(
        a, b, W_diag, logit_scale=1.0, ids=ids, symmetric=symmetric, reduction=reduction, backend=backend
    )
    d_a, d_diag = torch.autograd.grad(loss.sum(), leaves)
    assert loss.isnan().any() and d_a[0].isnan().any() and d_diag.isnan().any()
    assert not d_a[1:].any()


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"label_smoothing": 0.1}])
def test_losses_of_pairs_in_batched_gradients(options: dict[str, Any], backend: str, device: str) -> None:
    """Those of `is_grads_batched`, of which vectorised Jacobians are made: an incoming gradient is a batch."""
    a, b = torch.randn(5, 8, device=device, requires_grad=True), torch.randn(5, 8, device=device)
    loss = gssf_triton.info_nce(
        a, b, torch.ones(8, device=device), logit_scale=2.0, reduction="none", backend=backend, **options
    )
    rows = torch.eye(5, device=device)
    (jacobian,) = torch.autograd.grad(loss, a, rows, is_grads_batched=True, retain_graph=True)
    for row, found in zip(rows, jacobian, strict=True):
        (expected,) = torch.autograd.grad(loss, a, row, retain_graph=True)
        torch.testing.assert_close(found, expected)


def test_gradients_of_both_weights_share_no_memory(backend: str, device: str) -> None:
    """One block's diagonal is the diagonal term's gradient; adding to one must not change the other."""
    a, b, W_diag, W_blocks = (torch.randn(shape, device=device) for shape in ((5, 4), (5, 4), (4,), (1, 4, 4)))
    W_diag.requires_grad_(), W_blocks.requires_grad_()
    loss = gssf_triton.info_nce(a, b, W_diag, W_blocks, logit_scale=1.0, backend=backend)
    d_diag, d_blocks = torch.autograd.grad(loss, (W_diag, W_blocks))
    torch.testing.assert_close(d_diag, d_blocks[0].diagonal())
    assert d_diag.untyped_storage().data_ptr() != d_blocks.untyped_storage().data_ptr()


def test_a_teacher_wider_than_its_student(backend: str, device: str) -> None:
    """Numbers beyond float16 in a float32 teacher; autocast rounds them, before and after a call without it."""
    a, b = (torch.randn(24, 16, device=device).bfloat16() for _ in "ab")
    teacher = {
        "teacher_a": torch.randn(24, 8, device=device) * 1e5,
        "teacher_b": torch.randn(24, 8, device=device) / 1e5,
    }

    def call(**more: Any) -> Tensor:
        options: dict[str, Any] = {**teacher, "logit_scale": 1.0, **more}
        return gssf_triton.distillation_loss(a, b, torch.ones(16, device=device), **options)

    plain = call(backend=backend)
    expected = call(backend="torch")
    assert_close(plain, expected, tolerance(torch.bfloat16))
    with torch.autocast(device, torch.bfloat16):
        rounded = call(backend=backend)
        batch._OPERATIONS = Remembered()
        assert torch.equal(rounded, call(backend=backend))
    assert rounded.isfinite() and torch.equal(call(backend=backend), plain)


def test_a_frozen_student_of_a_teacher_that_learns(backend: str, device: str) -> None:
    x, teacher = torch.randn(6, 8, device=device), torch.randn(6, 8, device=device, requires_grad=True)
    loss = gssf_triton.distillation_loss(
        x, x, torch.ones(8, device=device), teacher_a=teacher, teacher_b=teacher, logit_scale=1.0, backend=backend
    )
    assert not loss.requires_grad


def test_the_first_fault_is_named() -> None:
    """In the order of the arguments: features, backend, then the loss's own."""
    a, W_diag = torch.randn(6, 8), torch.ones(8)
    given: dict[str, Any] = {"logit_scale": "x", "reduction": "max", "backend": "z"}
    with pytest.raises(ValueError, match="backend must be"):
        gssf_triton.info_nce(a, a, W_diag, **given)
    with pytest.raises(TypeError, match="margin must be"):
        gssf_triton.triplet_loss(a, a[:2], W_diag, margin="x", hardest=3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="backend must be"):
        gssf_triton.distillation_loss(a, a, W_diag, teacher_a=a[:2], teacher_b=a, **given)
