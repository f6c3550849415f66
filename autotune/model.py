"""The static model: what a configuration takes of a block before anything is compiled, whether that fits, and its rank.

The shared memory is what Triton's pipeliner allocates: a tile of each operand for each stage in flight. Registers are
counted where they are many, in accumulators, against bounds found by compiling. A test holds both to real compiles. The
verdict errs to one side: what it passes compiles without spills; some of what it refuses would, too.

The rank orders the configurations that the tuner measures. Its seconds only compare tiles of one kernel:
waves of tiles over the processors, each as long as its products or its share of the traffic between L2 cache and shared
memory.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any

from gssf_triton.autotune.space import DTYPES, PAIR_KERNELS, SPACES, STREAM_KERNELS, Key
from gssf_triton.kernels import choice, configs, plans
from gssf_triton.kernels.choice import Config
from gssf_triton.kernels.configs import (
    ChunkConfig,
    CrossAttentionConfig,
    FoldConfig,
    GradientConfig,
    LateInteractionConfig,
    PairwiseConfig,
    padded_block,
)
from gssf_triton.kernels.plans import PlanChoice
from gssf_triton.kernels.retrieval_configs import LARGEST_KERNEL_K, RetrievalConfig
from gssf_triton.kernels.targets import ARCHITECTURES, kin, shared_bytes

#: Numbers a thread may hold in accumulators beside the operands in flight, found by compiling the tiles around them:
#: with nothing to fold, with blocks that fit a chunk of channels, and with blocks split over chunks.
MOST_ACCUMULATORS = {
    "sm_80": (96, 128, 96),
    "sm_90": (128, 160, 144),
    "sm_100": (128, 160, 144),
    "gfx942": (96, 128, 96),
}
#: On FMA units (exact float32) both operands of a step stay in registers, too; beside an epilogue's own numbers there
#: is no room for the addresses of more stages.
FMA_ACCUMULATORS, FMA_STEP, FMA_STAGES = 80, 32, 2
#: Kernels that multiply rows folded before, and keep something of the tile in its stead.
EPILOGUE_KERNELS = (*STREAM_KERNELS, *PAIR_KERNELS, "ranked")
#: Shared bytes for reductions and the like, which the estimate leaves out.
SLACK = 1024
#: Rows and columns at which a tile's operands come in half as fast as its products go.
HALF_RATE_SIDE = 48.0
#: L2 cache to the processors, bytes a second: a multiple of the memory's.
L2_BYTES_PER_SECOND = 3 * plans.BYTES_PER_SECOND
#: Registers of a processor, in 32-bit words, and the threads it holds.
REGISTERS, THREADS = 65_536, 2048
#: A tile that waits for each load takes this much longer than one with all loads in flight.
STALL = 0.5


@dataclass(frozen=True)
class Usage:
    """Shared bytes a block, and numbers in accumulators a thread with the most it may hold."""

    shared: int
    accumulators: int
    most_accumulators: int

    def fits(self, arch: str) -> bool:
        return self.shared + SLACK <= shared_bytes(arch) and self.accumulators <= self.most_accumulators


def _block(config: Any, numerics: str, arch: str) -> tuple[str, int, int]:
    """(architecture of the gate, bytes of a feature, threads of a block)."""
    known = kin(arch)
    assert known is not None, f"{arch} has no shared memory to count"
    return known, DTYPES[numerics].itemsize, config.num_warps * ARCHITECTURES[known].warp


def _pipelined(numerics: str, arch: str, rows: int) -> bool:
    """True for instructions that read shared memory while later tiles arrive: they keep one more stage there."""
    return arch.startswith(("sm_9", "sm_10")) and numerics != "fp32" and rows >= ARCHITECTURES[arch].tensor_rows


def tile_usage(config: PairwiseConfig, B: int, numerics: str, arch: str, *, terms: bool = False) -> Usage:
    """The one-pass kernel's; B = 0 for the product alone (a diagonal beside it takes no more)."""
    arch, itemsize, threads = _block(config, numerics, arch)
    a = config.BLOCK_M * config.BLOCK_K * itemsize
    b = config.BLOCK_N * config.BLOCK_K * itemsize
    w = config.BLOCK_K * config.BLOCK_K * itemsize if B else 0
    asynchronous = _pipelined(numerics, arch, config.BLOCK_M)
    stages = config.num_stages if asynchronous else max(config.num_stages - 1, 1)
    exact = numerics == "fp32" and arch.startswith("sm_")
    plain, packed, split = MOST_ACCUMULATORS[arch]
    if not B:
        shared, most = (a + b) * stages, plain
    elif padded_block(B) <= config.BLOCK_K:
        # a goes through registers into the fold, and is released a stage earlier.
        shared, most = a * (stages - asynchronous) + (b + w) * stages, packed
        taller = config.BLOCK_M > config.BLOCK_N or (config.BLOCK_M == config.BLOCK_N and arch.startswith("sm_"))
        if arch.startswith("sm_10") or (not asynchronous and not taller):
            shared += a  # T(a) changes hands on its way into the second product
    else:
        shared, most = max((a + w) * stages, a + b), split
    if exact and B and padded_block(B) <= config.BLOCK_K:
        shared += a
    if not asynchronous or arch.startswith("sm_10"):
        shared = max(shared, config.BLOCK_M * config.BLOCK_N * itemsize)  # S on its way out
    sums = config.BLOCK_M * config.BLOCK_N * (2 if terms else 1)
    folds = config.BLOCK_M * config.BLOCK_K if B else 0
    if exact:
        most = FMA_ACCUMULATORS if config.BLOCK_K <= FMA_STEP else 0
    return Usage(shared, (sums + folds) // threads, most)


def rows_usage(config: FoldConfig, B: int, numerics: str, arch: str, most: int) -> Usage:
    """The fold and matched-pairs kernels'."""
    arch, itemsize, threads = _block(config, numerics, arch)
    tile = config.BLOCK_M * config.BLOCK_K
    w = config.BLOCK_K * config.BLOCK_K if B else 0
    return Usage((tile * 2 + w) * itemsize * config.num_stages, (2 * tile + w) // threads, most)


def gradient_usage(config: GradientConfig, numerics: str, arch: str, most: int) -> Usage:
    """The gradient kernel's: R's rows of whole blocks, and the epilogue's products beside them."""
    arch, itemsize, threads = _block(config, numerics, arch)
    step = (config.BLOCK_M + config.BLOCK_C) * config.BLOCK_N * itemsize
    # The epilogue is in float32: R, and a slab of y and of the weights.
    numbers = config.BLOCK_M * config.BLOCK_C + 2 * config.BLOCK_P * config.BLOCK_C
    return Usage(max(step * config.num_stages, numbers * 4), numbers // threads, most)


def product_usage(config: PairwiseConfig | RetrievalConfig, numerics: str, arch: str, scratch: int, most: int) -> Usage:
    """A kernel's that multiplies folded rows and makes something else of the tile in its epilogue.

    `scratch`: bytes at most that the epilogue exchanges between threads. The operands may be gone by then; to be on the
    safe side both are counted.
    """
    tile = PairwiseConfig(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.num_warps, config.num_stages)
    plain = tile_usage(tile, 0, numerics, arch)
    deep = config.BLOCK_K > FMA_STEP or config.num_stages > FMA_STAGES
    exact = numerics == "fp32" and arch.startswith("sm_")
    return Usage(plain.shared + scratch, plain.accumulators, 0 if exact and deep else most)


def _epilogue_usage(config: Any, key: Key, arch: str, most: int) -> Usage:
    """Of the kernels that keep something of a tile instead of the tile."""
    if isinstance(config, RetrievalConfig):  # keys of 64 bits, and as long a list of them as a row may have
        scratch = 8 * config.BLOCK_M * max(config.BLOCK_N, LARGEST_KERNEL_K)
        used = product_usage(config, key.dtype, arch, scratch, most)
        held = config.BLOCK_M * LARGEST_KERNEL_K // _block(config, key.dtype, arch)[2]
        return Usage(used.shared, used.accumulators + held, used.most_accumulators)
    if isinstance(config, PairwiseConfig):  # the slope on its way out, in the accumulator's dtype
        scratch = 4 * config.BLOCK_M * config.BLOCK_N
        return product_usage(config, key.dtype, arch, scratch, most)
    assert isinstance(config, (LateInteractionConfig, CrossAttentionConfig)), config
    columns = config.CAPTIONS * config.WORDS
    tile = PairwiseConfig(config.BLOCK_M, columns, config.BLOCK_K, config.num_warps, config.num_stages)
    scratch = 4 * config.BLOCK_M * columns
    if isinstance(config, CrossAttentionConfig):  # the weights and the Gram matrix as operands of a third product
        scratch += 4 * config.BLOCK_M**2
    return product_usage(tile, key.dtype, arch, scratch, most)


@lru_cache(maxsize=256)
def default(key: Key, arch: str) -> Config:
    """The model's choice for a key's own shape."""
    return choice.modelled(key.call(), arch)


def usage(config: Any, key: Key, arch: str) -> Usage | None:
    """What `config` takes; None for what is no kernel of ours.

    Where the registers of a kernel were not counted tile by tile, the model's choice, which the gate compiles, is the
    bound.
    """
    known: Any = default(key, arch)
    if key.kernel in EPILOGUE_KERNELS:
        return _epilogue_usage(config, key, arch, _epilogue_usage(known, key, arch, 0).accumulators)
    if isinstance(config, PairwiseConfig):
        return tile_usage(config, key.B, key.dtype, arch, terms=key.kernel == "terms")
    if isinstance(config, FoldConfig):
        most = rows_usage(known, key.B, key.dtype, arch, 0).accumulators
        return rows_usage(config, key.B, key.dtype, arch, most)
    if isinstance(config, GradientConfig):
        return gradient_usage(config, key.dtype, arch, gradient_usage(known, key.dtype, arch, 0).accumulators)
    return None


def fits(config: Any, key: Key, arch: str) -> bool:
    """True where `config` may be launched for `key`: by the model for targets it knows, and for the model's choice."""
    known = default(key, arch)
    if isinstance(config, PlanChoice) or config == known:
        return True
    if isinstance(config, ChunkConfig):
        # Everything of a chunk's size: in torch on a CPU, of our kernel on a GPU.
        arrays = configs.TORCH_CHUNK_ARRAYS if arch == "cpu" else configs.TRITON_CHUNK_ARRAYS
        held = config.rows * config.columns * arrays * DTYPES[key.dtype].itemsize
        return held <= configs.CHUNK_BUDGET["cpu" if arch == "cpu" else "cuda"]
    if kin(arch) is None:
        return arch == "interpreter"
    # Rows that need a kernel of their own need one in every tile of that block.
    if isinstance(known, GradientConfig) and known.rows_apart and not config.rows_apart:
        return False
    needed = usage(config, key, arch)
    return needed is not None and needed.fits(arch)


def is_legal(config: Config, key: Key, arch: str) -> bool:
    """In the kernel's space, right for the key, and within the target's block."""
    space = SPACES[key.kernel]
    values = vars(config)
    if type(config) is not space.config or any(values[name] not in space.values[name] for name in values):
        return False
    return space.fits_key(config, key) and fits(config, key, arch)


# ------------------------------------------------------------------------------------------------------------ ranking


def _waves(tiles: int, config: Any, shared: int, arch: str) -> float:
    """Rounds in which the processors work `tiles` off, with as many on one as shared memory and threads allow."""
    target = ARCHITECTURES[arch]
    threads = config.num_warps * target.warp
    together = max(1, min(target.shared_bytes // max(shared, 1), THREADS // threads, REGISTERS // (threads * 128)))
    return math.ceil(tiles / (target.processors * together)) * together


def _tile_seconds(config: PairwiseConfig, key: Key, arch: str) -> float:
    used = tile_usage(config, key.B, key.dtype, arch, terms=key.kernel == "terms")
    itemsize = DTYPES[key.dtype].itemsize
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
    rate = plans.library_rate(DTYPES[key.dtype].itemsize, key.dtype == "tf32") / ARCHITECTURES[arch].processors
    side = 2 * M * C / (M + C)
    work = 2.0 * M * C * (max(key.N, N) + 2 * C) / rate * (1 + HALF_RATE_SIDE / side)
    return math.ceil(tiles / ARCHITECTURES[arch].processors) * repeats * work * (1 + STALL / config.num_stages)


def seconds(config: Config, key: Key, arch: str) -> float:
    """The model's time of a configuration, to order it among its kernel's."""
    if isinstance(config, PlanChoice):
        folded, other = sorted((key.M, key.N), reverse=config.fold == "more")
        itemsize = DTYPES[key.dtype].itemsize
        return plans.PLAN_SECONDS[config.kind](1, folded, other, key.D, key.B, itemsize, key.dtype == "tf32")
    gpu = kin(arch)
    if gpu is not None and isinstance(config, PairwiseConfig):
        return _tile_seconds(config, key, gpu)
    if gpu is not None and isinstance(config, GradientConfig):
        return _gradient_seconds(config, key, gpu)
    # Rows and chunks have no estimate: the nearest to the model's choice come first.
    known = default(key, arch)
    return sum(abs(math.log2((x + 1) / (y + 1))) for x, y in zip(astuple(config), astuple(known), strict=True))


def _is_redundant(config: Config, key: Key) -> bool:
    """A chunk that goes beyond S does what the next smaller one does."""
    if not isinstance(config, ChunkConfig):
        return False
    least = SPACES["chunk"].values
    return config.rows > max(key.M, least["rows"][0]) or config.columns > max(key.N, least["columns"][0])


def candidates(key: Key, arch: str, limit: int | None = None) -> list[Config]:
    """What the tuner measures for a key, `limit` at most: the model's choice, then by rank. The order decides ties.

    Example:
        >>> from gssf_triton.autotune.model import candidates
        >>> from gssf_triton.autotune.space import Key
        >>> candidates(Key("gradient_plan", "bf16", 512, 32, 64, 64), "sm_90")[0]
        PlanChoice(kind='one_pass', fold='fewer')
    """
    first = default(key, arch)
    legal = (c for c in SPACES[key.kernel].all(key) if c != first and not _is_redundant(c, key) and fits(c, key, arch))
    return [first, *sorted(legal, key=lambda c: (seconds(c, key, arch), tuple(map(str, astuple(c)))))][:limit]
