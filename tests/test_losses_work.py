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
from gssf_triton.kernels import choice, configs
from gssf_triton.kernels.configs import ChunkConfig
from gssf_triton.kernels.stream_values import Operands
from gssf_triton.nn import GSSF, TripletLoss
from gssf_triton.streaming.driver import stream
from gssf_triton.streaming.epilogues import index_bits

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
    ("info_nce", {"memory": "fast"}, 1, 3),
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


@pytest.mark.parametrize("tiles", [(1, 1), (3, 7), (40, 79), (256, 512), (1, 15_625), (15_625, 2), (70_000, 140_000)])
@pytest.mark.parametrize("arch", ["sm_90", "interpreter"])
def test_states_of_spans_grow_with_the_sides(tiles: tuple[int, int], arch: str) -> None:
    """Every tile is in one program, the programs are as many as wanted, and their states take no more than the rows."""
    (tiles_m, tiles_n), (M, N) = tiles, (tiles[0] * 128 - 5, tiles[1] * 64 - 3)
    spans_m, spans_n = configs.stream_spans(M, N, tiles_m, tiles_n, arch)
    programs = 4 if arch == "interpreter" else configs.STREAM_PROGRAMS
    assert 1 <= spans_m <= tiles_m and 1 <= spans_n <= tiles_n
    assert min(programs, tiles_m * tiles_n) <= spans_m * spans_n <= 2 * programs
    assert spans_n * M + spans_m * N <= 1.1 * programs**0.5 * (M + N) + programs * 128


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_pass_without_slopes_is_one_launch_and_one_merge_a_side(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tiles a program each way; of equal negatives the lowest index."""
    from gssf_triton.kernels import stream as kernel

    launches: list[str] = []
    launch = kernel.launch

    def counted(function: Any, *arguments: Any, **named: Any) -> None:
        launches.append(function.__name__)
        launch(function, *arguments, **named)

    monkeypatch.setattr(kernel, "launch", counted)
    M, N = (100, 170) if device == "cpu" else (5003, 9001)
    t, y = (torch.randint(-2, 3, (n, 6), device=device).to(dtype) for n in (M, N))
    x = Operands(t, y, torch.ones(1, dtype=dtype, device=device), offset=3)
    rows, columns, *_ = stream("hinge_hardest", x, backend="triton")
    S = t @ y.mT
    S.diagonal(3).fill_(-torch.inf)
    for state, (values, indices) in ((rows, S.max(1)), (columns, S.max(0))):
        assert state[0].equal(values) and index_bits(state[1]).long().equal(indices)
    rows, columns, *_ = stream("softmax_both", x, backend="triton")
    assert launches == ["stream_kernel", "merge_kernel", "merge_kernel"] * 2
    for state, dim in ((rows, 1), (columns, 0)):
        torch.testing.assert_close(state[0] + state[1].log(), (t @ y.mT).logsumexp(dim))


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
