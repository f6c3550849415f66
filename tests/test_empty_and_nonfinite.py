"""Nothing, NaN and infinity: empty inputs give empty results, and what is not finite stays in its row and is seen."""

from __future__ import annotations

import pytest
import torch
from support.reference import assert_close, check, features, tolerance, weights
from torch import Tensor

import gssf_triton
from gssf_triton.kernels.choice import force_plan
from gssf_triton.kernels.plans import PLANS

NAN, INF = float("nan"), float("inf")


def test_uninitialised_memory_is_poisoned(device: str) -> None:
    """What every other test counts on: a buffer nobody wrote holds NaN."""
    x = torch.randn(2, 3, device=device)
    for fresh in (torch.empty(2, 3, device=device), torch.empty_like(x), x.new_empty(4)):
        assert fresh.isnan().all()


# ---------------------------------------------------------------- empty


def leaves(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if x is None else x.requires_grad_() for name, x in tensors.items()}


EMPTY = [
    ("no-row-of-a", (0, 24), (5, 24)),
    ("no-row-of-b", (5, 24), (0, 24)),
    ("no-row-at-all", (0, 24), (0, 24)),
    ("no-batch", (0, 5, 24), (0, 7, 24)),
    ("no-batch-to-broadcast-to", (0, 5, 24), (7, 24)),
]


@pytest.mark.parametrize(("shape_a", "shape_b"), [case[1:] for case in EMPTY], ids=[case[0] for case in EMPTY])
@pytest.mark.parametrize("kind", ["diag", "blocks", "diag+blocks"])
@pytest.mark.parametrize("normalize", [False, True], ids=["as-is", "normalize"])
def test_empty_similarities(
    shape_a: tuple[int, ...], shape_b: tuple[int, ...], kind: str, normalize: bool, backend: str, device: str
) -> None:
    tensors = {"a": features(*shape_a, device=device), "b": features(*shape_b, device=device)}
    tensors = leaves(tensors | weights(kind, 3, 8, device=device))
    for plan in PLANS:
        with force_plan(plan):
            (S,) = check("pairwise_sim", tensors, normalize=normalize, backend=backend)
        assert S.shape == (*torch.broadcast_shapes(shape_a[:-2], shape_b[:-2]), shape_a[-2], shape_b[-2])
        for x in tensors.values():
            assert x is None or (x.grad is not None and x.grad.shape == x.shape and not x.grad.any())


def test_empty_terms(backend: str, device: str) -> None:
    tensors = {"a": features(0, 24, device=device), "b": features(5, 24, device=device)}
    tensors = leaves(tensors | weights("diag+blocks", 3, 8, device=device))
    diagonal, block = check("pairwise_terms", tensors, backend=backend)
    assert diagonal.shape == block.shape == (0, 5)


@pytest.mark.parametrize("shape", [(0, 24), (0, 5, 24), (2, 0, 24)], ids=["no-row", "no-batch", "batch-of-no-row"])
def test_empty_pairs_and_transforms(shape: tuple[int, ...], backend: str, device: str) -> None:
    tensors = {"a": features(*shape, device=device), "b": features(*shape, device=device)}
    tensors = leaves(tensors | weights("diag+blocks", 3, 8, device=device))
    (s,) = check("paired_sim", tensors, normalize=True, backend=backend)
    assert s.shape == shape[:-1]
    folded_tensors = leaves({"x": features(*shape, device=device), **weights("diag+blocks", 3, 8, device=device)})
    (folded,) = check("transform", folded_tensors, backend=backend)
    assert folded.shape == shape
    for x in (*tensors.values(), *folded_tensors.values()):
        assert x is not None and x.grad is not None and x.grad.shape == x.shape and not x.grad.any()


def test_no_channel(backend: str, device: str) -> None:
    """D = 0: every similarity is an empty sum, 0."""
    tensors = leaves({"a": features(3, 0, device=device), "b": features(5, 0, device=device)})
    tensors["W_diag"] = torch.zeros(0, device=device, requires_grad=True)
    (S,) = check("pairwise_sim", tensors, backend=backend)
    assert torch.equal(S.detach(), torch.zeros(3, 5, device=device))


# ---------------------------------------------------------------- NaN and infinity

POISON = pytest.mark.parametrize("poison", [NAN, -INF], ids=["nan", "-inf"])
#: The row that rows past the end may load in their place, the first of a second tile, the last of a ragged one.
ROWS = pytest.mark.parametrize("row", [0, 16, 36])


def clean(device: str) -> dict[str, Tensor]:
    tensors = {"a": features(37, 40, device=device), "b": features(37, 40, device=device)}
    return tensors | weights("diag+blocks", 5, 8, device=device)


def other_rows(row: int, device: str) -> Tensor:
    return torch.arange(37, device=device) != row


@POISON
@pytest.mark.parametrize(
    ("row", "normalize"), [(0, False), (0, True), (16, False), (36, True)],
    ids=["0-as-is", "0-normalize", "16-as-is", "36-normalize"],
)  # fmt: skip
def test_a_bad_row_stays_in_its_row(poison: float, row: int, normalize: bool, backend: str, device: str) -> None:
    tensors, keep = clean(device), other_rows(row, device)
    options = {"normalize": normalize, "backend": backend}
    before = gssf_triton.pairwise_sim(**tensors, **options)
    pairs = gssf_triton.paired_sim(**tensors, **options)
    bad = {side: tensors[side].clone() for side in "ab"}
    for side in "ab":
        bad[side][row, 11] = poison

    S = gssf_triton.pairwise_sim(**tensors | {"a": bad["a"]}, **options)
    assert not S[row].isfinite().any()
    assert_close(S[keep], before[keep], tolerance(S.dtype), name="the other rows")
    S = gssf_triton.pairwise_sim(**tensors | {"b": bad["b"]}, **options)
    assert not S[:, row].isfinite().any()
    assert_close(S[:, keep], before[:, keep], tolerance(S.dtype), name="the other columns")
    for side in "ab":
        s = gssf_triton.paired_sim(**tensors | {side: bad[side]}, **options)
        assert not s[row].isfinite()
        assert_close(s[keep], pairs[keep], tolerance(s.dtype), name="the other pairs")


@POISON
@ROWS
def test_a_bad_channel_stays_in_its_block_of_the_transform(poison: float, row: int, backend: str, device: str) -> None:
    """As in torch: channel 11 meets the weights of its own block, 8 to 15, and no other."""
    tensors = clean(device)
    metric = {name: tensors[name] for name in ("W_diag", "W_blocks")}
    before = gssf_triton.transform(tensors["a"], **metric, backend=backend)
    bad = tensors["a"].clone()
    bad[row, 11] = poison
    folded = gssf_triton.transform(bad, **metric, backend=backend)
    touched = torch.zeros(37, 40, dtype=torch.bool, device=device)
    touched[row, 8:16] = True
    assert not folded[touched].isfinite().any()
    assert_close(folded[~touched], before[~touched], tolerance(folded.dtype), name="everything else")
    alone = gssf_triton.transform(bad, W_diag=metric["W_diag"], backend=backend)
    assert (~alone.isfinite()).nonzero().tolist() == [[row, 11]]


@ROWS
def test_a_row_of_no_length_is_seen(row: int, backend: str, device: str) -> None:
    """A NaN leaves its row no norm, so with normalize=True the whole row of T(x) is NaN, as in torch."""
    tensors = clean(device)
    tensors["a"][row, 11] = NAN
    for kind in ("W_diag", "W_blocks"):
        folded = gssf_triton.transform(tensors["a"], **{kind: tensors[kind]}, normalize=True, backend=backend)
        assert folded[row].isnan().all()
        assert folded[other_rows(row, device)].isfinite().all()


@POISON
@pytest.mark.parametrize("normalize", [False, True], ids=["as-is", "normalize"])
def test_a_bad_incoming_gradient_stays_in_its_rows(poison: float, normalize: bool, backend: str, device: str) -> None:
    """dS[16, 36] reaches row 16 of da, row 36 of db and the weights; never another row."""
    tensors = {name: x.requires_grad_() for name, x in clean(device).items()}
    grad = torch.randn(37, 37, device=device)
    S = gssf_triton.pairwise_sim(**tensors, normalize=normalize, backend=backend)
    clean_grads = torch.autograd.grad(S, [tensors["a"], tensors["b"]], grad, retain_graph=True)
    grad[16, 36] = poison
    da, db, dW_diag, dW_blocks = torch.autograd.grad(S, list(tensors.values()), grad)
    for got, expected, row in ((da, clean_grads[0], 16), (db, clean_grads[1], 36)):
        keep = other_rows(row, device)
        assert not got[row].isfinite().any()
        assert_close(got[keep], expected[keep], tolerance(got.dtype), name=f"every row but {row}")
    assert not dW_diag.isfinite().any() and not dW_blocks.isfinite().any()


def test_a_bad_row_stays_in_its_row_of_the_gradient(backend: str, device: str) -> None:
    """With normalize=True the gradient of a row looks at the row: row 16 of da is NaN, and the others are as before."""
    tensors = clean(device)
    grads = []
    for poison in (None, NAN):
        a = tensors["a"].clone()
        if poison is not None:
            a[16, 3] = poison
        a.requires_grad_()
        S = gssf_triton.pairwise_sim(**tensors | {"a": a}, normalize=True, backend=backend)
        torch.manual_seed(0)
        S.backward(torch.randn_like(S))
        grads.append(a.grad)
    keep = other_rows(16, device)
    assert grads[1][16].isnan().all()
    assert_close(grads[1][keep], grads[0][keep], tolerance(torch.float32))


@pytest.mark.parametrize("weight", ["W_diag", "W_blocks"])
def test_a_bad_weight_is_seen(weight: str, backend: str, device: str) -> None:
    tensors = clean(device)
    tensors[weight].view(-1)[0] = NAN
    assert gssf_triton.pairwise_sim(**tensors, backend=backend).isnan().all()
    assert gssf_triton.paired_sim(**tensors, backend=backend).isnan().all()


def test_overflow_is_infinite_as_in_torch(backend: str, device: str) -> None:
    a = torch.full((3, 24), 300.0, dtype=torch.float16, device=device)
    metric = torch.ones(24, dtype=torch.float16, device=device)
    assert (gssf_triton.pairwise_sim(a, a, metric, backend=backend) == INF).all()
    assert (gssf_triton.paired_sim(a, a, metric, backend=backend) == INF).all()
    wide = gssf_triton.pairwise_sim(a, a, metric, out_dtype=torch.float32, backend=backend)
    assert torch.equal(wide, torch.full((3, 3), 24 * 90000.0, device=device))
