"""Configurations as frozen data, and the model's choice: pure functions of shape, dtype and architecture.

No GPU is used. An architecture is "sm_80", "sm_90", "sm_100", "gfx942", … or "interpreter". The compile gate (`make
aot`) checks the numbers: every configuration these functions can return fits the target's shared memory, spills no
register and uses its tensor cores. They have not been timed on a GPU: `choice` prefers a measured configuration, if
there is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PairwiseConfig:
    """Tile of S [BLOCK_M, BLOCK_N], BLOCK_K lanes a step, GROUP_M row tiles a column of the tile order."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8


@dataclass(frozen=True)
class FoldConfig:
    """BLOCK_M rows a program, BLOCK_K lanes a step, at most `column_programs` programs side by side along a row."""

    BLOCK_M: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    column_programs: int = 8


@dataclass(frozen=True)
class GradientConfig:
    """R's tile [BLOCK_M, BLOCK_C] summed BLOCK_N at a time, BLOCK_P lanes of the epilogue at a time.

    `max_splits` bounds the slices of the weight gradients' partial sums, and so their memory: splits · D · B floats.
    `rows_apart`: R's rows of a whole block do not fit the registers beside the fold's operands. So R is stored, and the
    fold kernel, which can split blocks, computes the rows from it.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_C: int
    BLOCK_P: int
    num_warps: int
    num_stages: int
    max_splits: int = 32
    rows_apart: bool = False


@dataclass(frozen=True)
class ChunkConfig:
    """The part of S that a streaming loop holds at a time: `rows` × `columns`."""

    rows: int
    columns: int


#: The smallest side Triton's dot takes.
MIN_DOT = 16


def padded_block(B: int) -> int:
    """B as the next power of two; 0 (no blocks) stays 0."""
    return 1 << (B - 1).bit_length() if B else 0


def tf32_allowed() -> bool:
    """Whether the user lets float32 products round to TF32, by torch.set_float32_matmul_precision."""
    return torch.get_float32_matmul_precision() != "highest"


def dot_precision(dtype: torch.dtype, arch: str, *, tf32: bool, whole_rows: bool = False) -> str:
    """Triton's `input_precision` for a product of `dtype` operands.

    float32 uses TF32 if that is allowed. If not, the product runs on NVIDIA's FMA units, which keep an operand's whole
    reduction in registers. A reduction over a tile's `whole_rows` does not fit there. It uses three TF32 products
    instead, which carry 21 bits of each operand. AMD multiplies float32 in its matrix cores.
    """
    if dtype != torch.float32 or arch == "interpreter":
        return "ieee"
    if tf32:
        return "tf32"
    return "tf32x3" if whole_rows and arch.startswith("sm_") else "ieee"


def is_small_memory(arch: str) -> bool:
    """True for AMD: 64 KiB of LDS a block hold neither wide tiles nor deep pipelines."""
    return arch.startswith("gfx")


def _splits_padding(B: int) -> bool:
    """True for padded blocks of more than 64 lanes: their masks and addresses of channels take registers."""
    return padded_block(B) > 64 and padded_block(B) != B


def pairwise_config(
    M: int, N: int, D: int, B: int, dtype: torch.dtype, arch: str, *, terms: bool = False
) -> PairwiseConfig:
    """The one-pass kernel's tile for S (M, N) over D channels in blocks of B (0: no block term)."""
    if arch == "interpreter":
        return PairwiseConfig(32, 32, 32, num_warps=4, num_stages=1, GROUP_M=2)
    half = dtype in (torch.float16, torch.bfloat16)
    if dtype == torch.float64:
        return PairwiseConfig(32, 32, 16, num_warps=4, num_stages=1)
    if not half:
        # float32 on the FMA units (precision "highest") keeps operands in registers: 64×64 does not spill. On Ampere
        # (except for blocks of 32), and if the fold is a loop of its own, a thread holds half as much.
        halves = (arch.startswith("sm_8") and B not in (0, 32)) or (arch.startswith("sm_") and padded_block(B) > 32)
        warps = 8 if halves and not terms else 4
        return PairwiseConfig(64, 32 if terms else 64, 32, num_warps=warps, num_stages=2)
    small = min(M, N) <= 64 or M * N <= 512 * 512
    if is_small_memory(arch):
        return PairwiseConfig(64, 64 if small or terms else 128, 32, num_warps=4, num_stages=2)
    padded = padded_block(B)
    # Two accumulators and 64 lanes of both folds need more registers than Ampere's mma.sync leaves.
    block_k = 32 if 0 < padded <= 32 or (terms and arch.startswith("sm_8")) or _splits_padding(B) else 64
    if arch.startswith("sm_9") and not (small or terms) and padded == B:
        block_k = 64  # needs no `drains`
    if small or terms:
        return PairwiseConfig(64, 64, block_k, num_warps=8 if terms and _splits_padding(B) else 4, num_stages=3)
    return PairwiseConfig(64 if _splits_padding(B) else 128, 128, block_k, num_warps=8, num_stages=3)


def drains(config: PairwiseConfig, B: int, dtype: torch.dtype, arch: str, *, terms: bool) -> bool:
    """Whether the one-pass kernel finishes a step's product with b before the next step's fold.

    On sm_90 the product may stay in flight. But if the fold's registers are written meanwhile, ptxas (13.4, Triton 3.9)
    makes every tensor instruction wait for the one before (its warning C7515). It does not if the fold is a loop of its
    own, nor in large tiles.
    """
    if not arch.startswith("sm_9") or padded_block(B) > config.BLOCK_K:
        return False
    wide = config.BLOCK_N >= 128 and (config.BLOCK_K >= 64 or config.BLOCK_M <= 64)
    return terms or not wide or dtype.itemsize > 2


def stores_both(arch: str, *, terms: bool) -> bool:
    """Whether the one-pass kernel contains the stores of both even and ragged S, so that no size compiles anew.

    The stores come after its loop, and cost no registers there on sm_80 and sm_90. With two terms, and on sm_100, both
    together spill or use the registers of a second program, so even and ragged S have a kernel each.
    """
    return not terms and arch.startswith(("sm_8", "sm_9", "interpreter"))


def stream_config(dtype: torch.dtype, arch: str, *, teacher: bool = False) -> PairwiseConfig:
    """The streaming kernel's tile, which leaves registers for the epilogue beside the product's accumulator.

    `teacher`: there are two accumulators.
    """
    if arch == "interpreter":
        return PairwiseConfig(32, 32, 32, num_warps=4, num_stages=1, GROUP_M=2)
    if dtype == torch.float64:
        return PairwiseConfig(32, 32, 16, num_warps=4, num_stages=1)
    if dtype == torch.float32:
        # With a teacher and 8 warps, sm_80's assembler keeps to 80 registers and spills.
        warps = 8 if arch.startswith("sm_") and not (teacher and arch.startswith("sm_8")) else 4
        return PairwiseConfig(64, 32 if teacher else 64, 32, num_warps=warps, num_stages=2)
    if is_small_memory(arch):
        return PairwiseConfig(64, 64, 32, num_warps=4, num_stages=2)
    if teacher:
        return PairwiseConfig(64, 64, 64, num_warps=4, num_stages=3)
    # 32 numbers of S a thread, 16 on sm_100: with more, the logits, their exponentials and the slope spill.
    return PairwiseConfig(128, 32 if arch.startswith("sm_10") else 64, 64, num_warps=8, num_stages=3)


def fold_config(M: int, D: int, B: int, dtype: torch.dtype, arch: str) -> FoldConfig:
    """The fold and matched-pairs kernels' tile for (M, D) rows in blocks of B (0: no block term)."""
    if arch == "interpreter":
        return FoldConfig(32, 32, num_warps=4, num_stages=1, column_programs=2)
    if dtype == torch.float64:
        return FoldConfig(16, 16, num_warps=4, num_stages=1)
    half = dtype in (torch.float16, torch.bfloat16)
    block_k = 64 if half and not _splits_padding(B) else 32
    return FoldConfig(64, block_k, num_warps=8 if arch.startswith("sm_8") else 4, num_stages=2)


def finish_config(dtype: torch.dtype, arch: str) -> FoldConfig:
    """The tile of the kernels that finish gradients of normalised rows: sums along rows, no product."""
    if arch == "interpreter":
        return FoldConfig(32, 32, num_warps=4, num_stages=1)
    # Few rows, so that those of all programs that run at once stay in cache for the second time they are read.
    rows = 8 if dtype.itemsize == 2 else 4  # 16 bytes a lane, of AMD's wide warps too
    return FoldConfig(rows, 256 if dtype.itemsize < 8 else 128, num_warps=4, num_stages=1)


def gradient_config(B: int, dtype: torch.dtype, arch: str, *, tf32: bool) -> GradientConfig:
    """The gradient kernel's tile for blocks of B (0: no block term); a program holds whole blocks.

    R's rows of a whole block and the epilogue's operands share the registers, so larger blocks allow fewer rows.
    `tf32`: the float32 products may round to TF32 (always so for half-precision features).
    """
    padded = padded_block(B)
    if arch == "interpreter":
        block_c = max(padded, 32)
        return GradientConfig(32, 32, block_c, min(block_c, 32), num_warps=4, num_stages=1, max_splits=2)
    half = dtype in (torch.float16, torch.bfloat16)
    block_c = max(padded, 64)
    tensor_cores = half or (dtype == torch.float32 and tf32)
    if arch.startswith("sm_9") and tensor_cores:
        if block_c <= 64:
            return GradientConfig(64, 64 if half else 32, block_c, 32, num_warps=4, num_stages=2)
        return GradientConfig(64, 32, block_c, 32, num_warps=8, num_stages=2)
    if arch.startswith("sm_") and tensor_cores:
        if block_c <= (64 if arch.startswith("sm_8") else 128):
            # float32 features beside R fill the registers.
            return GradientConfig(64, 32, block_c, 32 if half else 16, num_warps=8, num_stages=2)
        if block_c <= 128:
            return GradientConfig(32, 32, block_c, 16, num_warps=8, num_stages=1)
    # An exact product is three TF32 products: high and low parts of [16, 256] numbers of R fill the registers.
    apart = block_c > 128 and dtype == torch.float32 and not tf32 and arch.startswith("sm_")
    # So that no number of registers is one too many, blocks up to 16 have other steps on sm_80.
    block_p = 32 if arch.startswith("sm_8") and 0 < padded <= 16 else 16
    warps = 8 if _exact_gradient_is_wide(B, arch) else 4
    return GradientConfig(16, 32, block_c, block_p, num_warps=warps, num_stages=1, rows_apart=apart)


def _exact_gradient_is_wide(B: int, arch: str) -> bool:
    """True if four warps of the exact gradient's tile spill: they hold too much, or get too few registers."""
    block_c = max(padded_block(B), 64)
    if arch.startswith("sm_8"):
        return block_c > 128 or B == 0
    if arch.startswith("sm_9"):
        return block_c >= 128
    if arch.startswith("sm_10"):
        return block_c > 128 or (block_c <= 64 and not 0 < padded_block(B) <= 16)
    return arch.startswith("sm_") and block_c > 128


@dataclass(frozen=True)
class BoundedConfig(PairwiseConfig):
    """A tile whose threads get at most `maxnreg` registers: with 8 warps, two programs then share a processor."""

    maxnreg: int = 128


#: Programs that a pass over S is cut into: four waves of two on each of an H100's 132 processors.
STREAM_PROGRAMS = 4 * 2 * 132


def stream_spans(M: int, N: int, tiles_m: int, tiles_n: int, arch: str) -> tuple[int, int]:
    """How many spans of row tiles and of column tiles the streaming kernel cuts S, or a part of S (M, N), into.

    Each pair of spans is a program. Every row has a state a span of columns, every column one a span of rows: the
    numbers are those with the fewest states, about √programs·(M + N) at most.
    """
    programs = 4 if arch == "interpreter" else STREAM_PROGRAMS
    spans_m = min(tiles_m, max(1, round((programs * M / N) ** 0.5)))
    spans_n = min(tiles_n, -(-programs // spans_m))
    return min(tiles_m, -(-programs // spans_n)), spans_n


def may_store(dtype: torch.dtype, arch: str, *, sums: bool) -> bool:
    """False where a pass has no registers left to store S as well: with plain sums in half precision on sm_8x."""
    return not (sums and dtype == torch.float16 and arch.startswith("sm_8"))


@dataclass(frozen=True)
class MergeConfig:
    """The kernel that merges states: BLOCK_M rows or columns of S a program."""

    BLOCK_M: int
    num_warps: int
    num_stages: int


MERGE_CONFIG = MergeConfig(128, num_warps=4, num_stages=1)


def chunk_config(device_type: str) -> ChunkConfig:
    """The part of S that the streaming losses hold at a time, within a budget.

    On a CPU a chunk and the arrays made from it (2 MiB each in float32) mostly stay in the caches. InfoNCE at 4,096
    pairs of 256 channels ran fastest with it, among 256 to 1,024 rows by 1,024 to 4,096 columns. On a GPU the slope's
    chunk is as large as the budget allows: of 4,096 rows by 1,024 channels the library's products fill half the
    processors.
    """
    return ChunkConfig(512, 1024) if device_type == "cpu" else ChunkConfig(16384, 32768)


#: Bytes that all arrays of a chunk's size may take together, by device type.
CHUNK_BUDGET = {"cpu": 48 * 2**20, "cuda": 192 * 2**20}
#: Arrays of a chunk's size, in the operands' dtype, that are alive at once: torch's similarities and the arrays made
#: from them; or the slope that the kernel stores.
TORCH_CHUNK_ARRAYS, TRITON_CHUNK_ARRAYS = 4, 1


@dataclass(frozen=True)
class LateInteractionConfig:
    """BLOCK_M region rows against WORDS words of each of CAPTIONS captions, BLOCK_K lanes a step."""

    BLOCK_M: int
    CAPTIONS: int
    WORDS: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8

    def images(self, R: int) -> int:
        """Images of R regions that share a tile: as many as fit whole, up to 8; a larger image takes several tiles."""
        return max(1, min(8, self.BLOCK_M // max(R, 1)))


def late_interaction_config(R: int, L: int, D: int, dtype: torch.dtype, arch: str) -> LateInteractionConfig:
    """The late-interaction kernel's tile for images of R regions and captions of L words."""
    words = min(padded_block(L), 16)
    if arch == "interpreter":
        words = min(words, 8)
        return LateInteractionConfig(32, 32 // words, words, 32, num_warps=4, num_stages=1, GROUP_M=2)
    if dtype == torch.float64:
        return LateInteractionConfig(32, 32 // words, words, 16, num_warps=4, num_stages=1)
    half = dtype in (torch.float16, torch.bfloat16)
    if is_small_memory(arch):
        return LateInteractionConfig(64, 64 // words, words, 32, num_warps=4, num_stages=2)
    # 16 numbers of S a thread: pooling holds a maximum, a sum and an index for each; 32 would spill.
    if not half:
        if arch.startswith("sm_10"):  # eight warps get 128 registers, which are too few
            return LateInteractionConfig(64, 32 // words, words, 32, num_warps=4, num_stages=1)
        return LateInteractionConfig(64, 64 // words, words, 32, num_warps=8, num_stages=2)
    return LateInteractionConfig(64, 64 // words, words, 64, num_warps=8, num_stages=3)


@dataclass(frozen=True)
class CrossAttentionConfig:
    """All BLOCK_M ≥ R regions of one image against all WORDS ≥ L words of CAPTIONS captions, BLOCK_K lanes a step."""

    BLOCK_M: int
    CAPTIONS: int
    WORDS: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


#: Defaults: 36 regions an image (bottom-up attention's boxes), 32 words a caption, enough for most.
REGIONS, WORDS = 36, 32

#: The most regions and words of a pair that the cross-attention kernel holds in registers: with 128 of either, the next
#: power of two, it spills.
CROSS_ATTENTION_REGIONS, CROSS_ATTENTION_WORDS = 64, 64


def cross_attention_fits(R: int, L: int) -> bool:
    """True if the cross-attention kernel takes images of R regions and captions of L words."""
    rows, words = max(padded_block(R), MIN_DOT), max(padded_block(L), 1)
    return rows <= CROSS_ATTENTION_REGIONS and words <= CROSS_ATTENTION_WORDS


def cross_attention_config(R: int, L: int, dtype: torch.dtype, arch: str) -> CrossAttentionConfig:
    """The cross-attention kernel's tile for images of R regions and captions of L words."""
    assert cross_attention_fits(R, L)
    rows, words = max(padded_block(R), MIN_DOT), padded_block(L)
    if arch == "interpreter":
        return CrossAttentionConfig(rows, max(1, 32 // words), words, 32, num_warps=4, num_stages=1)
    captions = max(1, max(2048 // rows, MIN_DOT) // words)
    half = dtype in (torch.float16, torch.bfloat16)
    block_k = 16 if dtype == torch.float64 else 64 if half and not is_small_memory(arch) else 32
    # Exact float32 has no registers left for a second stage on sm_100.
    stages = 1 if arch.startswith("sm_10") and dtype == torch.float32 else 2
    return CrossAttentionConfig(rows, captions, words, block_k, num_warps=8, num_stages=stages)
