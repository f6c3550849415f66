"""The static model: what a configuration takes of a block before anything is compiled, and whether that fits.

The shared memory is what Triton's pipeliner allocates: a tile of each operand for each stage in flight. Registers are
counted where they are many, in accumulators, against bounds found by compiling. Both are held to real compiles by a
test. The verdict errs to one side: what it passes compiles without spills; some of what it refuses would, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gssf_triton.autotune.keys import PAIR_KERNELS, STREAM_KERNELS, Key, dtype_of
from gssf_triton.autotune.space import SPACES, Config
from gssf_triton.kernels import configs, plans
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
from gssf_triton.kernels.retrieval_configs import LARGEST_KERNEL_K, RetrievalConfig, retrieval_config
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


@dataclass(frozen=True)
class Usage:
    """Shared bytes a block, and numbers in accumulators a thread with the most it may hold."""

    shared: int
    accumulators: int
    most_accumulators: int

    def fits(self, arch: str) -> bool:
        return self.shared + SLACK <= shared_bytes(arch) and self.accumulators <= self.most_accumulators


def _gate_arch(arch: str) -> str:
    known = kin(arch)
    assert known is not None, f"{arch} has no shared memory to count"
    return known


def _pipelined(numerics: str, arch: str, rows: int) -> bool:
    """True for instructions that read shared memory while later tiles arrive: they keep one more stage there."""
    return arch.startswith(("sm_9", "sm_10")) and numerics != "fp32" and rows >= ARCHITECTURES[arch].tensor_rows


def tile_usage(config: PairwiseConfig, B: int, numerics: str, arch: str, *, terms: bool = False) -> Usage:
    """The one-pass kernel's; B = 0 for the product alone (a diagonal beside it takes no more)."""
    arch = _gate_arch(arch)
    itemsize = dtype_of(numerics).itemsize
    threads = config.num_warps * ARCHITECTURES[arch].warp
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
        # a goes through registers into the fold, and is let go of a stage earlier.
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
    arch = _gate_arch(arch)
    itemsize = dtype_of(numerics).itemsize
    tile = config.BLOCK_M * config.BLOCK_K
    w = config.BLOCK_K * config.BLOCK_K if B else 0
    threads = config.num_warps * ARCHITECTURES[arch].warp
    return Usage((tile * 2 + w) * itemsize * config.num_stages, (2 * tile + w) // threads, most)


def gradient_usage(config: GradientConfig, numerics: str, arch: str, most: int) -> Usage:
    """The gradient kernel's: R's rows of whole blocks, and the epilogue's products beside them."""
    arch = _gate_arch(arch)
    itemsize = dtype_of(numerics).itemsize
    threads = config.num_warps * ARCHITECTURES[arch].warp
    step = (config.BLOCK_M + config.BLOCK_C) * config.BLOCK_N * itemsize
    # The epilogue is in float32: R, and a slab of y and of the weights.
    epilogue = (config.BLOCK_M * config.BLOCK_C + 2 * config.BLOCK_P * config.BLOCK_C) * 4
    numbers = config.BLOCK_M * config.BLOCK_C + 2 * config.BLOCK_P * config.BLOCK_C
    return Usage(max(step * config.num_stages, epilogue), numbers // threads, most)


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
        held = config.BLOCK_M * LARGEST_KERNEL_K // (config.num_warps * ARCHITECTURES[_gate_arch(arch)].warp)
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


def default(key: Key, arch: str) -> Config:
    """The model's choice for a key's own shape: what runs where no table has anything to say."""
    return choice(key.kernel, key.M, key.N, key.D, key.B, dtype_of(key.dtype), arch, tf32=key.dtype == "tf32")


def choice(
    kernel: str, M: int, N: int, D: int, B: int, dtype: torch.dtype, arch: str, *, tf32: bool, batch: int = 1
) -> Config:
    """The model's choice for a shape; for plans the rates of torch's setting for float32 products apply.

    Example:
        >>> import torch
        >>> from gssf_triton.autotune.model import choice
        >>> choice("plan", 8192, 8192, 1024, 32, torch.bfloat16, "sm_90", tf32=True)
        PlanChoice(kind='fold_product', fold='fewer')
    """
    if kernel in ("pairwise", "product", "terms"):
        return configs.pairwise_config(M, N, D, B, dtype, arch, terms=kernel == "terms")
    if kernel in ("fold", "paired"):
        return configs.fold_config(M, D, B, dtype, arch)
    if kernel == "gradient":
        return configs.gradient_config(B, dtype, arch, tf32=tf32 or dtype in (torch.float16, torch.bfloat16))
    if kernel == "chunk":
        return configs.chunk_config("cpu" if arch == "cpu" else "cuda")
    if kernel in STREAM_KERNELS:
        return configs.stream_config(dtype, arch, teacher=kernel == "stream_teacher")
    if kernel == "ranked":
        return retrieval_config(dtype, arch, configs.dot_precision(dtype, arch, tf32=tf32))
    if kernel == "late_interaction":
        return configs.late_interaction_config(M, N, D, dtype, arch)
    if kernel == "cross_attention":
        return configs.cross_attention_config(M, N, dtype, arch)
    assert kernel in ("plan", "gradient_plan"), kernel
    return PlanChoice(plans.modelled_plan(batch, M, N, D, B, dtype.itemsize, tf32=tf32).kind, "fewer")


def usage(config: Any, key: Key, arch: str) -> Usage | None:
    """What `config` takes; None for what is no kernel of ours.

    For kernels whose registers nobody counted tile by tile the model's choice, which the gate compiles, is the bound.
    """
    if key.kernel in EPILOGUE_KERNELS:
        return _epilogue_usage(config, key, arch, _epilogue_usage(default(key, arch), key, arch, 0).accumulators)
    if isinstance(config, PairwiseConfig):
        return tile_usage(config, key.B, key.dtype, arch, terms=key.kernel == "terms")
    if isinstance(config, FoldConfig):
        known = default(key, arch)
        assert isinstance(known, FoldConfig)
        most = rows_usage(known, key.B, key.dtype, arch, 0).accumulators
        return rows_usage(config, key.B, key.dtype, arch, most)
    if isinstance(config, GradientConfig):
        known = default(key, arch)
        assert isinstance(known, GradientConfig)
        return gradient_usage(config, key.dtype, arch, gradient_usage(known, key.dtype, arch, 0).accumulators)
    return None


def chunk_bytes(config: ChunkConfig, numerics: str, arch: str) -> int:
    """What everything of a chunk's size takes: in torch on a CPU, with our kernel on a GPU."""
    arrays = configs.TORCH_CHUNK_ARRAYS if arch == "cpu" else configs.TRITON_CHUNK_ARRAYS
    return config.rows * config.columns * arrays * dtype_of(numerics).itemsize


def fits(config: Any, key: Key, arch: str) -> bool:
    """True where `config` may be launched for `key`: by the model for targets it knows, and for the model's choice."""
    if isinstance(config, PlanChoice) or config == default(key, arch):
        return True
    if isinstance(config, ChunkConfig):
        return chunk_bytes(config, key.dtype, arch) <= configs.CHUNK_BUDGET["cpu" if arch == "cpu" else "cuda"]
    if kin(arch) is None:
        return arch == "interpreter"
    if isinstance(config, GradientConfig):
        known = default(key, arch)
        assert isinstance(known, GradientConfig)
        # Rows that need a kernel of their own need one in every tile of that block.
        if known.rows_apart and not config.rows_apart:
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
