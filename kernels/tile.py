"""The similarity tile, which every kernel of the package uses.

A tile walks the D channels in chunks of BLOCK_K *lanes*. A lane is a channel, except where the block size B is not a
power of two: then every group of B channels is padded to BLOCK_B = next power of two lanes, and the padding is masked
to zero. Three cases, chosen at compile time:

* BLOCK_B <= BLOCK_K: a chunk holds BLOCK_K // BLOCK_B whole groups, and their weights one block-diagonal
  [BLOCK_K, BLOCK_K] tile, so that small blocks still feed the tensor cores;
* BLOCK_B > BLOCK_K: a group spans BLOCK_B // BLOCK_K chunks, and the fold of one chunk sums over all of them;
* no block weight: lanes are channels, and the fold is elementwise, or the identity.

Accumulators are float32, or float64 for float64 features.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gssf_triton import constants
from gssf_triton.kernels.args import Rows, Weights

#: True if `@triton.jit` decorates for the interpreter; fixed when this module is first imported.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

#: Two faults of the interpreter (Triton 3.6 to 3.9), each corrected in one place: it multiplies bfloat16 operands
#: wrongly (relative error 1e10), so `dot` upcasts; it truncates float32 to bfloat16, so `cast` rounds first.
INTERPRETER = tl.constexpr(INTERPRETED)

#: Smallest norm a row is divided by.
NORM_EPS = tl.constexpr(constants.NORM_EPS)


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """acc + x @ y, operands of one dtype, accumulated in acc's dtype."""
    if INTERPRETER:
        x = x.to(acc.dtype)
        y = y.to(acc.dtype)
    return tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def nearest(x, PRECISION: tl.constexpr):
    """x rounded to the nearest TF32 number if its product is in TF32.

    Tensor cores drop a float32 operand's last 13 bits, which shrinks it by 0.035 % on average. A product shrinks by
    twice that, and by as much again for each further product of a chain. Rounded operands err up as often as down, so
    nothing shrinks. Only for operands that are in registers anyway: one that goes from memory to the tensor cores would
    take a detour. Numbers of 2¹²⁷ and above, which rounding might make infinite, NaN and Inf stay as they are.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        x = tl.where((bits & 0x7F800000) < 0x7F000000, rounded, x)
    return x


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest even; float64 to bfloat16 by way of float32, which the interpreter rounds."""
    if dtype == tl.bfloat16 and x.dtype == tl.float64:
        x = x.to(tl.float32)
    if INTERPRETER and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row tile, column tile) of program `pid`: columns of GROUP_M row tiles, so that neighbours share loads in L2."""
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % rows, within // rows


@triton.jit
def clamped_rows(tile, rows, BLOCK: tl.constexpr):
    """Row numbers of a tile, and the ones to load: rows past the end load row 0, so that loads need no row mask.

    Results of rows past the end are never stored, so a NaN in row 0 stays in row 0.

    The hint restores the contiguity that the clamp hides from the compiler; without it tiles move one number at a time.
    It is false for a ragged last tile. If rows are a matrix's contiguous side, 16 bytes that start inside the matrix
    may end past it, and rows past the end then hold whatever follows in memory. Such a load stays within 16 aligned
    bytes whose first number exists, so it never faults. But these rows must not be summed over, since what follows may
    be NaN, and must not be addresses of stores: use masked row numbers there.
    """
    offs = tile * BLOCK + tl.arange(0, BLOCK)
    clamped = tl.where(offs < rows, offs, 0)
    return offs, tl.max_contiguous(tl.multiple_of(clamped, BLOCK), BLOCK).to(tl.int64)


@triton.jit
def rows_of(x, rows):
    """The rows [BLOCK] of a `Matrix`'s first matrix."""
    return Rows(x.ptr + rows * x.row, x.channel)


@triton.jit
def batch_rows(x, z, rows):
    """The rows [BLOCK] of matrix z of a `Matrix`."""
    return Rows(x.ptr + z * x.batch + rows * x.row, x.channel)


@triton.jit
def stride_of(stride, EVEN: tl.constexpr):
    """A `PairMatrix`'s stride as the compiler may know it: 1 on the contiguous side, a multiple of 16 if EVEN."""
    if stride is None:
        return 1
    elif EVEN:
        return stride // 16 * 16
    else:
        return stride


@triton.jit
def side_of(size, stride, EVEN: tl.constexpr):
    """The length of a `PairMatrix`'s side as the compiler may know it: a multiple of 16 if contiguous and EVEN."""
    if stride is None and EVEN:
        return size // 16 * 16
    else:
        return size


@triton.jit
def pair_rows(x, z, offs_m, EVEN: tl.constexpr):
    """Offsets [BLOCK_M] of the rows of matrix z of a `PairMatrix`."""
    return z * stride_of(x.batch, EVEN) + offs_m.to(tl.int64) * stride_of(x.row, EVEN)


@triton.jit
def pair_columns(x, offs_n, EVEN: tl.constexpr):
    """Offsets [BLOCK_N] of a `PairMatrix`'s columns within a row."""
    return offs_n.to(tl.int64) * stride_of(x.column, EVEN)


@triton.jit
def pair_mask(x, offs_m, offs_n, M, N, EVEN: tl.constexpr):
    """Which pairs of rows and columns are inside a `PairMatrix` (M, N), [BLOCK_M, BLOCK_N]."""
    return (offs_m < side_of(M, x.row, EVEN))[:, None] & (offs_n < side_of(N, x.column, EVEN))[None, :]


@triton.jit
def channels(chunk, D, TILE: tl.constexpr):
    """The channel of each lane of a chunk, and whether the lane has one, [BLOCK_K] each."""
    lanes = chunk * TILE.BLOCK_K + tl.arange(0, TILE.BLOCK_K)
    if TILE.BLOCK_B == TILE.B:
        offs = lanes
        valid = lanes < D
    else:
        inner = lanes % TILE.BLOCK_B
        offs = lanes // TILE.BLOCK_B * TILE.B + inner
        valid = (inner < TILE.B) & (offs < D)
    if TILE.WIDE:
        offs = offs.to(tl.int64)
    return offs, valid


@triton.jit
def load_masked(ptrs, valid, EVEN: tl.constexpr):
    """Load, without a mask if every lane is a channel: masks cost address registers in the pipelined loop."""
    if EVEN:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=valid, other=0.0)


@triton.jit
def load_chunk(x, chunk, D, TILE: tl.constexpr):
    """A chunk of the `Rows` x, [BLOCK, BLOCK_K]."""
    offs, valid = channels(chunk, D, TILE)
    return load_masked(x.at[:, None] + (offs * x.channel)[None, :], valid[None, :], TILE.EVEN_D)


@triton.jit
def block_weight(chunk_p, chunk_q, blocks, D, TILE: tl.constexpr):
    """(W ⊙ U)'s block term between two chunks of lanes, [BLOCK_K (p), BLOCK_K (q)], zero off the block diagonal."""
    lanes_p = chunk_p * TILE.BLOCK_K + tl.arange(0, TILE.BLOCK_K)
    lanes_q = chunk_q * TILE.BLOCK_K + tl.arange(0, TILE.BLOCK_K)
    group_p = lanes_p // TILE.BLOCK_B
    inner_p = lanes_p % TILE.BLOCK_B
    group_q = lanes_q // TILE.BLOCK_B
    inner_q = lanes_q % TILE.BLOCK_B
    mask = (group_p * TILE.B < D)[:, None] & (inner_p < TILE.B)[:, None] & (inner_q < TILE.B)[None, :]
    mask &= group_p[:, None] == group_q[None, :]
    ptrs = blocks.ptr + (group_p * blocks.group + inner_p * blocks.p)[:, None] + (inner_q * blocks.q)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def nothing_of(x, ACC: tl.constexpr):
    """0 where x is finite, else NaN. In ACC, because the interpreter would subtract bfloat16's bits."""
    x = x.to(ACC)
    return x - x


@triton.jit
def fold_chunk(a, weights, chunk, D, CONFINE: tl.constexpr, TILE: tl.constexpr):
    """One chunk of the `Rows` a, and of the two terms of T(a) = a ⊙ W_diag + [a_1 W_1 | … | a_G W_G].

    Returns (a, diagonal, block), [BLOCK_M, BLOCK_K] each: a in its own dtype, the terms in ACC. If a term has no
    weight, a is returned as an unused placeholder. The product is in the blocks' dtype: a's, or a wider one. CONFINE
    keeps a row's NaN or Inf in its own block of T(a): packed blocks share a product, in which zero times NaN is NaN.
    Needed only if T(a) is the result.
    """
    offs, valid = channels(chunk, D, TILE)
    x = load_masked(a.at[:, None] + (offs * a.channel)[None, :], valid[None, :], TILE.EVEN_D)
    diagonal = x
    block = x
    if weights.diag is not None:
        w_diag = load_masked(weights.diag.ptr + offs * weights.diag.stride, valid, TILE.EVEN_D).to(TILE.ACC)
        diagonal = x.to(TILE.ACC) * w_diag[None, :]
    if weights.blocks is not None:
        block = tl.zeros([TILE.BLOCK_M, TILE.BLOCK_K], TILE.ACC)
        if TILE.BLOCK_B <= TILE.BLOCK_K:
            w = nearest(block_weight(chunk, chunk, weights.blocks, D, TILE), TILE.PRECISION)
            if CONFINE and TILE.BLOCK_B < TILE.BLOCK_K:
                GROUPS: tl.constexpr = TILE.BLOCK_K // TILE.BLOCK_B
                not_finite = nothing_of(x, TILE.ACC)
                by_group = tl.sum(tl.reshape(not_finite, [TILE.BLOCK_M, GROUPS, TILE.BLOCK_B]), axis=2)[:, :, None]
                spread = tl.broadcast_to(by_group, [TILE.BLOCK_M, GROUPS, TILE.BLOCK_B])
                block = tl.reshape(spread, [TILE.BLOCK_M, TILE.BLOCK_K])
                finite = tl.where(not_finite == 0, x, 0.0).to(x.dtype)
                block = dot(nearest(finite, TILE.PRECISION).to(w.dtype), w, block, TILE.PRECISION)
            else:
                block = dot(nearest(x, TILE.PRECISION).to(w.dtype), w, block, TILE.PRECISION)
        else:
            PARTS: tl.constexpr = TILE.BLOCK_B // TILE.BLOCK_K
            first = chunk // PARTS * PARTS
            for part in range(first, first + PARTS):
                y = load_chunk(a, part, D, TILE)
                w = nearest(block_weight(part, chunk, weights.blocks, D, TILE), TILE.PRECISION)
                block = dot(nearest(y, TILE.PRECISION).to(w.dtype), w, block, TILE.PRECISION)
    return x, diagonal, block


@triton.jit
def folded(a, diagonal, block, weights, ACC: tl.constexpr):
    """The sum of the existing terms, in ACC. Without weights T is the identity (a is folded already)."""
    if weights.diag is not None and weights.blocks is not None:
        return diagonal + block
    elif weights.blocks is not None:
        return block
    elif weights.diag is not None:
        return diagonal
    else:
        return a.to(ACC)


@triton.jit
def inverse_norm(squares):
    """1 / max(‖x‖₂, 1e-12) from the sum of squares; 0 if the sum overflowed, NaN if it is NaN."""
    norm = tl.sqrt(squares)
    return 1.0 / tl.maximum(norm, NORM_EPS, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def squares_of(x, ACC: tl.constexpr):
    """x² in ACC, NaN where x is infinite. So a sum of squares is infinite only if it overflows."""
    return x.to(ACC) * x.to(ACC) + nothing_of(x, ACC)


@triton.jit
def scaled(s, scale_a, scale_b):
    """s times both scales (inverse norms). Where a scale is 0 (its norm overflowed), the result is 0 for any s."""
    return tl.where((scale_a == 0) | (scale_b == 0), scale_a * scale_b, s * scale_a * scale_b)


@triton.jit
def similarity_tile(
    a, b, weights, D, chunks, TILE: tl.constexpr,
    TERMS: tl.constexpr = False, NORMALIZE: tl.constexpr = False, DRAIN: tl.constexpr = False,
):  # fmt: skip
    """S between a tile of rows of a and one of b, in one pass over the channels: load, fold, product.

    a and b are `Rows`. Returns (s, s_diag), [BLOCK_M, BLOCK_N] in ACC. With TERMS, s holds the block term and s_diag
    the diagonal term; without, both are the whole of S. NORMALIZE computes both sides' norms from the tiles that the
    product loads anyway, and scales at the end. DRAIN: see `configs.drains`.
    """
    s = tl.zeros([TILE.BLOCK_M, TILE.BLOCK_N], TILE.ACC)
    if TERMS:
        s_diag = tl.zeros([TILE.BLOCK_M, TILE.BLOCK_N], TILE.ACC)
    if NORMALIZE:
        squares_a = tl.zeros([TILE.BLOCK_M], TILE.ACC)
        squares_b = tl.zeros([TILE.BLOCK_N], TILE.ACC)
    for chunk in range(0, chunks):
        x, diagonal, block = fold_chunk(a, weights, chunk, D, False, TILE)
        offs, valid = channels(chunk, D, TILE)
        y = load_masked(b.at[None, :] + (offs * b.channel)[:, None], valid[:, None], TILE.EVEN_D)  # [BLOCK_K, BLOCK_N]
        if NORMALIZE:
            squares_a += tl.sum(squares_of(x, TILE.ACC), axis=1)
            squares_b += tl.sum(squares_of(y, TILE.ACC), axis=0)
        if TERMS:
            s_diag = dot(nearest(cast(diagonal, y.dtype), TILE.PRECISION), y, s_diag, TILE.PRECISION)
            s = dot(nearest(cast(block, y.dtype), TILE.PRECISION), y, s, TILE.PRECISION)
        elif weights.diag is not None or weights.blocks is not None:
            t = folded(x, diagonal, block, weights, TILE.ACC)
            s = dot(nearest(cast(t, y.dtype), TILE.PRECISION), y, s, TILE.PRECISION)
        else:
            # Folded already: x goes from shared memory straight to the tensor cores, without a detour through ACC.
            s = dot(x, y, s, TILE.PRECISION)
        if DRAIN:
            # Reading a sum waits for it. That is the only cost: the read itself is gone from the machine code.
            s = tl.where(chunk >= 0, s, 0.0)
            if TERMS:
                s_diag = tl.where(chunk >= 0, s_diag, 0.0)
    if NORMALIZE:
        scale_a, scale_b = inverse_norm(squares_a)[:, None], inverse_norm(squares_b)[None, :]
        s = scaled(s, scale_a, scale_b)
        if TERMS:
            s_diag = scaled(s_diag, scale_a, scale_b)
    if TERMS:
        return s, s_diag
    else:
        return s, s


@triton.jit
def product_tile(a, b, D, chunks, TILE: tl.constexpr):
    """a bᵀ of a tile of folded rows and one of b, [BLOCK_M, BLOCK_N] in ACC."""
    s, _ = similarity_tile(a, b, Weights(None, None), D, chunks, TILE)
    return s
