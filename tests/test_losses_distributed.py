"""A batch spread over processes: every one gets the whole batch's loss, and the mean of their gradients is its own.

gloo processes on the CPU, against one process that holds the whole batch.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.gloo import endings, in_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gssf_triton
from gssf_triton.backend import interpreter_is_on
from gssf_triton.kernels import choice
from gssf_triton.kernels.configs import ChunkConfig
from gssf_triton.nn import GSSF, DistillationLoss, InfoNCELoss, SigmoidLoss, TripletLoss

#: Pairs of each process.
PARTS = {
    "two-uneven": (5, 22),
    "three-first-empty": (0, 1, 12),
    "four-uneven": (7, 1, 12, 4),
    "nothing": (0, 0),
}
D, E = 12, 5
WEIGHTS = {"W_diag": torch.Size((D,)), "W_blocks": torch.Size((3, 4, 4))}

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("info_nce", {}),
    ("info_nce", {"symmetric": False}),
    ("info_nce", {"label_smoothing": 0.1}),
    ("sigmoid_loss", {}),
    ("triplet_loss", {}),
    ("triplet_loss", {"hardest": False}),
    ("distillation_loss", {}),
]


def call(loss: str, N: int, dtype: torch.dtype, ids: bool) -> dict[str, Any]:
    """The whole batch's call; every process makes the same one. Tensors of N rows are cut into parts."""
    tensors = {name: torch.randn(N, D, dtype=torch.float64) for name in ("a", "b")}
    tensors |= {name: 0.5 + torch.rand(shape, dtype=torch.float64) / 2 for name, shape in WEIGHTS.items()}
    if loss != "triplet_loss":
        tensors["logit_scale"] = torch.tensor(3.0, dtype=torch.float64)
    if loss == "sigmoid_loss":
        tensors["logit_bias"] = torch.tensor(-1.0, dtype=torch.float64)
    given: dict[str, Any] = {name: x.to(dtype) for name, x in tensors.items()} | {"normalize": True}
    if loss == "distillation_loss":
        given |= {name: torch.randn(N, E, dtype=dtype) for name in ("teacher_a", "teacher_b")}
    elif ids:
        # Some of one id lie in different parts.
        given["ids"] = torch.randint(0, max(N // 3, 1), (N,))
    return given


def gradients(loss: str, given: dict[str, Any], weight: Tensor | None, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradients of everything learned; `weight`: what each value counts for."""
    names = [n for n in ("a", "b", "W_diag", "W_blocks", "logit_scale", "logit_bias") if n in given]
    leaves = {name: given[name].detach().clone().requires_grad_() for name in names}
    out = getattr(gssf_triton, loss)(**(given | leaves), **options)
    total = out if weight is None else (out * weight).sum()
    return out.detach(), list(torch.autograd.grad(total, list(leaves.values())))


def assert_same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """To 1e-6 of the norm, or of a floor where it vanishes."""
    error, size = (ours - theirs).norm(), theirs.norm().clamp_min(0.1)
    assert ours.dtype == theirs.dtype and error <= 1e-6 * size, f"{what}: off by {error / size:.2g}"


def _every_loss(rank: int, sizes: tuple[int, ...], seed: int) -> None:
    group, count, N = dist.group.WORLD, len(sizes), sum(sizes)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for loss, options in VARIANTS:
        for dtype, ids, reduction in (
            (torch.float64, False, "mean"),
            (torch.float64, True, "none"),
            (torch.float32, True, "sum"),
        ):
            torch.manual_seed(seed)
            whole = call(loss, N, dtype, ids)
            # A sum of N numbers, but the same floor below errors.
            weight = torch.randn(N, dtype=dtype) if reduction == "none" else torch.tensor(1.0 if N == 0 else 1 / N)
            kwargs = options | {"reduction": reduction}
            cut = [
                name for name, x in whole.items() if isinstance(x, Tensor) and x.shape[:1] == (N,) and name != "W_diag"
            ]
            part = whole | {name: whole[name][own] for name in cut}
            one_weight = weight[own] if reduction == "none" else weight
            what = f"{loss} {options} {reduction} ids={ids} {dtype} rank {rank}"
            expected, expected_grads = gradients(loss, whole, weight, **kwargs)
            ours, grads = gradients(loss, part, one_weight, group=group, **kwargs)
            assert_same(ours, expected[own] if reduction == "none" else expected, what)
            # What DDP does to the gradient of a parameter; with "none" a process's loss is its own values' alone.
            share = count if reduction == "none" else 1
            for place, (x, y) in enumerate(zip(grads, expected_grads, strict=True)):
                if place < 2:  # a and b: a part's gradient is the part of the gradient, times what the mean takes off
                    assert_same(x * share / count, y[own], f"{what}, gradient {place}")
                else:
                    dist.all_reduce(x)
                    assert_same(x * share / count, y, f"{what}, gradient {place}")


@pytest.fixture(autouse=True)
def _small_chunks() -> Any:
    with choice.use(chunk=ChunkConfig(8, 10)):
        yield


@pytest.mark.parametrize("sizes", PARTS.values(), ids=PARTS)
def test_every_process_gets_the_whole_batch(sizes: tuple[int, ...]) -> None:
    in_processes(len(sizes), _every_loss, sizes, int(torch.randint(2**31, ())))


class Model(nn.Module):
    """Two towers and a loss, as one module: everything that has parameters."""

    def __init__(self, loss: str, group: dist.ProcessGroup | None, backend: str = "auto") -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, D), nn.Linear(6, D)
        metric = GSSF(D, block_size=4)
        with torch.no_grad():
            for weight in metric.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        kinds = {
            "info_nce": InfoNCELoss, "sigmoid": SigmoidLoss, "hinge": TripletLoss, "distillation": DistillationLoss,
            "all": partial(TripletLoss, hardest=False),
        }  # fmt: skip
        self.loss = kinds[loss](metric, group=group, backend=backend)
        self.double()

    def forward(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        a, b = self.left(x), self.right(y)
        if isinstance(self.loss, DistillationLoss):
            out: Tensor = self.loss(a, b, x, y)
        else:
            out = self.loss(a, b, ids)
        return out


def _train(rank: int, sizes: tuple[int, ...], wrapper: str, seed: int, backend: str) -> None:
    """Two steps of SGD, wrapped and alone: the same losses, and the same parameters after it."""
    N = sum(sizes)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    losses = ("info_nce", "sigmoid", "hinge", "all", "distillation")
    for loss in losses if backend == "torch" else ("info_nce", "hinge"):
        torch.manual_seed(seed)
        alone = Model(loss, None)
        spread = Model(loss, dist.group.WORLD, backend)
        spread.load_state_dict(alone.state_dict())
        wrapped: nn.Module
        if wrapper == "ddp":
            wrapped = DistributedDataParallel(spread)
        else:
            mesh = dist.init_device_mesh("cpu", (len(sizes),))
            for part in (spread.left, spread.right, spread):
                fully_shard(part, mesh=mesh)
            wrapped = spread
        steps = [torch.optim.SGD(module.parameters(), lr=1e-3) for module in (alone, wrapped)]
        for _ in range(2):
            x, y, ids = *torch.randn(2, N, 6, dtype=torch.float64), torch.randint(0, N, (N,))
            expected = alone(x, y, ids)
            ours = wrapped(x[own], y[own], ids[own])
            assert_same(ours.detach(), expected.detach(), f"{wrapper} {loss}")
            if isinstance(spread.loss, TripletLoss):
                assert spread.loss.violations.equal(alone.loss.violations)
            for step, out in zip(steps, (expected, ours), strict=True):
                step.zero_grad()
                out.backward()
            for (name, p), q in zip(alone.named_parameters(), spread.parameters(), strict=True):
                grad = q.grad.full_tensor() if wrapper == "fsdp" else q.grad
                assert_same(grad, p.grad, f"{wrapper} {loss} d{name}")
            for step in steps:
                step.step()


BACKENDS = ["torch", "triton"] if interpreter_is_on() else ["torch"]


@pytest.mark.parametrize(
    ("wrapper", "sizes", "backend"),
    [("ddp", (6, 11), "torch"), ("ddp", (5, 0, 9), "torch"), ("ddp", (4, 4, 4, 4), "torch"), ("fsdp", (6, 11), "torch")]
    + [("ddp", (5, 3), backend) for backend in BACKENDS[1:]],
    ids=str,
)
def test_training_as_one_process_would(wrapper: str, sizes: tuple[int, ...], backend: str) -> None:
    """Under torch's own wrappers, and in Triton's interpreter."""
    in_processes(len(sizes), _train, sizes, wrapper, int(torch.randint(2**31, ())), backend)


def _disagree(rank: int) -> None:
    group = dist.group.WORLD
    x, weight = torch.randn(4, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"must make the same call, got rank 0: .*ids = False.*; rank 1: .*ids = True"):
        ids = torch.arange(4) if rank else None
        gssf_triton.info_nce(x, x, weight, logit_scale=1.0, ids=ids, group=group)
    with pytest.raises(ValueError, match=r"rank 1: loss = triplet_loss, D = 6"):
        y = x[:, : 8 - 2 * rank]
        gssf_triton.triplet_loss(y, y, weight[: y.shape[1]], group=group)
    with pytest.raises(ValueError, match=r"gradients = \(True, False\).*; rank 1: .*gradients = \(True, True\)"):
        y = torch.randn(4, 8, requires_grad=rank == 1)
        gssf_triton.sigmoid_loss(x.requires_grad_(), y, weight, logit_scale=1.0, logit_bias=0.0, group=group)
    # Nobody was left behind: the next call works.
    assert gssf_triton.triplet_loss(x, x, weight, group=group).isfinite()


def test_processes_that_disagree_are_told_so() -> None:
    in_processes(2, _disagree)


def _in_a_subgroup(rank: int) -> None:
    group = dist.new_group([0, 2])
    x, weight = torch.arange(1.0, 7.0).reshape(2, 3), torch.ones(3)
    if rank == 1:
        with pytest.raises(TypeError, match=r"group must be a torch\.distributed process group"):
            gssf_triton.info_nce(x, x, weight, logit_scale=0.1, group=group)
        return
    expected = gssf_triton.info_nce(x, x, weight, logit_scale=0.1)
    i = rank // 2
    ours = gssf_triton.info_nce(x[i : i + 1], x[i : i + 1], weight, logit_scale=0.1, group=group)
    torch.testing.assert_close(ours, expected)


def test_a_group_of_some_processes() -> None:
    in_processes(3, _in_a_subgroup)


def _leave(rank: int, leaver: str, when: str) -> None:
    group = dist.group.WORLD
    x = torch.randn(5, 8, requires_grad=True)

    def leave() -> None:
        if leaver == "dies":
            os._exit(1)
        raise ArithmeticError("something else went wrong here")

    if rank == 1 and when == "before":
        leave()
    loss = gssf_triton.info_nce(x, x, torch.ones(8), logit_scale=1.0, group=group)
    if rank == 1:
        leave()
    loss.backward()


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_process_that_dies_ends_the_others_with_an_error(when: str) -> None:
    """Before the call, or between its forward and its backward pass; long before any timeout."""
    first, second, third = endings(3, timedelta(minutes=5), 20, _leave, "dies", when)
    assert second == "died"
    assert all(ending.startswith("RuntimeError: ") for ending in (first, third)), (first, third)


def _stay_away(rank: int) -> None:
    if rank == 1:
        time.sleep(30)
    x = torch.randn(5, 8)
    gssf_triton.info_nce(x, x, torch.ones(8), logit_scale=1.0, group=dist.group.WORLD)


def test_a_process_that_never_comes_ends_the_others_by_the_timeout() -> None:
    first, second = endings(2, timedelta(seconds=3), 10, _stay_away)
    assert second == "hangs"
    assert "RuntimeError" in first and "imed out" in first
