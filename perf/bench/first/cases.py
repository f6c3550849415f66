"""What first_run.py times: the headline kernels, ten tiles of three of them, and whole calls, each beside a peer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gssf_triton
from bench.cells import BOTH, FORWARD, Cell, Shape
from bench.operation import Program
from bench.registry import OPERATIONS
from bench.timing import BRIEF, Effort, clock_for, interleave
from gssf_triton import kernels
from gssf_triton.autotune import workloads
from gssf_triton.autotune.measure import Call, Sample
from gssf_triton.autotune.space import Key
from gssf_triton.kernels.choice import choose, force_plan, use
from gssf_triton.kernels.configs import PairwiseConfig
from gssf_triton.kernels.pairwise import pairwise
from gssf_triton.kernels.stream_values import Operands
from gssf_triton.metric import IDENTITY
from gssf_triton.streaming.epilogues import EPILOGUES
from gssf_triton.streaming.triton import add_product

#: A chunk of S as the losses' loop has it, and a small one for the interpreter.
CHUNK, SMALL_CHUNK = (4096, 16384), (64, 96)
#: Of a whole call on small inputs.
SMALL = Shape(40, 40, 64, 32)
#: The library's product that others are compared with is no larger than this: rows, columns.
LARGEST_PRODUCT = 36_000


@dataclass(frozen=True)
class Bench:
    """One thing to time.

    Attributes:
        ours: The call.
        flops: Of its products.
        bytes: That it must move, where memory bounds it.
        library: The library's product of the same shape, or the peer.
        expected: What `ours` gives, as near as torch computes it; None where the smoke test alone holds it.
    """

    ours: Call
    flops: float = 0.0
    bytes: float = 0.0
    library: Call | None = None
    expected: Call | None = None


@dataclass(frozen=True)
class Place:
    """Where a bench runs, and whether on inputs as small as the interpreter's."""

    device: torch.device
    small: bool

    def size(self, full: int, small: int) -> int:
        return small if self.small else full

    def samples(self, calls: dict[str, Call], effort: Effort) -> dict[str, list[Sample]]:
        """Timed in turn."""
        effort = BRIEF if self.small else effort
        return interleave(calls, clock_for(self.device, effort), effort)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(dtype)


def refusal(error: RuntimeError) -> str:
    """Why a kernel is left to torch here by design.

    Raises:
        RuntimeError: `error`, which has another cause.
    """
    if " is not launched: " not in str(error):
        raise error
    return str(error)


def _metric(place: Place, D: int, B: int) -> tuple[Tensor, Tensor]:
    return 1 + 0.3 * place.normal(D, dtype=torch.float32), place.normal(D // B, B, B, dtype=torch.float32) / B**0.5


def _product(plan: str | None, place: Place) -> Bench:
    """S at 8192² × 1024: our own product (no plan), or one of the plans of `pairwise_sim`."""
    M, D, B = place.size(8192, 48), place.size(1024, 64), 32
    a, b = (place.normal(M, D, scale=D**-0.5) for _ in "ab")
    library = partial(torch.mm, a, b.T)
    if plan is None:
        out = torch.empty(1, M, M, device=place.device, dtype=a.dtype)
        ours = partial(pairwise, a[None], b[None], IDENTITY, False, out)
        return Bench(ours, 2.0 * M * M * D, library=library, expected=lambda: library()[None])
    W_diag, W_blocks = _metric(place, D, B)

    def run() -> Tensor:
        with force_plan(plan):
            return gssf_triton.pairwise_sim(a, b, W_diag, W_blocks, backend="triton")

    def expected() -> Tensor:
        return gssf_triton.pairwise_sim(a, b, W_diag, W_blocks, backend="torch")

    return Bench(run, 2.0 * M * M * D, library=library, expected=expected)


def _chunk_operands(place: Place, D: int) -> Operands:
    """One chunk of InfoNCE's backward pass: similarities of about 1; beside them (lse, weight, smoothing, match)."""
    (M, N), D = SMALL_CHUNK if place.small else CHUNK, place.size(D, 64)
    t, y = place.normal(M, D, dtype=torch.float16, scale=D**-0.5), place.normal(N, D, dtype=torch.float16)
    rows, columns = (torch.zeros(4, length, device=place.device) for length in (M, N))
    for side, others in ((rows, N), (columns, M)):
        side[0], side[1] = math.log(others) + 0.5, 0.5
    return Operands(t, y, torch.ones(2, device=place.device), rows, columns)


def _stream(epilogue: str, slope: bool, D: int, place: Place) -> Bench:
    x = _chunk_operands(place, D)
    (M, D), N = x.t.shape, x.y.shape[0]

    def run() -> Any:
        streamed = kernels.stream.Pass(x, EPILOGUES[epilogue], (M, N) if slope else None)
        [part] = streamed.parts()
        return part.slope if slope else streamed.kept().rows

    def expected() -> Tensor:
        """exp(s − lse of the row) and of the column, weighted; matches without their own part."""
        assert x.rows is not None and x.columns is not None
        s = x.t.float() @ x.y.float().T
        wanted = 0.5 * ((s - x.rows[0, :, None]).exp() + (s - x.columns[0]).exp())
        wanted.fill_diagonal_(0)
        return wanted

    return Bench(run, 2.0 * M * N * D, library=partial(torch.mm, x.t, x.y.T), expected=expected if slope else None)


def _add_product(transposed: bool, place: Place) -> Bench:
    """A slope's product with either side, into float32 sums."""
    operands = _chunk_operands(place, 1024)
    (M, D), N = operands.t.shape, operands.y.shape[0]
    slope = place.normal(M, N, dtype=torch.float16)
    p, x = (slope.mT, operands.t) if transposed else (slope, operands.y)
    out = torch.zeros(p.shape[0], D, device=place.device)
    run = partial(add_product, out, p, x)
    return Bench(run, 2.0 * M * N * D, library=partial(torch.mm, p, x))


def _rows(kernel: str, N: int, place: Place) -> Bench:
    """The fold, and the gradient kernel with (N > 0) or without its product."""
    M, D, B = place.size(32_768, 40), place.size(1024, 64), 32
    N = place.size(N, min(N, 40))
    dtype = torch.bfloat16
    config = choose(kernel, place.device, dtype, M, N, D, B, tf32=True)
    call = workloads.build(Key(kernel, "bf16", D, B, M, N), place.device)(config)
    moved = 2.0 * M * D * (2 if kernel == "fold" else 3) + 2.0 * M * N
    flops = 2.0 * M * D * (B + 1) * (1 if kernel == "fold" else 2) + 2.0 * M * N * D
    x = place.normal(M, D)
    return Bench(call, flops, moved, library=x.clone if kernel == "fold" else None)


def _search(function: str, queries: int, items: int, D: int, place: Place) -> Bench:
    Q, N, D = place.size(queries, 20), place.size(items, 150), place.size(D, 64)
    q, g = place.normal(Q, D), place.normal(N, D)
    W_diag, W_blocks = _metric(place, D, 32)
    run: Call
    if function == "topk":
        run = partial(gssf_triton.topk, q, g, W_diag, W_blocks, k=10, backend="triton")
    else:
        ids = [torch.arange(length, device=place.device) % 1000 for length in (Q, N)]
        run = partial(gssf_triton.ranks, q, g, W_diag, W_blocks, query_ids=ids[0], gallery_ids=ids[1], backend="triton")
    library = partial(torch.mm, q, g[:LARGEST_PRODUCT].T)
    passes = 1 if function == "topk" else 2
    return Bench(run, passes * 2.0 * Q * N * D, passes * 2.0 * N * D, library=library if N <= LARGEST_PRODUCT else None)


def _pairs(function: str, items: int, D: int, place: Place) -> Bench:
    n, D, R, L = place.size(items, 3), place.size(D, 64), place.size(36, 5), place.size(32, 4)
    regions, words = place.normal(n, R, D, scale=D**-0.5), place.normal(n, L, D, scale=D**-0.5)
    W_diag, W_blocks = _metric(place, D, 32)
    run = partial(getattr(gssf_triton, function), regions, words, W_diag, W_blocks, backend="triton")
    library = partial(torch.mm, regions.flatten(0, 1), words.flatten(0, 1).T)
    return Bench(run, 2.0 * n * n * R * L * D, library=library)


#: Headline kernels, in groups that share a process.
HEADLINE: dict[str, dict[str, Callable[[Place], Bench]]] = {
    "products": {
        "own product, 8192² × 1024": partial(_product, None),
        "one pass, 8192² × 1024, B 32": partial(_product, "one_pass"),
        "fold + library, 8192² × 1024, B 32": partial(_product, "fold_product"),
    },
    "losses": {
        **{f"stream forward, 4096 × 16384 × {D}": partial(_stream, "softmax_both", False, D) for D in (1024, 512)},
        **{f"stream slope, 4096 × 16384 × {D}": partial(_stream, "softmax_slope_both", True, D) for D in (1024, 512)},
        "add_product, slope @ y": partial(_add_product, False),
        "add_product, slope.T @ t": partial(_add_product, True),
    },
    "rows": {
        "fold, 32768 × 1024, B 32": partial(_rows, "fold", 0),
        "gradient of the fold, 32768 × 1024, B 32": partial(_rows, "gradient", 0),
        "gradient with its product, N 1024": partial(_rows, "gradient", 1024),
    },
    "searches": {
        "topk, 10,000 × 36,000 × 512, k 10": partial(_search, "topk", 10_000, 36_000, 512),
        "topk, 64 × 1,000,000 × 512, k 10": partial(_search, "topk", 64, 1_000_000, 512),
        "ranks, 10,000 × 36,000 × 512": partial(_search, "ranks", 10_000, 36_000, 512),
        "late interaction, 1,000 × 36 × 32 × 1024": partial(_pairs, "late_interaction", 1000, 1024),
        "late interaction, 1,000 × 36 × 32 × 128": partial(_pairs, "late_interaction", 1000, 128),
        "cross attention, 300 × 36 × 32 × 1024": partial(_pairs, "cross_attention_sim", 300, 1024),
    },
}


def _tiles(*rows: tuple[int, int, int, int, int]) -> tuple[PairwiseConfig, ...]:
    return tuple(PairwiseConfig(*row) for row in rows)


#: BLOCK_M, BLOCK_N, BLOCK_K, warps, stages: of wide instructions, of two programs a processor, deep and shallow.
TILES: dict[str, tuple[PairwiseConfig, ...]] = {
    "product": _tiles(
        (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 4, 4),
        (128, 128, 32, 8, 4), (128, 64, 64, 4, 4), (64, 256, 64, 4, 3), (64, 128, 64, 4, 4), (128, 128, 128, 8, 2),
    ),
    "stream": _tiles(
        (128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 2), (128, 256, 64, 8, 3), (64, 128, 64, 4, 3),
        (64, 64, 64, 4, 3), (128, 64, 64, 4, 3), (64, 128, 64, 8, 3), (128, 128, 32, 8, 4), (64, 256, 64, 8, 3),
    ),
    "slope": _tiles(
        (128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (64, 128, 64, 8, 3), (64, 128, 64, 4, 3),
        (64, 64, 64, 4, 3), (64, 64, 64, 8, 3), (128, 32, 64, 4, 4), (128, 64, 32, 8, 4), (128, 128, 64, 8, 2),
    ),
}  # fmt: skip

#: Of each kernel with tiles: the kernel that the look-up knows it by, and what is run.
_TILED: dict[str, tuple[str, Callable[[Place], Bench]]] = {
    "product": ("product", partial(_product, None)),
    "stream": ("stream", partial(_stream, "softmax_both", False, 1024)),
    "slope": ("stream", partial(_stream, "softmax_slope_both", True, 1024)),
}


def tile_name(kernel: str, config: PairwiseConfig) -> str:
    """A tile of a kernel in a few words."""
    tile = f"{config.BLOCK_M}×{config.BLOCK_N}×{config.BLOCK_K}"
    return f"{kernel}, {tile}, {config.num_warps} warps, {config.num_stages} stages"


def tiled(kernel: str, config: PairwiseConfig, place: Place) -> Bench:
    """A kernel in one of its tiles."""
    name, build = _TILED[kernel]
    bench = build(place)

    def forced() -> Any:
        with use(**{name: config}):
            return bench.ours()

    return replace(bench, ours=forced)


class Whole(NamedTuple):
    """A whole call of a registered operation, beside others where they fit the memory."""

    cell: Cell
    peers: tuple[str, ...]

    def program(self, place: Place, contender: str) -> Program:
        """A contender, set up on the numbers that all of them have."""
        operation = OPERATIONS[self.cell.operation]
        cell = replace(self.cell, shape=operation.shape(SMALL if place.small else self.cell.shape))
        inputs = operation.make_inputs(cell, place.device, torch.Generator(device=place.device).manual_seed(0))
        return next(c for c in operation.contenders if c.name == contender).build(inputs)


def _whole(operation: str, N: int, D: int, *peers: str, mode: str = BOTH) -> Whole:
    return Whole(Cell(operation, mode, Shape(N, N, D, 32), "bf16"), peers)


#: Left out on small inputs: compiling takes as long there.
COMPILED = "info_nce, 32,768 × 1024, beside torch.compile"
#: Whole calls, each in a process of its own; what a peer stores of S at 65,536 pairs does not fit an H100. The compiled
#: peer, which takes longest to set up, comes last.
WHOLE: dict[str, Whole] = {
    "pairwise_sim, 8192² × 1024, forward": _whole("pairwise_sim", 8192, 1024, "cosine", "torch", mode=FORWARD),
    "pairwise_sim, 8192² × 1024, both passes": _whole("pairwise_sim", 8192, 1024, "cosine", "torch"),
    "info_nce, 32,768 × 1024": _whole("info_nce", 32_768, 1024, "torch"),
    "info_nce, 32,768 × 512": _whole("info_nce", 32_768, 512, "torch"),
    "sigmoid_loss, 65,536 × 768": _whole("sigmoid_loss", 65_536, 768),
    "triplet_loss, 32,768 × 1024": _whole("triplet_loss", 32_768, 1024, "torch"),
    COMPILED: _whole("info_nce", 32_768, 1024, "torch_compile"),
}
