"""Host time of calls on the stub of a GPU, in microseconds of one thread's CPU time: no GPU is needed or used.

    python perf/host.py [--arch sm_90]

A launch ends at the stub of Triton's driver, and torch computes on the CPU: so tensors are small. What remains of a
call is what the host does before a GPU begins; but products with float32 sums take casts here that a GPU does not need.
Means of 100 calls, the least of 12.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

import gssf_triton
from gssf_triton.autotune.stub import stub_driver, stub_host
from gssf_triton.kernels.tile import INTERPRETED

ROWS, D, B = 2, 128, 32
REPEATS, BATCHES, WARM_UPS = 100, 12, 20


def microseconds(call: Callable[[], object]) -> float:
    for _ in range(WARM_UPS):
        call()
    least = float("inf")
    for _ in range(BATCHES):
        start = time.thread_time_ns()
        for _ in range(REPEATS):
            call()
        least = min(least, time.thread_time_ns() - start)
    return least / REPEATS / 1e3


def cosine(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    return normalize(a, dim=-1) @ normalize(b, dim=-1).T


def pairwise_sim(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    return gssf_triton.pairwise_sim(a, b, W_diag, W_blocks, normalize=True, backend="triton")


def paired_sim(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    return gssf_triton.paired_sim(a, b, W_diag, W_blocks, normalize=True, backend="triton")


def transform(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    return gssf_triton.transform(a, W_diag, W_blocks, normalize=True, backend="triton")


def info_nce(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    return gssf_triton.info_nce(a, b, W_diag, W_blocks, logit_scale=10.0, normalize=True, backend="triton")


def sigmoid_loss(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    return gssf_triton.sigmoid_loss(
        a, b, W_diag, W_blocks, logit_scale=10.0, logit_bias=-10.0, normalize=True, backend="triton"
    )


def triplet_loss(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    return gssf_triton.triplet_loss(a, b, W_diag, W_blocks, normalize=True, backend="triton")


def distillation_loss(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    x, y = a.detach(), b.detach()
    return gssf_triton.distillation_loss(
        a, b, W_diag, W_blocks, teacher_a=x, teacher_b=y, logit_scale=10.0, normalize=True, backend="triton"
    )


def backward_microseconds(call: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> float:
    """Of the backward passes alone, each of a forward pass of its own."""
    least = float("inf")
    for batch in range(-1, BATCHES):  # the first warms up
        spent = 0
        for _ in range(REPEATS):
            result = call(*leaves)
            start = time.thread_time_ns()
            torch.autograd.grad(result, leaves, grad, allow_unused=True)
            spent += time.thread_time_ns() - start
        least = least if batch < 0 else min(least, spent)
    return least / REPEATS / 1e3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", help="the GPU's architecture")
    arch = parser.parse_args(argv).arch
    if INTERPRETED:
        parser.error("kernels must be compiled: unset TRITON_INTERPRET")
    torch.set_num_threads(1)
    with stub_driver(arch), stub_host(arch):
        a, b = (torch.randn(ROWS, D, dtype=torch.bfloat16) for _ in range(2))
        plain = a, b, torch.ones(D), torch.zeros(D // B, B, B, dtype=torch.bfloat16)
        leaves = [x.clone().requires_grad_() for x in plain]
        print(f"{'':18}forward  with a graph  backward")
        calls = cosine, pairwise_sim, paired_sim, transform, info_nce, sigmoid_loss, triplet_loss, distillation_loss
        for call in calls:
            grad = torch.ones_like(call(*plain))

            forward = microseconds(partial(call, *plain))
            graph = microseconds(partial(call, *leaves))
            backward = backward_microseconds(call, leaves, grad)
            print(f"{call.__name__:18}{forward:7.1f}{graph:14.1f}{backward:10.1f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
