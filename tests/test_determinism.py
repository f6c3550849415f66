"""The same call gives the same bits: values and every gradient, with and without deterministic algorithms asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.reference import features, weights
from torch import Tensor

import gssf_triton


@pytest.fixture
def deterministic(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


def run(function: str, tensors: dict[str, Tensor], grads: list[Tensor], **options: object) -> list[Tensor]:
    """Outputs, gradients and the gradient of a gradient, from fresh leaves."""
    fresh = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    out = getattr(gssf_triton, function)(**fresh, **options)
    outputs = list(out) if isinstance(out, tuple) else [out]
    first = torch.autograd.grad(outputs, list(fresh.values()), grads, create_graph=True)
    second = torch.autograd.grad([g.square().sum() for g in first], list(fresh.values()), allow_unused=True)
    return [x.detach() for x in (*outputs, *first, *(g for g in second if g is not None))]


@pytest.mark.parametrize(
    ("function", "dtype", "deterministic"),
    [
        ("pairwise_sim", torch.float32, True),
        ("pairwise_sim", torch.bfloat16, False),
        ("pairwise_terms", torch.float32, False),
        ("pairwise_terms", torch.bfloat16, True),
        ("paired_sim", torch.bfloat16, True),
        ("paired_sim", torch.float32, False),
        ("transform", torch.bfloat16, True),
        ("transform", torch.float32, False),
    ],
    ids=["pairwise_sim-deterministic", "pairwise_sim", "pairwise_terms", "pairwise_terms-deterministic",
         "paired_sim-deterministic", "paired_sim", "transform-deterministic", "transform"],
    indirect=["deterministic"],
)  # fmt: skip
def test_same_call_same_bits(function: str, dtype: torch.dtype, deterministic: bool, backend: str, device: str) -> None:
    M = 67 if device == "cpu" else 4099  # several tiles of rows, the last one ragged
    N = M if function == "paired_sim" else M // 2
    rows = {"x": M} if function == "transform" else {"a": M, "b": N}
    tensors = {name: features(n, 32, dtype=dtype, device=device) for name, n in rows.items()}
    tensors |= weights("diag+blocks", 2, 16, torch.float32, device)
    with torch.no_grad():
        out = getattr(gssf_triton, function)(**tensors, normalize=True, backend=backend)
    grads = [torch.randn_like(o) for o in (out if isinstance(out, tuple) else [out])]
    first = run(function, tensors, grads, normalize=True, backend=backend)
    assert not any(x.isnan().any() for x in first)
    again = run(function, tensors, grads, normalize=True, backend=backend)
    for now, before in zip(again, first, strict=True):
        assert torch.equal(now, before)


def test_inputs_are_never_written_to(backend: str, device: str) -> None:
    """Not in forward and not in backward, the incoming gradient included."""
    tensors = {"a": features(17, 24, device=device), "b": features(9, 24, device=device)}
    tensors |= weights("diag+blocks", 3, 8, device=device)
    versions = {}
    for name, x in tensors.items():
        x.requires_grad_()
        versions[name] = x._version
    S = gssf_triton.pairwise_sim(**tensors, normalize=True, backend=backend)
    grad = torch.randn_like(S)
    kept = {name: x.detach().clone() for name, x in (tensors | {"grad": grad}).items()}
    S.backward(grad)
    for name, x in (tensors | {"grad": grad}).items():
        assert torch.equal(x.detach(), kept[name]), name
    assert versions == {name: x._version for name, x in tensors.items()}
