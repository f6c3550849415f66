"""memory="fast": the forward pass stores S for the backward pass, in half precision where the features are in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.losses_problem import problem
from support.reference import assert_close, tolerance

import gssf_triton
from gssf_triton.kernels import choice
from gssf_triton.kernels.configs import ChunkConfig, PairwiseConfig

OPTIONS: list[dict[str, Any]] = [
    {}, {"ids": True, "label_smoothing": 0.1}, {"symmetric": False, "reduction": "none"}, {"normalize": False},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_errors_are_those_of_the_default(
    dtype: torch.dtype, options: dict[str, Any], backend: str, device: str
) -> None:
    p = problem("info_nce", 70, dtype=dtype, device=device, memory="fast", **options)
    with choice.use(chunk=ChunkConfig(32, 48)):
        loss = p.call(backend)
        loss.sum().backward()
    expected, leaves = p.exact()
    expected.sum().backward()
    assert_close(loss.cpu(), expected, tolerance(dtype), size=torch.full_like(expected.detach(), float(p.scale())))
    for name, x in p.leaves.items():
        assert x.grad is not None
        assert_close(x.grad.cpu(), leaves[name].grad, tolerance(dtype), name=f"d{name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_small_in_its_row_may_be_large_in_its_column(dtype: torch.dtype, backend: str, device: str) -> None:
    """A hub above all rows: its logits are 75 nats above those that make up the other columns' softmaxes."""
    N, D, scale = 48, 16, 75.0
    rows = torch.nn.functional.normalize(torch.cat((torch.ones(N, 1), 0.1 * torch.randn(N, D - 1)), 1), dim=1)
    columns = torch.cat((torch.zeros(N, 1), torch.randn(N, D - 1)), 1)
    columns[0] = torch.eye(D)[0]
    leaves = [x.to(device, dtype).requires_grad_() for x in (rows, columns)]
    exact = [x.detach().double().requires_grad_() for x in leaves]

    def gradients(features: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, ...]:
        W_diag = torch.ones(D, dtype=torch.promote_types(features[0].dtype, torch.float32), device=device)
        loss = gssf_triton.info_nce(*features, W_diag, logit_scale=scale, normalize=True, **options)
        return torch.autograd.grad(loss, features)

    with choice.use(chunk=ChunkConfig(16, 32)):
        found = gradients(leaves, backend=backend, memory="fast")
    for ours, expected in zip(found, gradients(exact, backend="torch"), strict=True):
        # All columns but the hub's.
        error = (ours[1:].double() - expected[1:]).norm() / expected[1:].norm()
        assert error <= tolerance(dtype), f"off by {error:.2g}"


def test_the_same_bits_twice_and_from_a_second_backward_pass(backend: str, device: str) -> None:
    p = problem("info_nce", 50, dtype=torch.bfloat16, device=device, memory="fast")
    with choice.use(chunk=ChunkConfig(16, 32)):
        loss = p.call(backend)
        first, second = (torch.autograd.grad(loss, list(p.leaves.values()), retain_graph=True) for _ in range(2))
        again = torch.autograd.grad(p.call(backend), list(p.leaves.values()))
    for x, y, z in zip(first, second, again, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_compiled_as_the_default(device: str) -> None:
    p = problem("info_nce", 20, device=device)
    compiled = torch.compile(lambda: p.call("torch", memory="fast"), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(), p.call("torch"))


def test_another_tile_in_the_backward_pass(device: str) -> None:
    """Chosen by a measurement in between, for example: the tops in store are of other tiles."""
    p = problem("info_nce", 70, dtype=torch.bfloat16, device=device, memory="fast")
    loss = p.call("triton")
    expected = torch.autograd.grad(p.call("triton"), list(p.leaves.values()))
    with choice.use(stream=PairwiseConfig(32, 64, 32, num_warps=4, num_stages=1, GROUP_M=2)):
        found = torch.autograd.grad(loss, list(p.leaves.values()))
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 2 * tolerance(torch.bfloat16))


def test_an_infinity_takes_nothing_from_the_rest_of_its_row(backend: str, device: str) -> None:
    """A column of −inf: the other similarities of a row lie as near each other as without it."""
    a, b = (torch.randn(40, 8, device=device).bfloat16() for _ in "ab")
    a[:, 2], b[5, 2] = a[:, 2].abs() + 0.1, float("-inf")
    a.requires_grad_()
    b.requires_grad_()
    found = []
    for memory in ("least", "fast"):
        with choice.use(chunk=ChunkConfig(16, 32)):
            loss = gssf_triton.info_nce(
                a, b, torch.ones(8, device=device), logit_scale=1.0, symmetric=False, reduction="none",
                memory=memory, backend=backend,
            )[6:].sum()  # fmt: skip
        found.append(torch.autograd.grad(loss, (a, b)))
    for default, fast in zip(*found, strict=True):
        assert torch.equal(default.isfinite(), fast.isfinite()) and default.isfinite().any()
        finite = default.isfinite()
        assert_close(fast[finite], default[finite], 2 * tolerance(torch.bfloat16))
