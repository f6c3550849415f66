"""What a key stands for, as a call that can be timed: fresh random data of the key's shape, on its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gssf_triton.autotune import lookup
from gssf_triton.autotune.configs import ChunkConfig
from gssf_triton.autotune.keys import Key, dtype_of
from gssf_triton.autotune.space import Config

#: Makes the call of a configuration.
Workload = Callable[[Config], Callable[[], Any]]

#: S is no larger than this when chunks are measured: beyond, only their number grows. Rows, columns.
STREAM_LIMIT = 8192, 32768


def _features(*shape: int, key: Key, where: torch.device) -> Tensor:
    return torch.randn(shape, device=where).to(dtype_of(key.dtype))


def stream_logsumexp(a: Tensor, b: Tensor, chunk: ChunkConfig) -> Tensor:
    """The row-wise log-sum-exp of a bᵀ, (M,), one chunk of it at a time: the loop that every streaming loss has."""
    wide = torch.promote_types(a.dtype, torch.float32)
    sums = []
    for rows in a.split(chunk.rows):
        running = torch.full((rows.shape[0],), -torch.inf, dtype=wide, device=a.device)
        for columns in b.split(chunk.columns):
            running = torch.logaddexp(running, torch.logsumexp((rows @ columns.T).to(wide), dim=1))
        sums.append(running)
    return torch.cat(sums)


def build(key: Key, where: torch.device) -> Workload:
    """The workload of a key: its kernel alone, or for a plan the whole operation with the tables' tiles."""
    M, N, D = key.M, key.N, key.D
    if key.kernel == "chunk":
        a = _features(min(M, STREAM_LIMIT[0]), D, key=key, where=where)
        b = _features(min(N, STREAM_LIMIT[1]), D, key=key, where=where)

        def streamed(config: Config) -> Callable[[], Any]:
            assert isinstance(config, ChunkConfig)
            return lambda: stream_logsumexp(a, b, config)

        return streamed
    with_config = _triton_call(key, where)

    def launched(config: Config) -> Callable[[], Any]:
        def call() -> Any:
            with lookup.use(key.kernel, config):
                return with_config()

        return call

    return launched


def _triton_call(key: Key, where: torch.device) -> Callable[[], Any]:
    from gssf_triton import ops
    from gssf_triton.kernels import fold, gradient, paired, pairwise
    from gssf_triton.kernels.launch import Metric

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
        return lambda: ops.pairwise(a, b, W_diag, W_blocks, False, dtype)
    P = _features(1, M, N, key=key, where=where) if N else None
    if key.kernel == "gradient":
        return lambda: gradient.gradient(P, b, a, metric, B, (True, True, B > 0))
    assert key.kernel == "gradient_plan", key
    return lambda: ops.gradient(P, b, a, (W_diag, W_blocks), (True, True, B > 0))
