"""What the losses hold at once, by the allocator's own count: it grows with the batch, never with its square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.losses_problem import problem
from support.memory import ALLOWED, MIB, peak_bytes

#: Copies of the features: inputs folded and normalised, what is saved of them, and their gradients on the way back.
COPIES = 16


def forward_backward(loss: str, N: int, D: int, device: str, **options: Any) -> Callable[[], object]:
    p = problem(loss, N, G=D // 32, B=32, normalize=True, device=device, **options)
    return lambda: torch.autograd.grad(p.call("auto"), list(p.leaves.values()))


def assert_small(peak: int, N: int, D: int, device: str) -> None:
    assert peak < ALLOWED[device] + COPIES * 2 * N * D * 4
    assert peak < N * N * 4 / 2


def test_the_count_counts(device: str) -> None:
    assert 4 * MIB <= peak_bytes(lambda: torch.ones(2**20, device=device), device) < 5 * MIB


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("info_nce", {"ids": True, "label_smoothing": 0.1}),
        ("sigmoid_loss", {"ids": True}),
        ("triplet_loss", {}),
        ("triplet_loss", {"hardest": False, "ids": True}),
        ("distillation_loss", {}),
    ],
    ids=str,
)
def test_memory_grows_with_the_rows(loss: str, options: dict[str, Any], device: str) -> None:
    """A constant and a multiple of (M + N)·D; the matrix alone would be 256 MiB on a CPU and 4 GiB on a GPU here.

    Without options InfoNCE is in the next test.
    """
    N, D = (8192 if device == "cpu" else 32768), 32
    assert_small(peak_bytes(forward_backward(loss, N, D, device, **options), device), N, D, device)


def test_memory_is_linear(device: str) -> None:
    """Twice the pairs add no more than the rows they add: no term in N² is hidden below the bound."""
    least = 4096 if device == "cpu" else 32768  # several chunks at both sizes
    small, large = (peak_bytes(forward_backward("info_nce", N, 32, device), device) for N in (least, 2 * least))
    assert large - small <= 20 * 2 * least * 32 * 4
    assert_small(large, 2 * least, 32, device)
