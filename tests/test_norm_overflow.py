"""Rows whose squared norm overflows are 0 on the sphere, as torch.nn.functional.normalize has them; never first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import reference
from support.reference import assert_close, features, tolerance, weights
from support.region_word_reference import REFERENCES
from torch import Tensor
from torch.nn.functional import normalize as unit_rows

import gssf_triton

#: The interpreter computes with NumPy, which says so where numbers overflow, as here they are to.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

kinds = pytest.mark.parametrize("kind", ["diag", "blocks", "diag+blocks"])


def wide(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if x is None else x.detach().double() for name, x in tensors.items()}


def overflowing(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Rows whose squared norm overflows, alone and among others; rows at the edges; an infinite one, one of NaN."""
    # Ordinary rows enough that no few of them decide over the error.
    a, b = (features(33, 64, device=device) for _ in range(2))
    for x in (a, b):
        x[1] = 3e38 * x[1].sign()
        x[2] *= 1e25
        x[3] *= 1e17
        x[4] *= 1e-30
        x[5] = 0
    a[6, 3], b[7, 40] = float("inf"), float("nan")
    return a.to(dtype), b.to(dtype)


def as_torch(a: Tensor, b: Tensor, metric: dict[str, Tensor | None]) -> Tensor:
    """By torch.nn.functional.normalize in float32, to which a row whose norm overflows is 0."""
    dense = reference.dense_metric(*(None if w is None else w.double() for w in metric.values()))
    return unit_rows(a.float(), dim=-1).double() @ dense @ unit_rows(b.float(), dim=-1).double().T


def assert_as(actual: Tensor, expected: Tensor, tol: float, name: str) -> None:
    """NaN where NaN is expected, near it elsewhere: most rows are 0, and of the few others a typical size counts."""
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN where it should not be, or none"
    exact = expected.nan_to_num()
    size = exact[exact != 0].square().mean().sqrt()
    assert_close(actual.nan_to_num(), exact, 1.5 * tol, name=name, size=size.expand(exact.shape))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_whose_norm_overflows_is_zero(kind: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Never NaN, never first; a row with an infinity in it is NaN."""
    a, b = overflowing(dtype, device)
    metric = {"W_diag": None, "W_blocks": None, **weights(kind, 4, 16, device=device)}
    expected = as_torch(a, b, metric)
    tol = tolerance(dtype)
    options: dict[str, Any] = {**metric, "normalize": True, "backend": backend}
    S = gssf_triton.pairwise_sim(a, b, **options)
    assert_as(S, expected, tol, "pairwise_sim")
    assert not S[1:3, [0, 1, 2, 3, 4, 5, 6, 8]].any() and not S[[0, 1, 2, 3, 4, 5, 7, 8], 1].any()
    more = gssf_triton.pairwise_sim(torch.cat((a, a)), b, **options)
    assert_as(more, torch.cat((expected, expected)), tol, "pairwise_sim, folding b")
    assert_as(gssf_triton.paired_sim(a, b, **options), expected.diagonal(), tol, "paired_sim")
    folded = reference.transform(unit_rows(a[:6].float(), dim=-1).double(), **wide(metric))
    assert_as(gssf_triton.transform(a[:6], **options), folded, tol, "transform")
    if kind == "diag+blocks":
        for name, term in zip(metric, gssf_triton.pairwise_terms(a, b, **options), strict=True):
            only = {"W_diag": None, "W_blocks": None, name: metric[name]}
            assert_as(term, as_torch(a, b, only), tol, f"the term of {name}")
    some = [0, 1, 3, 2, 8, 4, 5]
    values, indices = gssf_triton.topk(a[[0, 8, 1]], b[some], **options, k=7)
    chosen = expected[[0, 8, 1]][:, some]
    assert_as(values, chosen.sort(dim=1, descending=True).values, tol, "topk")
    assert_as(values, chosen.gather(1, indices), tol, "topk's indices")
    nan_first = gssf_triton.topk(a[[0]], b, **options, k=2)[1]
    assert nan_first[0, 0] == 7
    ids = torch.arange(len(some), device=device)
    # Where 0 comes among the scores: the overflowing item, the second, is each query's match.
    ranks = gssf_triton.ranks(a[[0, 8]], b[some], **options, query_ids=ids[[1, 1]], gallery_ids=ids)
    for rank, row in zip(ranks.tolist(), chosen[:2], strict=True):
        # Scores within rounding of 0 may come on either side of it.
        assert (row > tol).sum() <= rank < (row > -tol).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("function", ["late_interaction", "cross_attention_sim"])
def test_a_region_or_word_whose_norm_overflows(function: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """As with the row at 0, as torch.nn.functional.normalize has it; forward and backward, whatever is folded."""
    a, b = (x[[0, 1, 2, 3, 8, 5]] for x in overflowing(dtype, device))
    metric = weights("diag+blocks", 4, 16, device=device)
    call: Callable[..., Tensor] = getattr(gssf_triton, function)
    for regions, words in ((a.view(2, 3, 64), b[:3].view(1, 3, 64)), (a[:3].view(1, 3, 64), b.view(2, 3, 64))):
        tensors = {"regions": regions.clone().requires_grad_(), "words": words.clone().requires_grad_()}
        zeroed = {name: unit_rows(x.detach().float(), dim=-1).double().requires_grad_() for name, x in tensors.items()}
        scores = call(**tensors, **metric, normalize=True, backend=backend)
        expected = REFERENCES[function](**zeroed, **wide(metric))
        # A mean of similarities of about 1 / 8, of either sign: what they cancel to has no digits of its own.
        assert_close(scores, expected, 2 * tolerance(dtype), size=expected.detach().abs().clamp_min(1 / 8))
        for grad in torch.autograd.grad(scores.sum(), list(tensors.values())):
            assert grad.isfinite().all()


def test_gradients_of_a_row_whose_norm_overflows(backend: str, device: str) -> None:
    """0, as of any constant, and the others' are as without it."""
    a, b = (x[:4].requires_grad_() for x in (y.clone() for y in overflowing(torch.float32, device)))
    W_diag = torch.rand(64, device=device).requires_grad_()
    for function in (gssf_triton.pairwise_sim, gssf_triton.paired_sim):
        S = function(a, b, W_diag, normalize=True, backend=backend)
        exact = [unit_rows(x.detach(), dim=-1).double() for x in (a, b)]
        weight = W_diag.detach().double().requires_grad_()
        expected = (exact[0] * weight) @ exact[1].T if S.dim() == 2 else (exact[0] * weight * exact[1]).sum(1)
        (known,) = torch.autograd.grad(expected.sum(), weight)
        d_a, d_b, d_W = torch.autograd.grad(S.sum(), (a, b, W_diag))
        assert not d_a[1:3].any() and not d_b[1:3].any()
        assert d_a.isfinite().all() and d_b.isfinite().all()
        assert_close(d_W, known, tolerance(torch.float32))


@pytest.mark.parametrize("call", ["pairwise_sim", "paired_sim", "info_nce"])
@pytest.mark.parametrize("kind", ["diag", "diag+blocks"])
@pytest.mark.parametrize(("length", "incoming"), [(3e18, 1e-3), (1e-6, 1e30)], ids=["long", "short"])
def test_gradients_of_long_and_short_rows(
    call: str, kind: str, length: float, incoming: float, backend: str, device: str
) -> None:
    """Neither a norm's square nor its inverse's comes between: they leave float32's range where gradients do not."""
    a, b = features(5, 24, device=device), features(5, 24, device=device)
    a = a / torch.linalg.vector_norm(a, dim=1, keepdim=True) * length
    weight, grad = weights(kind, 3, 8, device=device), torch.randn(5, 5, device=device) * incoming

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        x = a.to(dtype).requires_grad_()
        W_diag, W_blocks = (None if w is None else w.detach().to(dtype) for w in weight.values())
        if call == "info_nce":
            out = gssf_triton.info_nce(
                x, b.to(dtype), W_diag, W_blocks, logit_scale=3.0, normalize=True, backend=backend
            )
        else:
            out = getattr(gssf_triton, call)(x, b.to(dtype), W_diag, W_blocks, normalize=True, backend=backend)
        given = {"pairwise_sim": grad, "paired_sim": grad[0], "info_nce": grad[0, 0]}[call]
        (found,) = torch.autograd.grad(out, x, given.to(dtype))
        return found

    assert_close(gradient(torch.float32, backend), gradient(torch.float64, "torch"), tolerance(torch.float32))


def test_losses_of_a_row_whose_norm_overflows(backend: str, device: str) -> None:
    a, b = (x[[0, 1, 3, 8]] for x in overflowing(torch.bfloat16, device))
    metric = weights("diag+blocks", 4, 16, device=device)
    logits = 5 * as_torch(a, b, metric)
    target = torch.arange(4, device=device)
    expected = sum(torch.nn.functional.cross_entropy(x, target) for x in (logits, logits.T)) / 2
    loss = gssf_triton.info_nce(a, b, **metric, logit_scale=5.0, normalize=True, backend=backend)
    assert_close(loss, expected, tolerance(torch.bfloat16))
