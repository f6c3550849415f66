"""Retrieval without the score matrix: the best k gallery items of every query, and the rank of its first match.

One call's way: checked once (`query`) → the metric folded into the queries (`scoring`) → passes over the gallery, in
chunks of scores (`scan`) or by kernels (`triton`) → shards merged (`sharding`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton import checks
from gssf_triton.backend import resolve_backend
from gssf_triton.progress import counting
from gssf_triton.retrieval.query import Query, checked
from gssf_triton.retrieval.scan import Search
from gssf_triton.retrieval.sharding import merge_best, merge_lists, place
from gssf_triton.retrieval.triton import TritonSearch

SEARCHES: dict[str, type[Search]] = {"torch": Search, "triton": TritonSearch}


@torch.no_grad()
def topk(
    queries: Tensor,
    gallery: Tensor | np.ndarray,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    k: int,
    normalize: bool = False,
    exclude: Tensor | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    progress: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k gallery items most similar to each query: exact, equal scores by the lower index.

    Memory grows with Q·k + N. The metric is folded into the queries, the gallery is never copied. NaN ranks above
    every number, as in `torch.topk`. Not differentiable: the values are detached.

    Args:
        queries: (Q, D), float16, bfloat16, float32 or float64; any strides.
        gallery: (N, D), of the queries' dtype and device; or a NumPy array, memory-mapped too, which may be larger
            than the memory and is read once, block by block (on a GPU from pinned memory, while it computes).
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D, or None.
        k: Items a query, at most N.
        normalize: Put both sides on the unit sphere first.
        exclude: (Q,) integers: the gallery index of an item that its query may not find (itself), −1 for none.
        mask: (Q, N) bool or integers, True or not 0 where an item may be found.
        group: The `torch.distributed` processes that each hold a shard of the gallery. All make the same call but for
            the shard and its `mask` (with one on all of them or none); indices (of `exclude` too) count through the
            shards in order of rank.
        progress: Show a bar (needs tqdm).
        backend: As in `pairwise_sim`.

    Returns:
        (values, indices), each (Q, k), best first. Values are float32 (float64 for float64 features), the scores they
        were ranked by; indices are int64. Where fewer than k items may be found, −inf and −1 fill up.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, dtypes or devices that do not agree, no weight, or k beyond the gallery.
        ImportError: `progress=True` without tqdm.
        RuntimeError: `backend="triton"` where Triton cannot run.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch, gssf_triton
        >>> queries, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 5.0], [3.0, 0.0], [1.0, 0.0]])
        >>> gssf_triton.topk(queries, gallery, torch.tensor([2.0, 1.0]), k=2)
        (tensor([[6., 2.]]), tensor([[1, 0]]))
        >>> gssf_triton.topk(queries, gallery, torch.tensor([2.0, 1.0]), k=2, exclude=torch.tensor([1]))
        (tensor([[2., 2.]]), tensor([[0, 2]]))
    """
    query = checked(Query(queries, gallery, W_diag, W_blocks, normalize, backend, exclude=exclude, mask=mask))
    Q, items = query.shape
    checks.check_k(k, items if group is None else None)
    checks.check_flags(progress=progress)
    checks.check_group(group)
    backend = resolve_backend(backend, queries, W_blocks)
    offset = 0
    if group is not None:
        offset, total = place(query, group, call="topk", k=k, normalize=normalize, backend=backend)
        checks.check_k(k, total)

    def search(query: Query) -> tuple[Tensor, ...]:
        found = SEARCHES[backend](query)
        with counting(progress, "topk", Q * items, "pair") as found.tick:
            lists = found.best_items(min(k, items))
        values, indices = (lists if group is None else merge_lists(lists, k, group)).result()
        return found.values(values), indices

    values, indices = replace(query, backend=backend, offset=offset).on_plain_tensors(search)
    return values, indices


@torch.no_grad()
def ranks(
    queries: Tensor,
    gallery: Tensor | np.ndarray,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    query_ids: Tensor,
    gallery_ids: Tensor,
    normalize: bool = False,
    exclude: Tensor | None = None,
    query_cams: Tensor | None = None,
    gallery_cams: Tensor | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    progress: bool = False,
    backend: str = "auto",
) -> Tensor:
    """How many gallery items come before each query's first match, in `topk`'s order: no sort, no score matrix.

    Two passes over the same scores, bit for bit: one for each query's best match (highest score, lowest index), one
    that counts what comes before it. Not differentiable.

    Args:
        queries: (Q, D), as in `topk`.
        gallery: (N, D), a tensor or a NumPy array, as in `topk`.
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D, or None.
        query_ids: (Q,) integers. An item whose id equals the query's is a match.
        gallery_ids: (N,) integers.
        normalize: Put both sides on the unit sphere first.
        exclude: (Q,) integers: the gallery index of an item that is left out for its query (itself), −1 for none.
        query_cams: (Q,) integers; with `gallery_cams`, items of the query's id and camera are left out.
        gallery_cams: (N,) integers.
        mask: (Q, N) bool or integers, True or not 0 where an item is ranked at all.
        group: Processes that each hold a shard of the gallery, as in `topk`; `gallery_ids`, `gallery_cams` and `mask`
            are the shard's, given on all of them or none.
        progress: Show a bar (needs tqdm).
        backend: As in `pairwise_sim`.

    Returns:
        (Q,) int64: 0 where a match comes first, −1 where the query has none.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, dtypes or devices that do not agree, or no weight.
        ImportError: `progress=True` without tqdm.
        RuntimeError: `backend="triton"` where Triton cannot run.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch, gssf_triton
        >>> queries, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 5.0], [3.0, 0.0], [2.0, 0.0]])
        >>> ids = {"query_ids": torch.tensor([7]), "gallery_ids": torch.tensor([7, 4, 7])}
        >>> gssf_triton.ranks(queries, gallery, torch.ones(2), **ids)
        tensor([1])
    """
    query = checked(
        Query(
            queries, gallery, W_diag, W_blocks, normalize, backend, exclude=exclude, mask=mask, query_ids=query_ids,
            gallery_ids=gallery_ids, query_cams=query_cams, gallery_cams=gallery_cams,
        ),
        "query_ids", "gallery_ids",
    )  # fmt: skip
    Q, items = query.shape
    checks.check_flags(progress=progress)
    checks.check_group(group)
    backend = resolve_backend(backend, queries, W_blocks)
    offset = 0
    if group is not None:
        offset, _ = place(query, group, call="ranks", normalize=normalize, backend=backend)

    def search(query: Query) -> tuple[Tensor, ...]:
        found = SEARCHES[backend](query)
        # Two passes.
        with counting(progress, "ranks", 2 * Q * items, "pair") as found.tick:
            keys, indices = found.best_match()
            if group is not None:
                keys, indices = merge_best(keys, indices, group)
            counts = found.count_before(keys, indices)
        if group is not None:
            dist.all_reduce(counts, group=group)
        return (counts.masked_fill_(indices < 0, -1),)

    (counts,) = replace(query, backend=backend, offset=offset).on_plain_tensors(search)
    return counts
