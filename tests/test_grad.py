"""Is it right? Values and gradients of every public function against the definition in float64.

    pytest tests/test_grad.py

checks this on your machine: on your GPU if Triton compiles for it, else in Triton's interpreter, and in plain torch.
Every test compares one call of `gssf_triton` with the function of the same name in `reference.py`, the sum over
channels as the paper writes it, within the one table of tolerances there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from support.reference import check, features, weights
from torch import Tensor

import gssf_triton
from gssf_triton.kernels.choice import force_plan
from gssf_triton.kernels.plans import PLANS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = ["diag", "blocks", "diag+blocks"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_weight = pytest.mark.parametrize("kind", WEIGHTS)
normalized = pytest.mark.parametrize("normalize", [False, True], ids=["as-is", "normalize"])


def leaves(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Ask for every gradient."""
    return {name: None if x is None else x.requires_grad_() for name, x in tensors.items()}


# ---------------------------------------------------------------- every function


@dtypes
@every_weight
@normalized
def test_pairwise_sim(dtype: torch.dtype, kind: str, normalize: bool, backend: str, device: str) -> None:
    a, b = features(17, 96, dtype=dtype, device=device), features(33, 96, dtype=dtype, device=device)
    tensors = leaves({"a": a, "b": b, **weights(kind, 3, 32, dtype, device)})
    (S,) = check("pairwise_sim", tensors, normalize=normalize, backend=backend)
    assert S.dtype == dtype and S.shape == (17, 33)


@dtypes
@normalized
def test_pairwise_terms(dtype: torch.dtype, normalize: bool, backend: str, device: str) -> None:
    a, b = features(17, 96, dtype=dtype, device=device), features(33, 96, dtype=dtype, device=device)
    tensors = leaves({"a": a, "b": b, **weights("diag+blocks", 3, 32, dtype, device)})
    diagonal, block = check("pairwise_terms", tensors, normalize=normalize, backend=backend)
    assert diagonal.dtype == block.dtype == dtype


@dtypes
@every_weight
@normalized
def test_paired_sim(dtype: torch.dtype, kind: str, normalize: bool, backend: str, device: str) -> None:
    a, b = features(33, 96, dtype=dtype, device=device), features(33, 96, dtype=dtype, device=device)
    tensors = leaves({"a": a, "b": b, **weights(kind, 3, 32, dtype, device)})
    (s,) = check("paired_sim", tensors, normalize=normalize, backend=backend)
    assert s.dtype == dtype and s.shape == (33,)


@dtypes
@every_weight
@pytest.mark.parametrize("side", ["a", "b"])
def test_transform(dtype: torch.dtype, kind: str, side: str, backend: str, device: str) -> None:
    tensors = leaves({"x": features(33, 96, dtype=dtype, device=device), **weights(kind, 3, 32, dtype, device)})
    (folded,) = check("transform", tensors, side=side, backend=backend)
    assert folded.dtype == dtype and folded.shape == (33, 96)


@every_weight
def test_transform_of_unit_rows(kind: str, backend: str, device: str) -> None:
    tensors = leaves({"x": features(17, 40, device=device), **weights(kind, 5, 8, device=device)})
    check("transform", tensors, normalize=True, backend=backend)


@dtypes
@every_weight
def test_dense_metric(dtype: torch.dtype, kind: str, device: str) -> None:
    (dense,) = check("dense_metric", leaves(weights(kind, 3, 8, dtype, device)))
    assert dense.dtype == dtype and dense.shape == (24, 24)


# ---------------------------------------------------------------- every shape


@pytest.mark.parametrize(
    ("G", "B"),
    [(5, 4), (3, 5), (3, 8), (3, 12), (2, 16), (3, 32), (2, 64), (1, 128), (2, 256), (20, 1), (1, 7), (40, 3)],
    ids=lambda n: str(n),
)
def test_block_sizes(G: int, B: int, backend: str, device: str) -> None:
    """Powers of two and not, one group and many, D a power of two and not."""
    tensors = {"a": features(17, G * B, device=device), "b": features(18, G * B, device=device)}
    check("pairwise_sim", leaves(tensors | weights("diag+blocks", G, B, device=device)), backend=backend)


@pytest.mark.parametrize("D", [1, 2, 31, 64, 130])
def test_channels_of_a_diagonal_metric(D: int, backend: str, device: str) -> None:
    tensors = {"a": features(17, D, device=device), "b": features(18, D, device=device)}
    check("pairwise_sim", leaves(tensors | weights("diag", D, 1, device=device)), backend=backend)


@pytest.mark.parametrize(
    ("M", "N"), [(1, 1), (1, 65), (65, 1), (2, 17), (17, 2), (33, 65), (65, 33), (65, 65)], ids=lambda n: str(n)
)
def test_rows(M: int, N: int, backend: str, device: str) -> None:
    """One row, and rows that fill no tile; whichever side is cheaper to fold."""
    tensors = {"a": features(M, 40, device=device), "b": features(N, 40, device=device)}
    check("pairwise_sim", leaves(tensors | weights("diag+blocks", 5, 8, device=device)), backend=backend)


@pytest.mark.parametrize("N", [1, 2, 17, 65])
def test_rows_of_paired_sim_and_transform(N: int, backend: str, device: str) -> None:
    metric = weights("diag+blocks", 5, 8, device=device)
    tensors = {"a": features(N, 40, device=device), "b": features(N, 40, device=device)}
    check("paired_sim", leaves(tensors | metric), backend=backend)
    metric = weights("diag+blocks", 5, 8, device=device)
    check("transform", leaves({"x": features(N, 40, device=device), **metric}), backend=backend)


@normalized
def test_leading_dimensions_broadcast(normalize: bool, backend: str, device: str) -> None:
    """The gradient of a broadcast side is summed over what it was broadcast to."""
    tensors = {"a": features(2, 1, 5, 24, device=device), "b": features(3, 7, 24, device=device)}
    tensors = leaves(tensors | weights("diag+blocks", 3, 8, device=device))
    (S,) = check("pairwise_sim", tensors, normalize=normalize, backend=backend)
    assert S.shape == (2, 3, 5, 7)


def test_leading_dimensions_of_paired_sim_and_transform(backend: str, device: str) -> None:
    metric = weights("diag+blocks", 3, 8, device=device)
    tensors = {"a": features(2, 1, 5, 24, device=device), "b": features(3, 5, 24, device=device)}
    (s,) = check("paired_sim", leaves(tensors | metric), backend=backend)
    assert s.shape == (2, 3, 5)
    metric = weights("diag+blocks", 3, 8, device=device)
    check("transform", leaves({"x": features(24, device=device), **metric}), backend=backend)
    metric = weights("diag+blocks", 3, 8, device=device)
    check("transform", leaves({"x": features(2, 3, 4, 24, device=device), **metric}), backend=backend)


# ---------------------------------------------------------------- every plan

plans = pytest.mark.parametrize("plan", PLANS)


@pytest.mark.kernels
@plans
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in WEIGHTS), ("diag+blocks", torch.bfloat16), ("diag+blocks", torch.float16)],
    ids=["diag-float32", "blocks-float32", "diag+blocks-float32", "diag+blocks-bfloat16", "diag+blocks-float16"],
)
def test_plans(plan: str, kind: str, dtype: torch.dtype, device: str) -> None:
    """One kernel, or fold and then the library's product; either side folded; what the estimate would choose or not.

    Every dtype with one term alone is in `test_pairwise_sim`.
    """
    for M, N, normalize in ((17, 33, True), (33, 17, False)):
        a, b = features(2, M, 40, dtype=dtype, device=device), features(2, N, 40, dtype=dtype, device=device)
        tensors = leaves({"a": a, "b": b, **weights(kind, 5, 8, dtype, device)})
        with force_plan(plan):
            check("pairwise_sim", tensors, normalize=normalize, backend="triton")


@pytest.mark.kernels
@plans
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=["to-float32", "to-bfloat16"])
def test_plans_to_another_dtype(plan: str, out_dtype: torch.dtype, device: str) -> None:
    for M, N, normalize in ((17, 33, True), (33, 17, False)):
        a, b = (features(rows, 40, dtype=torch.float16, device=device) for rows in (M, N))
        tensors = leaves({"a": a, "b": b, **weights("diag+blocks", 5, 8, torch.float32, device)})
        with force_plan(plan):
            check("pairwise_sim", tensors, out_dtype=out_dtype, normalize=normalize, backend="triton")


# ---------------------------------------------------------------- only the gradients asked for

TENSORS = ("a", "b", "W_diag", "W_blocks")
#: None, one, all but one, and all: every two of the tensors are wanted together, apart and not at all.
SUBSETS = [subset for size in (0, 1, 3, 4) for subset in itertools.combinations(TENSORS, size)]


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(subset) or "none")
def test_only_the_gradients_asked_for(subset: tuple[str, ...], backend: str, device: str) -> None:
    """`check` holds every other tensor's .grad to None."""
    tensors = {"a": features(17, 24, device=device), "b": features(5, 24, device=device)}
    tensors |= weights("diag+blocks", 3, 8, device=device)
    for name in subset:
        tensors[name].requires_grad_()
    check("pairwise_sim", tensors, backend=backend)


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(subset) or "none")
def test_only_the_gradients_asked_for_of_paired_sim(subset: tuple[str, ...], backend: str, device: str) -> None:
    tensors = {"a": features(9, 24, device=device), "b": features(9, 24, device=device)}
    tensors |= weights("diag+blocks", 3, 8, device=device)
    for name in subset:
        tensors[name].requires_grad_()
    check("paired_sim", tensors, backend=backend)


@pytest.mark.parametrize("wanted", ["x", "W_diag", "W_blocks"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_one_gradient_of_transform(wanted: str, kind: str, backend: str, device: str) -> None:
    tensors = {"x": features(9, 24, device=device), **weights(kind, 3, 8, device=device)}
    leaf = tensors[wanted]
    if leaf is not None:
        leaf.requires_grad_()
    check("transform", tensors, backend=backend)


def test_one_of_the_two_terms_alone(backend: str, device: str) -> None:
    """A loss that uses one term only gives the other term's weight no gradient, or zeros."""
    a, b = features(9, 24, device=device), features(7, 24, device=device)
    metric = weights("diag+blocks", 3, 8, device=device)
    tensors = leaves({"a": a, "b": b} | metric)
    _, block = gssf_triton.pairwise_terms(**tensors, backend=backend)
    grad = torch.randn_like(block)
    block.backward(grad)
    alone = leaves({name: x.detach().clone() for name, x in tensors.items() if name != "W_diag"})
    gssf_triton.pairwise_sim(**alone, backend="torch").backward(grad)
    for name, x in alone.items():
        torch.testing.assert_close(tensors[name].grad, x.grad)
    unused = tensors["W_diag"].grad
    assert unused is None or not unused.any()


# ---------------------------------------------------------------- every kind of incoming gradient

GRAD_OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "large": lambda out: 1e3 * torch.randn_like(out),
    "one-number-expanded": lambda out: torch.full((), -2.5).to(out).expand(out.shape),
    "rows-expanded": lambda out: torch.randn_like(out[..., :1]).expand(out.shape),
    "transposed": lambda out: torch.randn_like(out.mT.contiguous()).mT,
    "every-second": lambda out: torch.randn((*out.shape[:-1], 2 * out.shape[-1])).to(out)[..., ::2],
}


@pytest.mark.parametrize("form", GRAD_OUTPUTS)
def test_incoming_gradients(form: str, backend: str, device: str) -> None:
    tensors = {"a": features(2, 17, 24, device=device), "b": features(2, 9, 24, device=device)}
    tensors = leaves(tensors | weights("diag+blocks", 3, 8, device=device))
    check("pairwise_sim", tensors, grad_output=GRAD_OUTPUTS[form], backend=backend)


@pytest.mark.parametrize("form", GRAD_OUTPUTS)
def test_incoming_gradients_of_paired_sim_and_transform(form: str, backend: str, device: str) -> None:
    tensors = {"a": features(2, 9, 24, device=device), "b": features(2, 9, 24, device=device)}
    tensors = leaves(tensors | weights("diag+blocks", 3, 8, device=device))
    check("paired_sim", tensors, grad_output=GRAD_OUTPUTS[form], backend=backend)
    tensors = leaves({"x": features(2, 9, 24, device=device), **weights("diag+blocks", 3, 8, device=device)})
    check("transform", tensors, grad_output=GRAD_OUTPUTS[form], backend=backend)


def test_one_tensor_on_both_sides(backend: str, device: str) -> None:
    """The gradient of S(x, x) is the sum of both sides' gradients."""
    x = features(17, 24, device=device).requires_grad_()
    metric = weights("diag+blocks", 3, 8, device=device)
    grad = torch.randn(17, 17, device=device)
    gssf_triton.pairwise_sim(x, x, **metric, normalize=True, backend=backend).backward(grad)
    a, b = (x.detach().clone().requires_grad_() for _ in range(2))
    gssf_triton.pairwise_sim(a, b, **metric, normalize=True, backend=backend).backward(grad)
    torch.testing.assert_close(x.grad, a.grad + b.grad)


# ---------------------------------------------------------------- mixed dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@normalized
def test_float32_weights_beside_half_precision_features(
    dtype: torch.dtype, normalize: bool, backend: str, device: str
) -> None:
    """`check` holds each gradient to its own tensor's dtype: float32 for the weights."""
    metric = weights("diag+blocks", 3, 32, torch.float32, device)
    tensors = {"a": features(33, 96, dtype=dtype, device=device), "b": features(17, 96, dtype=dtype, device=device)}
    (S,) = check("pairwise_sim", leaves(tensors | metric), normalize=normalize, backend=backend)
    assert S.dtype == dtype

    metric = weights("diag+blocks", 3, 32, torch.float32, device)
    tensors = {"a": features(33, 96, dtype=dtype, device=device), "b": features(33, 96, dtype=dtype, device=device)}
    (s,) = check("paired_sim", leaves(tensors | metric), normalize=normalize, backend=backend)
    assert s.dtype == dtype

    metric = weights("diag+blocks", 3, 32, torch.float32, device)
    tensors = {"x": features(33, 96, dtype=dtype, device=device)}
    (folded,) = check("transform", leaves(tensors | metric), normalize=normalize, backend=backend)
    assert folded.dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.bfloat16),
    ],
    ids=[
        "bfloat16-to-float32",
        "float16-to-float32",
        "float32-to-bfloat16",
        "float32-to-float64",
        "float64-to-bfloat16",
    ],
)
@pytest.mark.parametrize("function", ["pairwise_sim", "pairwise_terms", "paired_sim"])
def test_out_dtype(dtype: torch.dtype, out_dtype: torch.dtype, function: str, backend: str, device: str) -> None:
    tensors = {"a": features(17, 24, dtype=dtype, device=device), "b": features(17, 24, dtype=dtype, device=device)}
    tensors = leaves(tensors | weights("diag+blocks", 3, 8, dtype, device))
    for out in check(function, tensors, out_dtype=out_dtype, backend=backend):
        assert out.dtype == out_dtype


def test_float32_output_is_accumulated_not_widened(backend: str, device: str) -> None:
    """out_dtype=float32 keeps what rounding S to bfloat16 would lose."""
    a, b = (features(33, 96, dtype=torch.bfloat16, device=device) for _ in range(2))
    metric = weights("diag", 96, 1, torch.bfloat16, device)
    wide = gssf_triton.pairwise_sim(a, b, **metric, out_dtype=torch.float32, backend=backend)
    assert not torch.equal(wide, wide.bfloat16().float())


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_tf32_stays_within_its_tolerance(precision: str, backend: str, device: str) -> None:
    torch.set_float32_matmul_precision(precision)
    tensors = {"a": features(33, 96, device=device), "b": features(17, 96, device=device)}
    check("pairwise_sim", leaves(tensors | weights("diag+blocks", 3, 32, device=device)), backend=backend)


# ---------------------------------------------------------------- gradients and second derivatives, numerically

FUNCTIONS = ["pairwise_sim", "paired_sim", "transform"]


def numeric_problem(function: str, kind: str, normalize: bool, backend: str, device: str) -> tuple:
    """A float64 call as a function of its tensors alone, small enough for finite differences."""
    rows = {"a": 3, "b": 2 if function == "pairwise_sim" else 3} if function != "transform" else {"x": 3}
    tensors = {name: features(n, 6, dtype=torch.float64, device=device) for name, n in rows.items()}
    tensors |= {name: w for name, w in weights(kind, 2, 3, torch.float64, device).items() if w is not None}
    tensors = leaves(tensors)

    def call(*values: Tensor) -> Tensor:
        return getattr(gssf_triton, function)(
            **dict(zip(tensors, values, strict=True)), normalize=normalize, backend=backend
        )

    return call, tuple(tensors.values())


TERMS = pytest.mark.parametrize(
    ("kind", "normalize"),
    [("diag", False), ("blocks", False), ("diag+blocks", False), ("diag+blocks", True)],
    ids=["diag", "blocks", "diag+blocks", "diag+blocks-normalize"],
)


@pytest.mark.parametrize("function", FUNCTIONS)
@TERMS
def test_gradcheck(function: str, kind: str, normalize: bool, backend: str, device: str) -> None:
    call, tensors = numeric_problem(function, kind, normalize, backend, device)
    assert torch.autograd.gradcheck(call, tensors, fast_mode=backend == "triton")


@pytest.mark.parametrize("function", FUNCTIONS)
@TERMS
def test_gradgradcheck(function: str, kind: str, normalize: bool, device: str) -> None:
    """Second derivatives: gradient penalties and meta-learning need them."""
    call, tensors = numeric_problem(function, kind, normalize, "torch", device)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("function", "kind", "normalize"),
    [("pairwise_sim", "diag+blocks", True), ("pairwise_sim", "blocks", False), ("paired_sim", "diag+blocks", True),
     ("transform", "diag", True), ("transform", "blocks", False)],
    ids=lambda value: ("as-is", "normalize")[value] if isinstance(value, bool) else value,
)  # fmt: skip
def test_gradgradcheck_of_the_kernels(function: str, kind: str, normalize: bool, device: str) -> None:
    """Every function, and each term alone; `test_gradgradcheck` has all combinations, of the torch backend."""
    call, tensors = numeric_problem(function, kind, normalize, "triton", device)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.kernels
def test_gradgradcheck_of_fold_and_product(device: str) -> None:
    call, tensors = numeric_problem("pairwise_sim", "diag+blocks", True, "triton", device)
    with force_plan("fold_product"):
        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)
