"""What holds for every input: any shape, strides, dtype and batch, and the identities the package rests on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from support import reference
from support.reference import assert_close, check, far_apart, features, tolerance, weights
from torch import Tensor

import gssf_triton
from gssf_triton import kernels
from gssf_triton.kernels.choice import force_plan
from gssf_triton.kernels.plans import PLANS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["diag", "blocks", "diag+blocks"]
#: How a tensor may lie in memory.
LAYOUTS = ["contiguous", "transposed", "every-second-row", "every-second-channel", "offset", "one-row-expanded"]


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x's values (its first row's, where rows are expanded) in memory as `layout` says."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "every-second-row":
        return x.repeat_interleave(2, dim=-2)[..., ::2, :]
    if layout == "every-second-channel":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "offset":
        return torch.cat([torch.full((3,), float("nan")).to(x), x.flatten()])[3:].view(x.shape)
    if layout == "one-row-expanded" and x.shape[-2]:
        return x[..., :1, :].expand(x.shape)
    return x


layouts = st.sampled_from(LAYOUTS)
rows = st.sampled_from([1, 2, 3, 7, 16, 17, 31, 33])
batches = st.sampled_from([((), ()), ((2,), ()), ((), (3,)), ((2, 1), (3,)), ((1,), (2,)), ((2, 3), (2, 3))])
blocks = st.sampled_from([(1, 1), (7, 1), (3, 2), (5, 4), (2, 5), (3, 8), (1, 12), (2, 16), (1, 33), (2, 32)])


@given(data=st.data(), M=rows, N=rows, batch=batches, block=blocks, seed=st.integers(0, 2**31))
def test_pairwise_sim_of_anything(data, M, N, batch, block, seed, backend, device) -> None:
    torch.manual_seed(seed)
    dtype, kind = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(KINDS))
    G, B = block
    tensors = {
        "a": lay_out(features(*batch[0], M, G * B, dtype=dtype, device=device), data.draw(layouts)),
        "b": lay_out(features(*batch[1], N, G * B, dtype=dtype, device=device), data.draw(layouts)),
    }
    for name, w in weights(kind, G, B, dtype, device).items():
        tensors[name] = w if w is None or w.dim() == 1 else lay_out(w, data.draw(layouts))
    for x in tensors.values():
        if x is not None:
            x.requires_grad_(data.draw(st.booleans()))
    note({name: None if x is None else (tuple(x.shape), x.stride(), x.requires_grad) for name, x in tensors.items()})
    with force_plan(data.draw(st.sampled_from(PLANS))):
        (S,) = check("pairwise_sim", tensors, normalize=data.draw(st.booleans()), backend=backend)
    assert S.shape == (*torch.broadcast_shapes(*batch), M, N)


@given(data=st.data(), N=rows, batch=batches, block=blocks, seed=st.integers(0, 2**31))
def test_paired_sim_of_anything(data, N, batch, block, seed, backend, device) -> None:
    torch.manual_seed(seed)
    dtype, kind = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(KINDS))
    G, B = block
    tensors = {
        "a": lay_out(features(*batch[0], N, G * B, dtype=dtype, device=device), data.draw(layouts)),
        "b": lay_out(features(*batch[1], N, G * B, dtype=dtype, device=device), data.draw(layouts)),
        **weights(kind, G, B, dtype, device),
    }
    for x in tensors.values():
        if x is not None:
            x.requires_grad_()
    (s,) = check("paired_sim", tensors, normalize=data.draw(st.booleans()), backend=backend)
    assert s.shape == (*torch.broadcast_shapes(*batch), N)


@given(data=st.data(), N=rows, block=blocks, seed=st.integers(0, 2**31))
def test_transform_of_anything(data, N, block, seed, backend, device) -> None:
    torch.manual_seed(seed)
    dtype, kind = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(KINDS))
    side = data.draw(st.sampled_from("ab"))
    tensors = {
        "x": lay_out(features(N, block[0] * block[1], dtype=dtype, device=device), data.draw(layouts)),
        **weights(kind, *block, dtype, device),
    }
    for x in tensors.values():
        if x is not None:
            x.requires_grad_()
    check("transform", tensors, side=side, normalize=data.draw(st.booleans()), backend=backend)


# ---------------------------------------------------------------- identities

IDENTITY_CASES = pytest.mark.parametrize("kind", KINDS)


def problem(kind: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict]:
    a, b = features(2, 17, 40, dtype=dtype, device=device), features(2, 9, 40, dtype=dtype, device=device)
    return a, b, weights(kind, 5, 8, dtype, device)


@IDENTITY_CASES
@pytest.mark.parametrize("normalize", [False, True], ids=["as-is", "normalize"])
def test_either_side_may_be_folded(kind: str, normalize: bool, backend: str, device: str) -> None:
    """pairwise_sim(a, b) == transform(a) @ b.T == a @ transform(b, side="b").T."""
    a, b, metric = problem(kind, device)
    options = {"normalize": normalize, "backend": backend}
    S = gssf_triton.pairwise_sim(a, b, **metric, **options)
    if normalize:
        unit_a, unit_b = (torch.nn.functional.normalize(x, dim=-1) for x in (a, b))
    else:
        unit_a, unit_b = a, b
    tol = 2 * tolerance(torch.float32)
    assert_close(gssf_triton.transform(a, **metric, **options) @ unit_b.mT, S, tol)
    assert_close(unit_a @ gssf_triton.transform(b, **metric, side="b", **options).mT, S, tol)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_terms_sum_to_the_similarity(dtype: torch.dtype, backend: str, device: str) -> None:
    a, b, metric = problem("diag+blocks", device, dtype)
    diagonal, block = gssf_triton.pairwise_terms(a, b, **metric, backend=backend)
    S = gssf_triton.pairwise_sim(a, b, **metric, backend=backend)
    assert_close(diagonal.double() + block.double(), S, 2 * tolerance(dtype))
    alone = gssf_triton.pairwise_sim(a, b, W_diag=metric["W_diag"], backend=backend)
    assert_close(diagonal, alone, 2 * tolerance(dtype))


@IDENTITY_CASES
def test_paired_sim_is_the_diagonal(kind: str, backend: str, device: str) -> None:
    a, _, metric = problem(kind, device)
    b = torch.randn_like(a)
    S = gssf_triton.pairwise_sim(a, b, **metric, backend=backend)
    assert_close(
        gssf_triton.paired_sim(a, b, **metric, backend=backend), S.diagonal(dim1=-2, dim2=-1), 2 * tolerance(a.dtype)
    )


@IDENTITY_CASES
def test_dense_metric_is_the_same_metric(kind: str, backend: str, device: str) -> None:
    a, b, metric = problem(kind, device)
    dense = gssf_triton.dense_metric(**metric)
    assert_close(a @ dense @ b.mT, gssf_triton.pairwise_sim(a, b, **metric, backend=backend), 2 * tolerance(a.dtype))


def test_sides_swap_with_the_blocks_transposed(backend: str, device: str) -> None:
    a, b, metric = problem("diag+blocks", device)
    swapped = gssf_triton.pairwise_sim(b, a, metric["W_diag"], metric["W_blocks"].mT, backend=backend)
    assert_close(swapped.mT, gssf_triton.pairwise_sim(a, b, **metric, backend=backend), 2 * tolerance(a.dtype))


@pytest.mark.parametrize("identity", ["diag", "blocks"])
def test_the_identity_metric_is_cosine(identity: str, backend: str, device: str) -> None:
    a, b, _ = problem("diag", device)
    if identity == "diag":
        metric = {"W_diag": torch.ones(40, device=device)}
    else:
        metric = {"W_blocks": torch.eye(8, device=device).repeat(5, 1, 1)}
    cosine = torch.nn.functional.cosine_similarity(a.unsqueeze(-2), b.unsqueeze(-3), dim=-1)
    assert_close(
        gssf_triton.pairwise_sim(a, b, **metric, normalize=True, backend=backend), cosine, 2 * tolerance(a.dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_normalize_forgets_the_length_of_rows(scale: float, dtype: torch.dtype, backend: str, device: str) -> None:
    """The rows are put on the sphere before they are folded: what fits float16 as a feature fits it as T(a)."""
    a, b, metric = problem("diag+blocks", device)
    metric = {name: 4 * w for name, w in metric.items()}
    tensors = {"a": (scale * a).to(dtype), "b": (scale * b).to(dtype), **metric}
    for plan in PLANS:
        with force_plan(plan):
            check("pairwise_sim", tensors, normalize=True, backend=backend)
    check("pairwise_terms", tensors, normalize=True, backend=backend)
    check("paired_sim", tensors | {"b": tensors["a"].flip(-2)}, normalize=True, backend=backend)
    check("transform", {"x": tensors["a"], **metric}, normalize=True, backend=backend)


def test_a_row_of_zeros_has_no_direction(backend: str, device: str) -> None:
    """normalize=True gives it similarity 0 and the finite gradient of torch.nn.functional.normalize."""
    a, b, metric = problem("diag+blocks", device)
    a[0, 3] = 0
    tensors = {"a": a.requires_grad_(), "b": b.requires_grad_(), **metric}
    S = gssf_triton.pairwise_sim(**tensors, normalize=True, backend=backend)
    grad = torch.randn_like(S)
    S.backward(grad)
    assert not S[0, 3].any()
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    reference.pairwise_sim(**exact, normalize=True).backward(grad.double())
    others = torch.arange(17, device=device) != 3
    assert_close(a.grad[:, others], exact["a"].grad[:, others], tolerance(a.dtype))
    assert_close(a.grad[0, 3], exact["a"].grad[0, 3], 10 * tolerance(a.dtype))
    assert_close(b.grad, exact["b"].grad, tolerance(a.dtype))


def test_blocks_larger_than_any_tile(device: str) -> None:
    """backend="auto" takes whichever backend can."""
    tensors = {"a": features(5, 288, device=device), "b": features(7, 288, device=device)}
    check("pairwise_sim", tensors | weights("diag+blocks", 1, 288, device=device))


def test_weights_of_a_module_in_another_dtype(backend: str, device: str) -> None:
    """float64 weights beside float32 features: the result is the features'."""
    a, b, _ = problem("diag", device)
    metric = weights("diag+blocks", 5, 8, torch.float64, device)
    for w in metric.values():
        w.requires_grad_()
    tensors = {"a": a, "b": b, **metric}
    (S,) = check("pairwise_sim", tensors, backend=backend)
    assert S.dtype == torch.float32


# ---------------------------------------------------------------- addresses past 2**31 elements


@pytest.mark.parametrize("apart", ["rows", "channels"])
def test_addresses_past_two_to_the_31_elements(apart: str, backend: str, device: str, tmp_path: Path) -> None:
    far = far_apart(3, 24, device, tmp_path) if apart == "rows" else far_apart(3, 5, device, tmp_path).mT
    near = far.clone(memory_format=torch.contiguous_format)
    rows, D = far.shape
    metric = weights("diag+blocks", D // 3, 3, torch.float16, device)
    b = features(rows, D, dtype=torch.float16, device=device)
    for function in (gssf_triton.pairwise_sim, gssf_triton.paired_sim):
        for left, right in (((far, b), (near, b)), ((b, far), (b, near))):
            assert torch.equal(function(*left, **metric, backend=backend), function(*right, **metric, backend=backend))
    folded = gssf_triton.transform(near, **metric, backend=backend)
    assert torch.equal(gssf_triton.transform(far, **metric, backend=backend), folded)
    grads = []
    for x in (far, near):
        W_diag, W_blocks = (w.clone().requires_grad_() for w in metric.values())
        gssf_triton.pairwise_sim(x, b, W_diag, W_blocks, backend=backend).sum().backward()
        grads.append((W_diag.grad, W_blocks.grad))
    for ours, expected in zip(*grads, strict=True):
        assert torch.equal(ours, expected)


# ---------------------------------------------------------------- the judge is judged


def test_the_reference_is_the_written_formula() -> None:
    """S[i, j] spelled out in scalars, so that nothing above rests on an einsum."""
    a, b = features(2, 6, dtype=torch.float64), features(3, 6, dtype=torch.float64)
    metric = weights("diag+blocks", 2, 3, torch.float64)
    W_diag, W_blocks = metric["W_diag"].tolist(), metric["W_blocks"].tolist()
    x, y = a.tolist(), b.tolist()
    for i in range(2):
        for j in range(3):
            s = sum(x[i][m] * W_diag[m] * y[j][m] for m in range(6))
            for g in range(2):
                for p in range(3):
                    for q in range(3):
                        s += x[i][3 * g + p] * W_blocks[g][p][q] * y[j][3 * g + q]
            assert reference.pairwise_sim(a, b, **metric)[i, j].item() == pytest.approx(s, rel=1e-12)
    S = reference.pairwise_sim(a, b, **metric)
    torch.testing.assert_close(reference.transform(a, **metric) @ b.mT, S)
    torch.testing.assert_close(a @ reference.transform(b, **metric, side="b").mT, S)
    torch.testing.assert_close(reference.paired_sim(a, b[:2], **metric), S.diagonal()[:2])
    assert sum(reference.pairwise_terms(a, b, **metric)).equal(S)


def test_the_comparison_finds_one_wrong_coordinate() -> None:
    """It bounds the worst coordinate and the norm, and says where."""
    expected = torch.randn(200, 200, dtype=torch.float64)
    wrong = expected.clone()
    wrong[150, 7] += 0.5
    with pytest.raises(AssertionError, match=r"\[150, 7\]: got"):
        assert_close(wrong, expected, tolerance(torch.bfloat16))
    with pytest.raises(AssertionError, match="relative Frobenius error"):
        assert_close(expected * 1.001, expected, tolerance(torch.float32))
    unwritten = expected.clone()
    unwritten[3, 4] = float("nan")
    with pytest.raises(AssertionError, match=r"\[3, 4\]: got nan"):
        assert_close(unwritten, expected, tolerance(torch.bfloat16))
    assert_close(expected * (1 + 1e-6), expected, tolerance(torch.float32))


def test_an_unknown_kernel_is_an_attribute_error() -> None:
    """`kernels` imports its modules at first use, and reports what it lacks as any module does."""
    with pytest.raises(AttributeError, match=r"'gssf_triton\.kernels' has no attribute 'nothing'"):
        _ = kernels.nothing
