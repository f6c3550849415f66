"""The model's order of a kernel's configurations: which the tuner measures, and which first.

Seconds here are for comparing tiles of one kernel with each other and nothing else: waves of tiles over the
processors, each as long as its products or its share of the traffic between L2 cache and shared memory.
"""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import Any

from gssf_triton.autotune import model
from gssf_triton.autotune.keys import Key, dtype_of
from gssf_triton.autotune.space import SPACES, Config
from gssf_triton.kernels import plans
from gssf_triton.kernels.configs import ChunkConfig, GradientConfig, PairwiseConfig, padded_block
from gssf_triton.kernels.targets import ARCHITECTURES, kin

#: Rows and columns at which a tile's operands come in half as fast as its products go.
HALF_RATE_SIDE = 48.0
#: L2 cache to the processors, bytes a second: a multiple of the memory's.
L2_BYTES_PER_SECOND = 3 * plans.BYTES_PER_SECOND
#: Registers of a processor, in 32-bit words, and the threads it holds.
REGISTERS, THREADS = 65_536, 2048
#: A tile that waits for each load takes this much longer than one with all loads in flight.
STALL = 0.5


def _waves(tiles: int, config: Any, shared: int, arch: str) -> float:
    """Rounds in which the processors work `tiles` off, with as many on one as shared memory and threads allow."""
    target = ARCHITECTURES[arch]
    threads = config.num_warps * target.warp
    together = max(1, min(target.shared_bytes // max(shared, 1), THREADS // threads, REGISTERS // (threads * 128)))
    return math.ceil(tiles / (target.processors * together)) * together


def _tile_seconds(config: PairwiseConfig, key: Key, arch: str) -> float:
    used = model.tile_usage(config, key.B, key.dtype, arch, terms=key.kernel == "terms")
    itemsize = dtype_of(key.dtype).itemsize
    M, N, K = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    tiles = math.ceil(key.M / M) * math.ceil(key.N / N)
    rate = plans.library_rate(itemsize, key.dtype == "tf32") / ARCHITECTURES[arch].processors
    side = 2 * M * N / (M + N)
    # Blocks smaller than a chunk are multiplied with the zeros around them.
    folds = max(padded_block(key.B), K) if key.B else 0
    compute = 2.0 * M * key.D * (N + folds) / rate * (1 + HALF_RATE_SIDE / side)
    traffic = (M + N) * key.D * itemsize / (L2_BYTES_PER_SECOND / ARCHITECTURES[arch].processors)
    stall = 1 + STALL / max(config.num_stages * K / 32, 1)
    return _waves(tiles, config, used.shared, arch) * max(compute, traffic) * stall


def _gradient_seconds(config: GradientConfig, key: Key, arch: str) -> float:
    M, N, C = config.BLOCK_M, config.BLOCK_N, config.BLOCK_C
    tiles = math.ceil(key.D / C) * min(math.ceil(key.M / M), config.max_splits)
    repeats = math.ceil(math.ceil(key.M / M) / config.max_splits)
    rate = plans.library_rate(dtype_of(key.dtype).itemsize, key.dtype == "tf32") / ARCHITECTURES[arch].processors
    side = 2 * M * C / (M + C)
    work = 2.0 * M * C * (max(key.N, N) + 2 * C) / rate * (1 + HALF_RATE_SIDE / side)
    return math.ceil(tiles / ARCHITECTURES[arch].processors) * repeats * work * (1 + STALL / config.num_stages)


def seconds(config: Config, key: Key, arch: str) -> float:
    """The model's time of a configuration, to order it among its kernel's."""
    if isinstance(config, plans.PlanChoice):
        rows = sorted((key.M, key.N), reverse=config.fold == "more")
        itemsize = dtype_of(key.dtype).itemsize
        return plans.plan_seconds(config.kind, 1, rows[0], rows[1], key.D, key.B, itemsize, key.dtype == "tf32")
    gpu = kin(arch)
    if gpu is not None and isinstance(config, PairwiseConfig):
        return _tile_seconds(config, key, gpu)
    if gpu is not None and isinstance(config, GradientConfig):
        return _gradient_seconds(config, key, gpu)
    # Rows and chunks: no estimate tells them apart, so the nearest to the model's choice come first.
    known = model.default(key, arch)
    return sum(abs(math.log2((x + 1) / (y + 1))) for x, y in zip(astuple(config), astuple(known), strict=True))


def _is_redundant(config: Config, key: Key) -> bool:
    """A chunk that goes beyond S does what the next smaller one does."""
    if not isinstance(config, ChunkConfig):
        return False
    least = SPACES[key.kernel].values
    return config.rows > max(key.M, least["rows"][0]) or config.columns > max(key.N, least["columns"][0])


def candidates(key: Key, arch: str, limit: int | None = None, *, deterministic: bool = False) -> list[Config]:
    """What the tuner measures for a key, in the fixed order that settles ties: the model's choice, then by its rank.

    Args:
        key: The kernel and its shape.
        arch: The architecture.
        limit: At most this many.
        deterministic: Only configurations that give the same bits every time.

    Example:
        >>> from gssf_triton.autotune.keys import Key
        >>> from gssf_triton.autotune.ranking import candidates
        >>> candidates(Key("gradient_plan", "bf16", 512, 32, 64, 64), "sm_90")[0]
        PlanChoice(kind='one_pass', fold='fewer')
    """
    space = SPACES[key.kernel]
    first = model.default(key, arch)
    legal = (c for c in space.all(key) if c != first and not _is_redundant(c, key) and model.fits(c, key, arch))
    ranked = sorted(legal, key=lambda c: (seconds(c, key, arch), tuple(map(str, astuple(c)))))
    chosen = [c for c in [first, *ranked] if not deterministic or space.is_deterministic(c)]
    return chosen[:limit]
