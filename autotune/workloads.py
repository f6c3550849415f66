"""What a key stands for, as a call that can be timed: fresh random data of the key's shape, on its device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gssf_triton.autotune import lookup
from gssf_triton.autotune.keys import PAIR_KERNELS, STREAM_KERNELS, Key, dtype_of
from gssf_triton.autotune.space import Config
from gssf_triton.kernels.configs import chunk_config

#: Makes the call of a configuration.
Workload = Callable[[Config], Callable[[], Any]]

#: S is no larger than this when what streams it is measured: beyond, only the number of chunks grows. Rows, columns.
STREAM_LIMIT = 8192, 32768
#: Items of a list that retrieval is measured with; images and captions that region–word scores are.
RANKED_K, PAIR_ITEMS = 16, 256
#: Softmax's scale, and SCAN's, which times do not depend on.
SCALE = 9.0


def _features(*shape: int, key: Key, where: torch.device) -> Tensor:
    return torch.randn(shape, device=where).to(dtype_of(key.dtype))


def build(key: Key, where: torch.device) -> Workload:
    """The workload of a key: its kernel alone, or for a plan or a chunk the whole operation with the tables' tiles."""
    if key.kernel == "chunk":
        workload = _streamed_softmax(key, where)
    elif key.kernel in STREAM_KERNELS:
        workload = _one_chunk(key, where)
    elif key.kernel == "ranked":
        workload = _search(key, where)
    elif key.kernel in PAIR_KERNELS:
        workload = _pairs(key, where)
    else:
        workload = _triton_call(key, where)

    def launched(config: Config) -> Callable[[], Any]:
        def call() -> Any:
            with lookup.use(key.kernel, config):
                return workload()

        return call

    return launched


def _streaming_operands(key: Key, where: torch.device, limit: tuple[int, int]) -> tuple[Tensor, ...]:
    """(t, y, rows, columns, scalars) of InfoNCE's slope: similarities of about 1, beside them (lse, w, u, match)."""
    M, N, D = min(key.M, limit[0]), min(key.N, limit[1]), key.D
    t, y = _features(M, D, key=key, where=where) / D**0.5, _features(N, D, key=key, where=where)
    wide = torch.promote_types(t.dtype, torch.float32)
    row, column = (torch.zeros(4, length, dtype=wide, device=where) for length in (M, N))
    for side, others in ((row, N), (column, M)):
        side[0], side[1] = math.log(others) + 0.5, 0.5
    return t, y, row, column, torch.ones(2, dtype=wide, device=where)


def _streamed_softmax(key: Key, where: torch.device) -> Callable[[], Any]:
    """InfoNCE's backward pass: the streamed loop that does most."""
    from gssf_triton.backend import resolve_backend
    from gssf_triton.streaming.op import stream_op

    t, y, rows, columns, scalars = _streaming_operands(key, where, STREAM_LIMIT)
    backend = resolve_backend("auto", t, None)
    return lambda: stream_op(
        "softmax_slope_both", t, y, None, None, rows, columns, None, None, scalars, 0, True, backend
    )


def _one_chunk(key: Key, where: torch.device) -> Callable[[], Any]:
    """The losses' kernel on one chunk, with a slope."""
    from gssf_triton.kernels.stream import TritonEngine
    from gssf_triton.streaming.driver import Operands

    chunk = chunk_config("cuda")
    limit = chunk.rows, chunk.columns // 2  # within the budget in float32, too
    t, y, rows, columns, scalars = _streaming_operands(key, where, limit)
    if key.kernel == "stream_teacher":
        epilogue, operands = "distillation_slope", Operands(t, y, t, y, rows[:3], columns, None, None, scalars, 0)
    else:
        epilogue, operands = "softmax_slope_both", Operands(t, y, None, None, rows, columns, None, None, scalars, 0)
    engine = TritonEngine((t.shape[0], y.shape[0]))

    def call() -> Any:
        kept = engine.tile(operands, slice(0, t.shape[0]), slice(0, y.shape[0]), epilogue, True)
        return kept.totals, kept.slope

    return call


def _search(key: Key, where: torch.device) -> Callable[[], Any]:
    """A list of the best and a rank, of which both kernels' tile is: items of 64 classes."""
    from gssf_triton.retrieval import ranks, topk

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

    items = PAIR_ITEMS if where.type == "cuda" else 3  # the interpreter's patience
    x, y = (_features(items, length, key.D, key=key, where=where) / key.D**0.5 for length in (key.M, key.N))
    wide = torch.promote_types(x.dtype, torch.float32)
    share = torch.full((items, key.N), 1 / key.N, dtype=wide, device=where)
    if key.kernel == "late_interaction":
        return lambda: late_interaction.scores(x, y, share, wide)
    x_scale, y_scale = (torch.ones(side.shape[:2], dtype=wide, device=where) for side in (x, y))
    gram = torch.bmm(x.to(wide), x.to(wide).mT)
    return lambda: cross_attention.scores(x, x, y, gram, share, x_scale, y_scale, None, None, SCALE)


def _triton_call(key: Key, where: torch.device) -> Callable[[], Any]:
    from gssf_triton.kernels import fold, gradient, paired, pairwise
    from gssf_triton.kernels.launch import Metric
    from gssf_triton.similarity import bilinear

    M, N, D, B, dtype = key.M, key.N, key.D, key.B, dtype_of(key.dtype)
    W_diag = torch.randn(D, device=where)
    W_blocks = torch.randn(D // B, B, B, device=where) / B**0.5 if B else None
    metric = Metric(W_diag, W_blocks) if key.kernel != "product" else Metric(None, None)
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
        return lambda: bilinear.pairwise(a, b, W_diag, W_blocks, False, dtype)
    P = _features(1, M, N, key=key, where=where) if N else None
    if key.kernel == "gradient":
        return lambda: gradient.gradient(P, b, a, metric, B, (True, True, B > 0))
    assert key.kernel == "gradient_plan", key
    return lambda: bilinear.gradient(P, b, a, (W_diag, W_blocks), (True, True, B > 0))
