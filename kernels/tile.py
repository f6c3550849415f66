"""The similarity tile: what every kernel of the package shares.

A tile walks the D channels in chunks of BLOCK_K *lanes*. A lane is a channel, except where the block size B is not a
power of two: then every group of B channels is padded to BLOCK_B = next power of two lanes, and the padding is masked
to zero. Three cases follow, settled at compile time:

* BLOCK_B <= BLOCK_K: a chunk holds BLOCK_K // BLOCK_B whole groups, and their weights one block-diagonal
  [BLOCK_K, BLOCK_K] tile, so that small blocks still feed the tensor cores;
* BLOCK_B > BLOCK_K: a group spans BLOCK_B // BLOCK_K chunks, and the fold of one chunk sums over all of them;
* no block weight: lanes are channels, and the fold is elementwise, or nothing at all.

Accumulators are float32, or float64 for float64 features.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: True where `@triton.jit` decorates for the interpreter: fixed when this module is first imported.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

#: Two faults of the interpreter (Triton 3.6 to 3.9), each mended in one place: it multiplies bfloat16 operands wrongly
#: (relative error 1e10), so `dot` upcasts; it truncates float32 to bfloat16, so `cast` rounds first.
INTERPRETER = tl.constexpr(INTERPRETED)

#: Smallest norm a row is divided by: `gssf_triton.constants.NORM_EPS`, which a test holds this to.
NORM_EPS = tl.constexpr(1e-12)


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """acc + x @ y, operands of one dtype, accumulated in acc's dtype."""
    if INTERPRETER:
        x = x.to(acc.dtype)
        y = y.to(acc.dtype)
    return tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def nearest(x, PRECISION: tl.constexpr):
    """x rounded to the nearest TF32 number, where the product that takes it is in TF32.

    Tensor cores drop a float32 operand's last 13 bits and so make it smaller, by 0.035 % on average: products shrink by
    twice that, chains of products by as much again each. Rounded operands err as often up as down, and lose nothing
    more. For operands that are in registers anyway: one that goes from memory to the tensor cores would take a detour.
    Numbers of 2¹²⁷ and above, which rounding might make infinite, and NaN and Inf pass as they are.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        x = tl.where((bits & 0x7F800000) < 0x7F000000, rounded, x)
    return x


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest even; float64 by way of float32, which the interpreter can round from."""
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
    """Row numbers of a tile and the ones to load: rows past the end load row 0, so that loads need no row mask.

    What those rows compute is never stored; a NaN in row 0 therefore stays in row 0.

    The hint gives back the contiguity that the clamp hides from the compiler, without which tiles move one number at a
    time. It is untrue of a ragged last tile: where rows are a matrix's contiguous side, 16 bytes that start inside it
    may end past it, and rows past the end then hold whatever follows. Such a load stays within 16 aligned bytes whose
    first number exists, so it never faults. Two uses are therefore wrong: rows that are summed over, since what
    follows may be NaN, and addresses of stores, for which masked row numbers will do.
    """
    offs = tile * BLOCK + tl.arange(0, BLOCK)
    clamped = tl.where(offs < rows, offs, 0)
    return offs, tl.max_contiguous(tl.multiple_of(clamped, BLOCK), BLOCK).to(tl.int64)


@triton.jit
def stride_of(stride, EVEN: tl.constexpr):
    """A stride of a `launch.matrix`, told to the compiler: 1 along the contiguous side, multiples of 16 where EVEN."""
    if stride is None:
        return 1
    elif EVEN:
        return stride // 16 * 16
    else:
        return stride


@triton.jit
def side_of(size, stride, EVEN: tl.constexpr):
    """The length of a `launch.matrix`'s side, told to the compiler: where EVEN a contiguous one is a multiple of 16."""
    if stride is None and EVEN:
        return size // 16 * 16
    else:
        return size


@triton.jit
def channels(chunk, D, B: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr):
    """Channel of each lane of a chunk and whether it is one, [BLOCK_K] each. WIDE: channel × stride needs int64."""
    lanes = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
    if BLOCK_B == B:
        offs = lanes
        valid = lanes < D
    else:
        inner = lanes % BLOCK_B
        offs = lanes // BLOCK_B * B + inner
        valid = (inner < B) & (offs < D)
    if WIDE:
        offs = offs.to(tl.int64)
    return offs, valid


@triton.jit
def load_masked(ptrs, valid, EVEN: tl.constexpr):
    """Load without a mask where every lane is a channel: masked loads cost address registers in the pipelined loop."""
    if EVEN:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=valid, other=0.0)


@triton.jit
def block_weight(
    chunk_p,
    chunk_q,
    w_blocks_ptr,
    stride_wg,
    stride_wp,
    stride_wq,
    D,
    B: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(W ⊙ U)'s block term between two chunks of lanes, [BLOCK_K (p), BLOCK_K (q)], zero off the block diagonal."""
    lanes_p = chunk_p * BLOCK_K + tl.arange(0, BLOCK_K)
    lanes_q = chunk_q * BLOCK_K + tl.arange(0, BLOCK_K)
    group_p = lanes_p // BLOCK_B
    inner_p = lanes_p % BLOCK_B
    group_q = lanes_q // BLOCK_B
    inner_q = lanes_q % BLOCK_B
    mask = (group_p * B < D)[:, None] & (inner_p < B)[:, None] & (inner_q < B)[None, :]
    mask &= group_p[:, None] == group_q[None, :]
    ptrs = w_blocks_ptr + (group_p * stride_wg + inner_p * stride_wp)[:, None] + (inner_q * stride_wq)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def nothing_of(x, ACC: tl.constexpr):
    """0 where x is finite, else NaN, in ACC: the interpreter would subtract bfloat16's bits."""
    x = x.to(ACC)
    return x - x


@triton.jit
def fold_chunk(
    chunk,
    a_rows,
    stride_ad,
    w_diag_ptr,
    stride_wd,
    w_blocks_ptr,
    stride_wg,
    stride_wp,
    stride_wq,
    D,
    B: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_DIAG: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDE: tl.constexpr,
    CONFINE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One chunk of T(a) = a ⊙ W_diag + [a_1 W_1 | … | a_G W_G], its two terms apart, and of a itself.

    Returns (a, diagonal, block): a in its own dtype, the terms in ACC, [BLOCK_M, BLOCK_K] each. Where a term has no
    weight a stands in its place, and is never looked at. CONFINE keeps a NaN or Inf of a row in its own block of T(a),
    where packed blocks share a product and a zero weight times NaN is NaN: needed only where T(a) itself is the result.
    """
    offs, valid = channels(chunk, D, B, BLOCK_B, BLOCK_K, WIDE)
    a = load_masked(a_rows[:, None] + (offs * stride_ad)[None, :], valid[None, :], EVEN_D)
    diagonal = a
    block = a
    if HAS_DIAG:
        w_diag = load_masked(w_diag_ptr + offs * stride_wd, valid, EVEN_D).to(ACC)
        diagonal = a.to(ACC) * w_diag[None, :]
    if HAS_BLOCKS:
        block = tl.zeros([BLOCK_M, BLOCK_K], ACC)
        if BLOCK_B <= BLOCK_K:
            w = block_weight(chunk, chunk, w_blocks_ptr, stride_wg, stride_wp, stride_wq, D, B, BLOCK_B, BLOCK_K)
            if CONFINE and BLOCK_B < BLOCK_K:
                GROUPS: tl.constexpr = BLOCK_K // BLOCK_B
                not_finite = nothing_of(a, ACC)
                by_group = tl.sum(tl.reshape(not_finite, [BLOCK_M, GROUPS, BLOCK_B]), axis=2)[:, :, None]
                block = tl.reshape(tl.broadcast_to(by_group, [BLOCK_M, GROUPS, BLOCK_B]), [BLOCK_M, BLOCK_K])
                finite = tl.where(not_finite == 0, a, 0.0).to(a.dtype)
                block = dot(nearest(finite, PRECISION), nearest(cast(w, a.dtype), PRECISION), block, PRECISION)
            else:
                block = dot(nearest(a, PRECISION), nearest(cast(w, a.dtype), PRECISION), block, PRECISION)
        else:
            PARTS: tl.constexpr = BLOCK_B // BLOCK_K
            first = chunk // PARTS * PARTS
            for part in range(first, first + PARTS):
                offs_p, valid_p = channels(part, D, B, BLOCK_B, BLOCK_K, WIDE)
                a_p = load_masked(a_rows[:, None] + (offs_p * stride_ad)[None, :], valid_p[None, :], EVEN_D)
                w = block_weight(part, chunk, w_blocks_ptr, stride_wg, stride_wp, stride_wq, D, B, BLOCK_B, BLOCK_K)
                block = dot(nearest(a_p, PRECISION), nearest(cast(w, a.dtype), PRECISION), block, PRECISION)
    return a, diagonal, block


@triton.jit
def folded(a, diagonal, block, HAS_DIAG: tl.constexpr, HAS_BLOCKS: tl.constexpr, ACC: tl.constexpr):
    """The sum of the terms there are, in ACC; with neither weight T is the identity (a was folded before)."""
    if HAS_DIAG and HAS_BLOCKS:
        return diagonal + block
    elif HAS_BLOCKS:
        return block
    elif HAS_DIAG:
        return diagonal
    else:
        return a.to(ACC)


@triton.jit
def inverse_norm(squares):
    """1 / max(‖x‖₂, 1e-12) from the sum of squares; 0 where that overflows, a NaN stays one."""
    norm = tl.sqrt(squares)
    return 1.0 / tl.maximum(norm, NORM_EPS, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def squares_of(x, ACC: tl.constexpr):
    """x² in ACC, NaN where x is infinite: a sum of them is infinite only where it overflows."""
    return x.to(ACC) * x.to(ACC) + nothing_of(x, ACC)


@triton.jit
def scaled(s, scale_a, scale_b):
    """s on the unit spheres: 0, whatever the product became, where a scale is 0, the norm having overflown."""
    return tl.where((scale_a == 0) | (scale_b == 0), scale_a * scale_b, s * scale_a * scale_b)


@triton.jit
def similarity_tile(
    a_rows,
    stride_ad,
    b_rows,
    stride_bd,
    w_diag_ptr,
    stride_wd,
    w_blocks_ptr,
    stride_wg,
    stride_wp,
    stride_wq,
    D,
    chunks,
    B: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_DIAG: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    TERMS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    DRAIN: tl.constexpr = False,
):
    """S between a tile of rows of a and one of b, in one pass over the channels: load, fold, product.

    `a_rows` [BLOCK_M] and `b_rows` [BLOCK_N] point at the rows' first channels. Returns (s, s_diag), [BLOCK_M, BLOCK_N]
    in ACC. With TERMS, s holds the block term and s_diag the diagonal one; without, s is the whole and s_diag repeats
    it. NORMALIZE takes both sides' norms from the tiles the product loads anyway, and scales at the end. DRAIN: see
    `configs.drains`.
    """
    s = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    if TERMS:
        s_diag = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    if NORMALIZE:
        squares_a = tl.zeros([BLOCK_M], ACC)
        squares_b = tl.zeros([BLOCK_N], ACC)
    for chunk in range(0, chunks):
        a, diagonal, block = fold_chunk(
            chunk, a_rows, stride_ad, w_diag_ptr, stride_wd, w_blocks_ptr, stride_wg, stride_wp, stride_wq, D,
            B, BLOCK_B, BLOCK_M, BLOCK_K, HAS_DIAG, HAS_BLOCKS, EVEN_D, WIDE, False, PRECISION, ACC,
        )  # fmt: skip
        offs, valid = channels(chunk, D, B, BLOCK_B, BLOCK_K, WIDE)
        b = load_masked(b_rows[None, :] + (offs * stride_bd)[:, None], valid[:, None], EVEN_D)  # [BLOCK_K, BLOCK_N]
        if NORMALIZE:
            squares_a += tl.sum(squares_of(a, ACC), axis=1)
            squares_b += tl.sum(squares_of(b, ACC), axis=0)
        if TERMS:
            s_diag = dot(nearest(cast(diagonal, b.dtype), PRECISION), b, s_diag, PRECISION)
            s = dot(nearest(cast(block, b.dtype), PRECISION), b, s, PRECISION)
        elif HAS_DIAG or HAS_BLOCKS:
            t = folded(a, diagonal, block, HAS_DIAG, HAS_BLOCKS, ACC)
            s = dot(nearest(cast(t, b.dtype), PRECISION), b, s, PRECISION)
        else:
            # Folded before: straight from shared memory to the tensor cores, with no detour through ACC.
            s = dot(a, b, s, PRECISION)
        if DRAIN:
            # Whoever looks at a sum waits for it. This look costs nothing else: it is gone from the machine code.
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
