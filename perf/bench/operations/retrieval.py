"""`gssf_triton.topk` and `ranks`, and their peers: all of S, chunks of it, search libraries on folded queries.

A library's index holds the gallery and is built before the clock starts; the queries are folded in every call. Its
memory is not torch's, and is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gssf_triton
from bench.cells import FORWARD, Cell, Shape, grid, lines
from bench.operation import Build, Contender, Inputs, Operation, Probe, Program, installed, metric_for, normal_for
from bench.operations.pairwise import fold_in_torch

#: Queries that the float64 truth is computed for.
PROBED_QUERIES = 32
#: Gallery items that match a query.
MATCHES = 5
#: Scores of a chunk: what a careful user would take.
CHUNK = 2**24

#: (folded queries, gallery, k) → (scores, indices).
Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
#: (folded queries, gallery, query ids, gallery ids) → the rank of each query's best match.
Rank = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def make_inputs(cell: Cell, device: torch.device, generator: torch.Generator) -> Inputs:
    """Rows of about unit length, a metric around the identity; MATCHES gallery items in a row match a query."""
    s, normal = cell.shape, normal_for(cell, device, generator)
    tensors = {
        "queries": normal(s.M, s.D, scale=s.D**-0.5),
        "gallery": normal(s.N, s.D, scale=s.D**-0.5),
        **metric_for(cell, normal),
        "query_ids": torch.arange(s.M, device=device) % -(-s.N // MATCHES),
        "gallery_ids": torch.arange(s.N, device=device) // MATCHES,
        "k": torch.tensor(s.sizes.get("k", 0)),
    }
    return Inputs(tensors, upstream=torch.ones(()))


def _features(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(inputs.tensors[name] for name in ("queries", "gallery", "W_diag", "W_blocks"))


def _ids(inputs: Inputs) -> dict[str, Any]:
    return {name: inputs.tensors[name] for name in ("query_ids", "gallery_ids")}


def _truth(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(some queries, their scores in float64)."""
    queries, gallery, W_diag, W_blocks = _features(inputs)
    rows = torch.linspace(0, queries.shape[0] - 1, min(PROBED_QUERIES, queries.shape[0]), device=queries.device).long()
    folded = fold_in_torch(queries[rows].double(), W_diag.double(), W_blocks.double())
    return rows, torch.cat([folded @ part.double().T for part in gallery.split(CHUNK // gallery.shape[1])], dim=1)


def _chunks(queries: Tensor, gallery: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(index of the first item, scores of a chunk of the gallery)."""
    columns = max(1, CHUNK // queries.shape[0])
    for first in range(0, gallery.shape[0], columns):
        yield first, queries @ gallery[first : first + columns].T


# ---------------------------------------------------------------- topk


def _read(out: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"values": out[0].cpu(), "indices": out[1].cpu()}


def _search(prepared: Callable[[Tensor], Search]) -> Build:
    """A program that folds the queries and searches with them in what was prepared of the gallery."""

    def build(inputs: Inputs) -> Program:
        queries, gallery, W_diag, W_blocks = _features(inputs)
        search, k = prepared(gallery), int(inputs.tensors["k"])
        return Program(
            lambda: search(fold_in_torch(queries, W_diag, W_blocks), gallery, k), {}, inputs.upstream, read=_read
        )

    return build


def _matmul_topk(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(queries @ gallery.T, k)
    return values, indices


def _chunked_topk(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = indices = torch.empty((queries.shape[0], 0), device=queries.device)
    for first, S in _chunks(queries, gallery):
        new_values, new_indices = torch.topk(S, min(k, S.shape[1]))
        both = torch.cat((values.to(S.dtype), new_values), dim=1), torch.cat((indices, new_indices + first), dim=1)
        values, order = torch.topk(both[0], min(k, both[0].shape[1]))
        indices = both[1].long().gather(1, order)
    return values, indices


def _faiss(gallery: Tensor) -> Search:
    import faiss

    index: Any = faiss.IndexFlatIP(gallery.shape[1])
    if gallery.device.type == "cuda":
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gallery.device.index or 0, index)
    else:
        faiss.omp_set_num_threads(torch.get_num_threads())
    index.add(gallery.float().cpu().numpy())

    def search(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = index.search(queries.float().cpu().numpy(), k)
        return torch.from_numpy(values), torch.from_numpy(indices)

    return search


def _cuvs(gallery: Tensor) -> Search:
    from cuvs.neighbors import brute_force

    index = brute_force.build(gallery, metric="inner_product")

    def search(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = (torch.as_tensor(x, device=queries.device) for x in brute_force.search(index, queries, k))
        return values, indices

    return search


def _keops(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    from pykeops.torch import LazyTensor

    S = (LazyTensor(queries[:, None].contiguous()) * LazyTensor(gallery[None].contiguous())).sum(-1)
    negated, indices = (-S).Kmin_argKmin(k, dim=1)
    return -negated, indices.long()


def _our_topk(inputs: Inputs) -> Program:
    search = partial(gssf_triton.topk, *_features(inputs), k=int(inputs.tensors["k"]))
    return Program(search, {}, inputs.upstream, read=_read)


def topk_probes(inputs: Inputs, mathematics: str, mode: str) -> Iterator[Probe]:
    """Some queries' best scores, and the scores of the items found."""
    rows, S = _truth(inputs)
    rows, S = rows.cpu(), S.cpu()
    best = torch.topk(S, int(inputs.tensors["k"])).values
    yield Probe("values", lambda values: values[rows], best)
    yield Probe("indices", lambda indices: S.gather(1, indices[rows]), best)


_grid = partial(grid, "topk", modes=[FORWARD])
_SMALL, _LARGE = Shape.of(1000, 25_000, 256, 32, k=10), Shape.of(5000, 100_000, 512, 32, k=10)
#: Lines along N, D and k, and on a CPU the largest search here.
TOPK_CELLS = {
    ("retrieval", "cpu"): [
        *_grid(
            lines(_SMALL, N=(6_250, 12_500, 25_000, 50_000), D=(64, 128, 256, 512), k=(1, 10, 100, 1000)), "fp32"
        ),
        *_grid([Shape.of(1000, 100_000, 512, 32, k=10)], "fp32"),
    ],
    ("retrieval", "cuda"): _grid(
        lines(_LARGE, N=(10_000, 100_000, 1_000_000), D=(256, 512, 1024), k=(1, 10, 100)), "bf16", "fp32"
    ),
    ("goals", "cuda"): _grid(
        [Shape.of(64, 1_000_000, 512, 32, k=10), Shape.of(10_000, 100_000, 512, 32, k=10)], "bf16"
    ),
    ("goals", "cpu"): _grid([Shape.of(40, 40, 64, 32, k=10)], "fp32", compiled=[]),
}  # fmt: skip
TOPK = Operation(
    name="topk",
    cells=TOPK_CELLS,
    make_inputs=make_inputs,
    contenders=(
        Contender("torch", "torch, product + topk", _search(lambda _: _matmul_topk), "gssf_topk"),
        Contender("gssf", "gssf_triton", _our_topk, "gssf_topk", ours=True),
        Contender("torch_chunks", "torch, in chunks", _search(lambda _: _chunked_topk), "gssf_topk"),
        *installed(
            ("faiss", Contender("faiss", "FAISS, flat", _search(_faiss), "gssf_topk")),
            ("cuvs", Contender("cuvs", "cuVS, brute force", _search(_cuvs), "gssf_topk", gpu_only=True)),
            ("pykeops", Contender("keops", "KeOps", _search(lambda _: _keops), "gssf_topk")),
        ),
    ),
    probes=topk_probes,
    yardstick="torch",
    modes=(FORWARD,),
    axes=("N", "D", "k"),
    sizes={"k": 10},
    relative_to="product + topk",
    unit="queries",
    count=lambda shape: shape.M,
)


# ---------------------------------------------------------------- ranks


def _rank_program(forward: Callable[[], Tensor], inputs: Inputs) -> Program:
    return Program(forward, {}, inputs.upstream, read=lambda out: {"ranks": out})


def _ranked(rank: Rank) -> Build:
    """A program that folds the queries and ranks with them."""

    def build(inputs: Inputs) -> Program:
        queries, gallery, W_diag, W_blocks = _features(inputs)
        ids = _ids(inputs).values()
        return _rank_program(lambda: rank(fold_in_torch(queries, W_diag, W_blocks), gallery, *ids), inputs)

    return build


def _stored_ranks(queries: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    """The line everyone writes: S, its matches' best, and what is above it. No match is lost to ties here."""
    S = queries @ gallery.T
    best = S.masked_fill(query_ids[:, None] != gallery_ids, -torch.inf).amax(1, keepdim=True)
    return (best < S).sum(1)


def _chunked_ranks(queries: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    best = queries.new_full((queries.shape[0], 1), -torch.inf)
    for first, S in _chunks(queries, gallery):
        apart = query_ids[:, None] != gallery_ids[first : first + S.shape[1]]
        best = torch.maximum(best, S.masked_fill_(apart, -torch.inf).amax(1, keepdim=True))
    counts = torch.zeros_like(query_ids)
    for _, S in _chunks(queries, gallery):
        counts += (best < S).sum(1)
    return counts


def _our_ranks(inputs: Inputs) -> Program:
    return _rank_program(partial(gssf_triton.ranks, *_features(inputs), **_ids(inputs)), inputs)


def rank_probes(inputs: Inputs, mathematics: str, mode: str) -> Iterator[Probe]:
    """Some queries' ranks: the score that stands at this place in float64 is the best match's."""
    rows, S = _truth(inputs)
    query_ids, gallery_ids = _ids(inputs).values()
    best = S.masked_fill(query_ids[rows, None] != gallery_ids, -torch.inf).amax(1)
    ordered = S.sort(dim=1, descending=True).values
    yield Probe("ranks", lambda ranks: ordered.gather(1, ranks[rows, None])[:, 0], best)


_grid = partial(grid, "ranks", modes=[FORWARD])
#: Lines along N and D, and COCO's 5,000 images and 25,000 captions.
RANK_CELLS = {
    ("retrieval", "cpu"): [
        *_grid(lines(Shape(1000, 12_500, 256, 32), N=(3_125, 6_250, 12_500, 25_000), D=(64, 128, 256, 512)), "fp32"),
        *_grid([Shape(5000, 25_000, 1024, 32)], "fp32"),
    ],
    ("retrieval", "cuda"): _grid(
        lines(Shape(5000, 25_000, 1024, 32), N=(25_000, 100_000, 1_000_000), D=(256, 512, 1024)), "bf16", "fp32"
    ),
}
RANKS = Operation(
    name="ranks",
    cells=RANK_CELLS,
    make_inputs=make_inputs,
    contenders=(
        Contender("torch", "torch, all of S", _ranked(_stored_ranks), "gssf_ranks"),
        Contender("gssf", "gssf_triton", _our_ranks, "gssf_ranks", ours=True),
        Contender("torch_chunks", "torch, in chunks", _ranked(_chunked_ranks), "gssf_ranks"),
    ),
    probes=rank_probes,
    yardstick="torch",
    modes=(FORWARD,),
    axes=("N", "D"),
    relative_to="all of S",
    unit="queries",
    count=lambda shape: shape.M,
)
