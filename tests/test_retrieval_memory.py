"""What searches and metrics hold at once, by the allocators' own count: 64 MiB on a CPU, the rows and the result."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.memory import ALLOWED, peak_bytes
from torch import Tensor

import gssf_triton
from gssf_triton import metrics

#: More than one batch of queries, and several chunks, the last of them short.
Q, N, D = 1100, 12_000, 8
#: Copies of the features in the scores' dtype: folded, normalised, the last columns filled up.
COPIES = 4


def call(name: str, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    kind, _, option = name.partition(" ")
    x, y = (torch.randn(n, D, device=device).to(dtype) for n in (Q, N))
    if option.startswith("equal"):
        x, y = x.sign(), y.sign()
    metric: dict[str, Any] = {"W_diag": torch.ones(D, device=device, dtype=dtype), "backend": "torch"}
    left_out = {
        "mask": torch.rand(Q, N, device=device) < 0.9,
        "exclude": torch.arange(Q, device=device),
    }
    classes = 2 if option == "two classes" else N // 4
    ids = {
        "query_ids": torch.arange(Q, device=device) % classes,
        "gallery_ids": torch.arange(N, device=device) % classes,
    }
    cams = {"query_cams": ids["query_ids"] % 6, "gallery_cams": torch.randint(6, (N,), device=device)}
    if kind == "topk":
        k = int(option.split()[-1])
        return lambda: gssf_triton.topk(x, y, **metric, **left_out, k=k, normalize=True)
    if kind == "ranks":
        return lambda: gssf_triton.ranks(x, y, **metric, **left_out, **ids, **cams, normalize=True)
    if kind == "image_text":
        return lambda: metrics.image_text(x, y, **metric, image_ids=ids["query_ids"], text_ids=ids["gallery_ids"])
    if kind == "reid":
        return lambda: metrics.reid(x, y, **metric, **ids, **cams)
    few = N // 4
    return lambda: metrics.retrieval(y[:few], ids["gallery_ids"][:few] % (few // 4), **metric)


def result_bytes(result: Any) -> int:
    found = result if isinstance(result, tuple) else (result,)
    return sum(x.numel() * x.itemsize for x in found if isinstance(x, Tensor))


NAMES = ["topk 10", "topk equal 40", "topk 500", "topk 2500", "ranks", "image_text", "reid", "reid two classes",
         "retrieval", "retrieval two classes"]  # fmt: skip
#: bfloat16's scores are float32.
CASES = [(name, dtype) for name in NAMES for dtype in (torch.float32, torch.float64)]
CASES += [(name, torch.bfloat16) for name in ("topk 500", "ranks", "retrieval")]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_memory_grows_with_the_rows(name: str, dtype: torch.dtype, device: str) -> None:
    """NumPy's arrays are counted, too. A chunk of scores alone takes 16 MiB on a CPU, 32 in float64."""
    measured, result, arrays = call(name, dtype, device), 0, 0

    def traced() -> None:
        nonlocal result, arrays
        tracemalloc.start()
        result = result_bytes(measured())
        arrays = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    peak = peak_bytes(traced, device)
    assert peak + arrays - result < ALLOWED[device] + COPIES * (Q + N) * D * max(dtype.itemsize, 4)
