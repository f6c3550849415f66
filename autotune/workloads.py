"""The call of a key, to be timed: fresh random data of the key's shape, on its device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gssf_triton import kernels
from gssf_triton.autotune.space import DTYPES, PAIR_KERNELS, STREAM_KERNELS, Key
from gssf_triton.backend import resolve_backend
from gssf_triton.kernels import choice
from gssf_triton.kernels.choice import Config
from gssf_triton.kernels.stream_values import Operands
from gssf_triton.metric import IDENTITY, Metric
from gssf_triton.retrieval import ranks, topk
from gssf_triton.similarity import bilinear
from gssf_triton.streaming.driver import stream
from gssf_triton.streaming.epilogues import EPILOGUES

#: Makes the call of a configuration.
Workload = Callable[[Config], Callable[[], Any]]

#: The largest S to measure streaming with, rows and columns: beyond, only the number of chunks grows; and the largest
#: chunk of it to measure the kernel with.
STREAM_LIMIT, CHUNK_LIMIT = (8192, 32768), (4096, 8192)
#: Length of the list to measure retrieval with; images and captions to measure region–word scores with.
RANKED_K, PAIR_ITEMS = 16, 256
#: Of SCAN's softmax; times do not depend on it.
SCALE = 9.0


def _features(*shape: int, key: Key, where: torch.device) -> Tensor:
    return torch.randn(shape, device=where).to(DTYPES[key.dtype])


def build(key: Key, where: torch.device) -> Workload:
    """The workload of a key: its kernel alone, or for a plan or a chunk the whole operation with the tables' tiles."""
    if key.kernel in ("chunk", *STREAM_KERNELS):
        workload = _streamed(key, where)
    elif key.kernel == "ranked":
        workload = _search(key, where)
    elif key.kernel in PAIR_KERNELS:
        workload = _pairs(key, where)
    else:
        workload = _triton_call(key, where)

    def launched(config: Config) -> Callable[[], Any]:
        def call() -> Any:
            with choice.use(**{key.kernel: config}):
                return workload()

        return call

    return launched


def _streamed(key: Key, where: torch.device) -> Callable[[], Any]:
    """A loss's slope: for a chunk the whole loop of InfoNCE's backward pass, which does most; else one chunk of it."""
    limit = STREAM_LIMIT if key.kernel == "chunk" else CHUNK_LIMIT
    M, N, D = min(key.M, limit[0]), min(key.N, limit[1]), key.D
    # Similarities of about 1.
    t, y = _features(M, D, key=key, where=where) / D**0.5, _features(N, D, key=key, where=where)
    wide = torch.promote_types(t.dtype, torch.float32)
    rows, columns = (torch.zeros(4, length, dtype=wide, device=where) for length in (M, N))  # lse, w, u, match
    for side, others in ((rows, N), (columns, M)):
        side[0], side[1] = math.log(others) + 0.5, 0.5
    scalars = torch.ones(2, dtype=wide, device=where)
    x = Operands(t, y, scalars, rows, columns)
    if key.kernel == "chunk":
        backend = resolve_backend("auto", t, None)
        return lambda: stream("softmax_slope_both", x, wants_slope=True, backend=backend)
    epilogue = EPILOGUES["softmax_slope_both"]
    if key.kernel == "stream_teacher":
        x = Operands(t, y, scalars, rows[:3], columns, teacher_t=t, teacher_y=y)
        epilogue = EPILOGUES["distillation_slope"]

    def call() -> Any:
        streamed = kernels.stream.Pass(x, epilogue, (M, N))
        [part] = streamed.parts()
        return streamed.kept().totals, part.slope

    return call


def _search(key: Key, where: torch.device) -> Callable[[], Any]:
    """A list of the best and a rank, of which both kernels' tile is: items of 64 classes."""
    a, b = _features(key.M, key.D, key=key, where=where), _features(key.N, key.D, key=key, where=where)
    weight = torch.ones(key.D, device=where)
    ids = [torch.randint(64, (length,), device=where) for length in (key.M, key.N)]

    def call() -> Any:
        values, _ = topk(a, b, weight, k=min(RANKED_K, key.N), backend="triton")
        ranks(a, b, weight, query_ids=ids[0], gallery_ids=ids[1], backend="triton")
        return values

    return call


def _pairs(key: Key, where: torch.device) -> Callable[[], Any]:
    """Scores of images of M regions and captions of N words."""
    from gssf_triton.kernels import cross_attention, late_interaction
    from gssf_triton.kernels.late_interaction import Items

    items = PAIR_ITEMS if where.type == "cuda" else 3  # the interpreter is slow
    x, y = (_features(items, length, key.D, key=key, where=where) / key.D**0.5 for length in (key.M, key.N))
    wide = torch.promote_types(x.dtype, torch.float32)
    share = torch.full((items, key.N), 1 / key.N, dtype=wide, device=where)
    if key.kernel == "late_interaction":
        regions, words = Items(x), Items(y, weight=share)
        return lambda: late_interaction.scores(regions, words, wide, None, None)
    x_scale, y_scale = (torch.ones(side.shape[:2], dtype=wide, device=where) for side in (x, y))
    regions, words = Items(x, scale=x_scale), Items(y, scale=y_scale, weight=share)
    gram = torch.bmm(x.to(wide), x.to(wide).mT)
    return lambda: cross_attention.scores(regions, x, words, gram, None, SCALE)


def _triton_call(key: Key, where: torch.device) -> Callable[[], Any]:
    from gssf_triton.kernels import fold, gradient, paired, pairwise

    M, N, D, B, dtype = key.M, key.N, key.D, key.B, DTYPES[key.dtype]
    W_diag = torch.randn(D, device=where)
    W_blocks = torch.randn(D // B, B, B, device=where) / B**0.5 if B else None
    metric = Metric(W_diag, W_blocks) if key.kernel != "product" else IDENTITY
    a = _features(1, M, D, key=key, where=where)
    if key.kernel == "fold":
        return lambda: fold.fold(a[0], metric, False)
    b = _features(1, N or M, D, key=key, where=where)
    if key.kernel == "paired":
        return lambda: paired.paired(a[0], b[0], metric, False, dtype)
    if key.kernel in ("pairwise", "product"):
        S = torch.empty(1, M, N, device=where, dtype=dtype)
        return lambda: pairwise.pairwise(a, b, metric, False, S)
    if key.kernel == "terms":
        return lambda: pairwise.pairwise_terms(a, b, metric, False, dtype)
    if key.kernel == "plan":
        return lambda: bilinear.pairwise(a, b, metric, False, dtype)
    P = _features(1, M, N, key=key, where=where) if N else None
    if key.kernel == "gradient":
        return lambda: gradient.gradient(P, b, a, metric, B, (True, True, B > 0))
    assert key.kernel == "gradient_plan", key
    return lambda: bilinear.gradient(P, b, a, metric, (True, True, B > 0))
