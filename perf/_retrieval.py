"""`gssf_triton.topk` and `ranks`, and their peers: all of S, chunks of it, search libraries on folded queries.

A library's index holds the gallery and is built before the clock starts; the queries are folded in every call. Its
memory is not torch's, and is not seen.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _cells import Cell, Shape, grid, unique
from _operation import Contender, Inputs, Operation, Probe, Program
from _pairwise import fold_in_torch
from _tensors import metric_for, normal_for
from torch import Tensor

import gssf_triton

#: Queries that the float64 truth is computed for.
PROBED_QUERIES = 32
#: Gallery items that match a query.
MATCHES = 5
#: Scores of a chunk: what a careful user would take.
CHUNK = 2**24

Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


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


def _program(forward: Callable[[], tuple[Tensor, Tensor]]) -> Program:
    def read(out: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"values": out[0].cpu(), "indices": out[1].cpu()}

    return Program(forward, {}, torch.ones(()), read=read)


def _search(search: Search) -> Callable[[Inputs], Program]:
    """A program that folds the queries and searches with them."""

    def build(inputs: Inputs) -> Program:
        queries, gallery, W_diag, W_blocks = _features(inputs)
        k = int(inputs.tensors["k"])
        return _program(lambda: search(fold_in_torch(queries, W_diag, W_blocks), gallery, k))

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


def _faiss(inputs: Inputs) -> Program:
    import faiss

    queries, gallery, W_diag, W_blocks = _features(inputs)
    index: Any = faiss.IndexFlatIP(gallery.shape[1])
    if gallery.device.type == "cuda":
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gallery.device.index or 0, index)
    else:
        faiss.omp_set_num_threads(torch.get_num_threads())
    index.add(gallery.float().cpu().numpy())
    k = int(inputs.tensors["k"])

    def search() -> tuple[Tensor, Tensor]:
        found = index.search(fold_in_torch(queries, W_diag, W_blocks).float().cpu().numpy(), k)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    return _program(search)


def _cuvs(inputs: Inputs) -> Program:
    from cuvs.neighbors import brute_force

    queries, gallery, W_diag, W_blocks = _features(inputs)
    index = brute_force.build(gallery, metric="inner_product")
    k = int(inputs.tensors["k"])

    def search() -> tuple[Tensor, Tensor]:
        found = brute_force.search(index, fold_in_torch(queries, W_diag, W_blocks), k)
        values, indices = (torch.as_tensor(x, device=queries.device) for x in found)
        return values, indices

    return _program(search)


def _keops(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    from pykeops.torch import LazyTensor

    S = (LazyTensor(queries[:, None].contiguous()) * LazyTensor(gallery[None].contiguous())).sum(-1)
    negated, indices = (-S).Kmin_argKmin(k, dim=1)
    return -negated, indices.long()


def _ours(inputs: Inputs) -> Program:
    k = int(inputs.tensors["k"])
    return _program(lambda: gssf_triton.topk(*_features(inputs), k=k))


def topk_probes(inputs: Inputs, mathematics: str, mode: str) -> Iterator[Probe]:
    """Some queries' best scores, and the scores of the items found."""
    rows, S = _truth(inputs)
    rows, S = rows.cpu(), S.cpu()
    best = torch.topk(S, int(inputs.tensors["k"])).values
    yield Probe("values", lambda values: values[rows], best)
    yield Probe("indices", lambda indices: S.gather(1, indices[rows]), best)


def _installed(*contenders: tuple[str, Contender]) -> tuple[Contender, ...]:
    """Those whose library is there."""
    return tuple(contender for module, contender in contenders if importlib.util.find_spec(module))


def _topk_cells(dtypes: tuple[str, ...], shapes: list[Shape]) -> list[Cell]:
    return grid("topk", unique(shapes), dtypes, modes=("forward",))


def topk_cpu() -> list[Cell]:
    """Lines along N, D and k, and the shape that the issue of a search on a CPU is decided at."""
    base: dict[str, int] = {"M": 1000, "N": 25_000, "D": 256, "B": 32, "k": 10}
    lines = [("N", (6_250, 12_500, 25_000, 50_000)), ("D", (64, 128, 256, 512)), ("k", (1, 10, 100, 1000))]
    shapes = [Shape.of(**base | {axis: value}) for axis, values in lines for value in values]
    return _topk_cells(("fp32",), [*shapes, Shape.of(1000, 100_000, 512, 32, k=10)])


def topk_gpu() -> list[Cell]:
    base: dict[str, int] = {"M": 5000, "N": 100_000, "D": 512, "B": 32, "k": 10}
    lines = [("N", (10_000, 100_000, 1_000_000)), ("D", (256, 512, 1024)), ("k", (1, 10, 100))]
    shapes = [Shape.of(**base | {axis: value}) for axis, values in lines for value in values]
    return _topk_cells(("bf16", "fp32"), shapes)


TOPK = Operation(
    name="topk",
    cells={("retrieval", "cpu"): topk_cpu, ("retrieval", "cuda"): topk_gpu},
    make_inputs=make_inputs,
    contenders=(
        Contender("torch", "torch, product + topk", _search(_matmul_topk), mathematics="gssf_topk"),
        Contender("gssf", "gssf_triton", _ours, mathematics="gssf_topk", ours=True),
        Contender("torch_chunks", "torch, in chunks", _search(_chunked_topk), mathematics="gssf_topk"),
        *_installed(
            ("faiss", Contender("faiss", "FAISS, flat", _faiss, mathematics="gssf_topk")),
            ("cuvs", Contender("cuvs", "cuVS, brute force", _cuvs, mathematics="gssf_topk", gpu_only=True)),
            ("pykeops", Contender("keops", "KeOps", _search(_keops), mathematics="gssf_topk")),
        ),
    ),
    probes=topk_probes,
    yardstick="torch",
    modes=("forward",),
    axes=("N", "D", "k"),
    sizes={"k": 10},
    relative_to="product + topk",
    unit="queries",
    count=lambda shape: shape.M,
)


# ---------------------------------------------------------------- ranks


def _rank_program(forward: Callable[[], Tensor]) -> Program:
    return Program(forward, {}, torch.ones(()), read=lambda out: {"ranks": out})


def _stored_ranks(inputs: Inputs) -> Program:
    """The line everyone writes: S, its matches' best, and what is above it. No match is lost to ties here."""
    queries, gallery, W_diag, W_blocks = _features(inputs)
    query_ids, gallery_ids = _ids(inputs).values()

    def forward() -> Tensor:
        S = fold_in_torch(queries, W_diag, W_blocks) @ gallery.T
        best = S.masked_fill(query_ids[:, None] != gallery_ids, -torch.inf).amax(1, keepdim=True)
        return (best < S).sum(1)

    return _rank_program(forward)


def _chunked_ranks(inputs: Inputs) -> Program:
    queries, gallery, W_diag, W_blocks = _features(inputs)
    query_ids, gallery_ids = _ids(inputs).values()

    def forward() -> Tensor:
        folded = fold_in_torch(queries, W_diag, W_blocks)
        best = folded.new_full((queries.shape[0], 1), -torch.inf)
        for first, S in _chunks(folded, gallery):
            apart = query_ids[:, None] != gallery_ids[first : first + S.shape[1]]
            best = torch.maximum(best, S.masked_fill_(apart, -torch.inf).amax(1, keepdim=True))
        counts = torch.zeros_like(query_ids)
        for _, S in _chunks(folded, gallery):
            counts += (best < S).sum(1)
        return counts

    return _rank_program(forward)


def _our_ranks(inputs: Inputs) -> Program:
    return _rank_program(lambda: gssf_triton.ranks(*_features(inputs), **_ids(inputs)))


def rank_probes(inputs: Inputs, mathematics: str, mode: str) -> Iterator[Probe]:
    """Some queries' ranks: the score that stands at this place in float64 is the best match's."""
    rows, S = _truth(inputs)
    query_ids, gallery_ids = _ids(inputs).values()
    best = S.masked_fill(query_ids[rows, None] != gallery_ids, -torch.inf).amax(1)
    ordered = S.sort(dim=1, descending=True).values
    yield Probe("ranks", lambda ranks: ordered.gather(1, ranks[rows, None])[:, 0], best)


def _rank_cells(dtypes: tuple[str, ...], shapes: list[Shape]) -> list[Cell]:
    return grid("ranks", unique(shapes), dtypes, modes=("forward",))


def ranks_cpu() -> list[Cell]:
    """Lines along N and D, and COCO's 5,000 images and 25,000 captions."""
    shapes = [Shape(1000, N, 256, 32) for N in (3_125, 6_250, 12_500, 25_000)]
    shapes += [Shape(1000, 12_500, D, 32) for D in (64, 128, 256, 512)]
    return _rank_cells(("fp32",), [*shapes, Shape(5000, 25_000, 1024, 32)])


def ranks_gpu() -> list[Cell]:
    shapes = [Shape(5000, N, 1024, 32) for N in (25_000, 100_000, 1_000_000)]
    return _rank_cells(("bf16", "fp32"), [*shapes, *(Shape(5000, 25_000, D, 32) for D in (256, 512, 1024))])


RANKS = Operation(
    name="ranks",
    cells={("retrieval", "cpu"): ranks_cpu, ("retrieval", "cuda"): ranks_gpu},
    make_inputs=make_inputs,
    contenders=(
        Contender("torch", "torch, all of S", _stored_ranks, mathematics="gssf_ranks"),
        Contender("gssf", "gssf_triton", _our_ranks, mathematics="gssf_ranks", ours=True),
        Contender("torch_chunks", "torch, in chunks", _chunked_ranks, mathematics="gssf_ranks"),
    ),
    probes=rank_probes,
    yardstick="torch",
    modes=("forward",),
    axes=("N", "D"),
    relative_to="all of S",
    unit="queries",
    count=lambda shape: shape.M,
)
