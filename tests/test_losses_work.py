"""What a loss does besides computing: how many products, no wait for the device, no new graph for another option."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.losses_problem import LOSSES, Problem, problem
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import gssf_triton
from gssf_triton.kernels import choice
from gssf_triton.kernels.configs import ChunkConfig
from gssf_triton.nn import GSSF, TripletLoss

losses = pytest.mark.parametrize("loss", LOSSES)

#: Operators whose result's shape or Python value depends on data: on a GPU they wait for it, and can't be captured.
WAITING = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::masked_select",
    "aten::equal", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave",
    "aten::bincount", "aten::allclose",
}  # fmt: skip
PRODUCTS = {"aten::mm": (0, 1), "aten::addmm_": (1, 2), "aten::addmm": (1, 2), "aten::bmm": (0, 1)}


def operators(call: Callable[[], object]) -> list[Any]:
    """Every operator that ran, within custom operators too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    return list(profile.events())


def flops(call: Callable[[], object]) -> int:
    """FLOPs of all matrix products in `call`."""
    total = 0
    for event in operators(call):
        if event.name in PRODUCTS:
            left, right = (event.input_shapes[i] for i in PRODUCTS[event.name])
            total += 2 * left[-2] * left[-1] * right[-1]
    return total


def both_passes(p: Problem, backend: str) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(p.call(backend).sum(), list(p.leaves.values()))


#: Products of N × N × D: (loss, options) to those of a call without a gradient, and of forward and backward.
WORK: list[tuple[str, dict[str, Any], int, int]] = [
    ("info_nce", {}, 1, 4),
    ("info_nce", {"symmetric": False, "label_smoothing": 0.1}, 1, 4),
    ("info_nce", {"reduction": "none"}, 1, 4),
    ("sigmoid_loss", {}, 1, 3),
    ("sigmoid_loss", {"reduction": "none"}, 1, 4),
    ("triplet_loss", {}, 1, 1),
    ("triplet_loss", {"hardest": False}, 1, 3),
    ("distillation_loss", {}, 1, 4),
]


@pytest.mark.parametrize(("loss", "options", "forward", "both"), WORK, ids=str)
def test_products(loss: str, options: dict[str, Any], forward: int, both: int) -> None:
    """By their FLOPs, so that chunks and their edges count for what they are."""
    N, D = 40, 24
    p = problem(loss, N, G=1, B=D, kind="diag", **options)
    product = 2 * N * N * D
    # The teacher's similarities, which every pass over S needs as well; it has 7 channels.
    teacher = 2 * N * N * 7 if loss == "distillation_loss" else 0
    with choice.use(chunk=ChunkConfig(16, 25)):
        assert flops(both_passes(p, "torch")) == both * product + 2 * teacher
        with torch.no_grad():
            assert flops(lambda: p.call("torch")) == forward * product + teacher
        for x in p.leaves.values():
            x.requires_grad_(False)
        assert flops(lambda: p.call("torch")) == forward * product + teacher


def test_waiting_would_be_seen() -> None:
    names = Counter(event.name for event in operators(lambda: torch.ones(3)[torch.ones(3) > 0].sum().item()))
    assert WAITING & names.keys() >= {"aten::nonzero", "aten::_local_scalar_dense"}


@losses
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=str)
def test_nothing_waits_for_the_device(loss: str, options: dict[str, Any], backend: str, device: str) -> None:
    """Forward and backward, ids and all: what a CUDA graph can capture."""
    p = problem(loss, 40, ids=loss != "distillation_loss", normalize=True, device=device, **options)
    call = both_passes(p, backend)
    call()
    assert not WAITING & {event.name for event in operators(call)}
    if device == "cuda":
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            captured = call()
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, call(), strict=True))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_warm_up_ends_without_compiling_again(device: str, fresh_compiler: None) -> None:
    """All negatives, then the hardest: a graph each, both kept, whatever the batch."""
    metric = GSSF(dim=12, block_size=4).to(device)
    loss = TripletLoss(metric, hardest=False).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for hardest, N in ((False, 9), (False, 14), (True, 14), (True, 11), (False, 17), (True, 10)):
        a, b = torch.randn(2, N, 12, device=device)
        loss.hardest = hardest
        ours = compiled(a, b)
        violations = loss.violations
        expected, counts = gssf_triton.triplet_loss(
            a, b, metric.W_diag, metric.W_blocks, normalize=True, hardest=hardest, return_violations=True
        )
        torch.testing.assert_close(ours, expected)
        assert violations.equal(counts)
        graphs.append(counter.frame_count)
    first = graphs[0]
    assert graphs == [first, first, *[first + 1] * 4]
