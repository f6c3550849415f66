"""Retrieval without the score matrix: the best k gallery items of every query, and the rank of its first match.

One call's way: checks → the metric folded into the queries (`scoring`) → chunks of scores (`scan`) or kernels
(`gssf_triton.kernels.topk`, `gssf_triton.kernels.rank`) → shards merged (`sharding`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton import checks, options
from gssf_triton.backend import resolve_backend
from gssf_triton.kernels.retrieval_configs import LARGEST_KERNEL_K
from gssf_triton.once import Plainly
from gssf_triton.progress import counting
from gssf_triton.retrieval import checks as row_checks
from gssf_triton.retrieval import scan, sharding
from gssf_triton.retrieval.scoring import Exclusions, Gallery, Scores

_NAMES = ("queries", "gallery")


def check_call(
    queries: Tensor,
    gallery: Tensor | np.ndarray,
    W_diag: Tensor | None,
    W_blocks: Tensor | None,
    arrays: bool = True,
) -> tuple[int, int]:
    """(Q, N) of features that fit; a gallery in an array, where `arrays` are taken, may lie elsewhere."""
    if arrays and isinstance(gallery, np.ndarray):
        checks.check_features("queries", queries)
        row_checks.check_matrix("queries", queries, "(Q, D)")
        row_checks.check_gallery_array(queries, gallery)
    else:
        checks.check_pair(queries, gallery, _NAMES)
        assert isinstance(gallery, Tensor)
        row_checks.check_matrix("queries", queries, "(Q, D)")
        row_checks.check_matrix("gallery", gallery, "(N, D)")
        checks.check_same_dtype(queries, gallery, _NAMES)
    checks.check_weights("queries", queries, W_diag, W_blocks)
    return queries.shape[0], gallery.shape[0]


def make_exclusions(
    queries: Tensor,
    items: int,
    exclude: Tensor | None,
    mask: Tensor | None,
    labels: tuple[Tensor, Tensor] | None = None,
    cameras: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Exclusions:
    """What is left out, checked; `labels` and `cameras` are (queries', gallery's)."""
    if exclude is not None:
        exclude = row_checks.check_labels("exclude", exclude, queries.shape[0], "queries", queries)
    if mask is not None:
        mask = row_checks.check_pair_mask("mask", mask, (queries.shape[0], items), queries)
    if (cameras[0] is None) != (cameras[1] is None):
        missing = "query_cams" if cameras[0] is None else "gallery_cams"
        raise ValueError(f"query_cams and gallery_cams must be given together, got None for {missing}")
    sides: dict[str, Tensor] = {}
    for kind, pair in (("ids", labels), ("cams", cameras)):
        for name, count, values in zip(_NAMES, (queries.shape[0], items), pair or (None, None), strict=True):
            if values is not None or (kind == "ids" and labels is not None):
                side = f"{'query' if name == 'queries' else name}_{kind}"
                sides[side] = row_checks.check_labels(side, values, count, name, queries)
    return Exclusions(exclude, mask, **sides)


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
    Q, items = check_call(queries, gallery, W_diag, W_blocks)
    exclusions = make_exclusions(queries, items, exclude, mask)
    row_checks.check_k(k, items if group is None else None)
    options.check_flags(normalize=normalize, progress=progress)
    options.check_group(group)
    backend = resolve_backend(backend, queries, W_blocks)
    offset, total = sharding.place(
        queries, items, W_diag, W_blocks, exclusions, group, call="topk", k=k, normalize=normalize, backend=backend
    )
    row_checks.check_k(k, total)

    def search(scores: Scores, shard: Gallery, exclusions: Exclusions) -> tuple[Tensor, ...]:
        with counting(progress, "topk", Q * items, "pair") as scores.tick:
            lists = _topk(scores, shard, exclusions, min(k, items))
        values, indices = sharding.merge_lists(lists, k, group).result()
        return scores.values(values), indices

    values, indices = _on_plain_tensors(
        search, queries, gallery, W_diag, W_blocks, exclusions, offset, normalize=normalize, backend=backend
    )
    return values, indices


def _on_plain_tensors(
    search: Callable[[Scores, Gallery, Exclusions], tuple[Tensor, ...]],
    queries: Tensor,
    gallery: Tensor | np.ndarray,
    W_diag: Tensor | None,
    W_blocks: Tensor | None,
    exclusions: Exclusions,
    offset: int,
    **how: Any,
) -> tuple[Tensor, ...]:
    """What `search` finds; under torch.func.vmap it is called for every item of the batch."""
    array = None if isinstance(gallery, Tensor) else gallery

    def call(
        queries: Tensor, rows: Tensor | None, W_diag: Tensor | None, W_blocks: Tensor | None, *left_out: Tensor | None
    ) -> tuple[Tensor, ...]:
        source = array if rows is None else rows
        assert source is not None
        scores = Scores(queries, source.shape[0], W_diag, W_blocks, **how)
        return search(scores, Gallery(source, queries.device, offset), Exclusions(*left_out))

    left_out = (getattr(exclusions, field.name) for field in fields(exclusions))
    return Plainly(call)(queries, gallery if isinstance(gallery, Tensor) else None, W_diag, W_blocks, *left_out)


def _topk(scores: Scores, gallery: Gallery, exclusions: Exclusions, k: int) -> scan.Lists:
    Q = scores.queries.shape[0]
    if k == 0 or Q == 0:
        return scan.Lists.empty(Q, k, scores.dtype, scores.queries.device)
    if scores.backend == "triton" and k <= LARGEST_KERNEL_K and scores.dtype == torch.float32:
        from gssf_triton.kernels import topk as kernels

        return kernels.topk(scores, gallery, exclusions, k)
    return scan.topk(scores, gallery, exclusions, k)


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
    Q, items = check_call(queries, gallery, W_diag, W_blocks)
    exclusions = make_exclusions(queries, items, exclude, mask, (query_ids, gallery_ids), (query_cams, gallery_cams))
    options.check_flags(normalize=normalize, progress=progress)
    options.check_group(group)
    backend = resolve_backend(backend, queries, W_blocks)
    offset, _ = sharding.place(
        queries, items, W_diag, W_blocks, exclusions, group, call="ranks", normalize=normalize, backend=backend
    )

    def search(scores: Scores, shard: Gallery, exclusions: Exclusions) -> tuple[Tensor, ...]:
        source: ModuleType = scan
        if backend == "triton" and scores.dtype == torch.float32:
            from gssf_triton.kernels import rank as rank_kernels

            source = rank_kernels
        # Two passes.
        with counting(progress, "ranks", 2 * Q * items, "pair") as scores.tick:
            keys, indices = source.best_match(scores, shard, exclusions)
            keys, indices = sharding.merge_best(keys, indices, group)
            counts = sharding.add_counts(source.count_before(scores, shard, exclusions, keys, indices), group)
        return (counts.masked_fill_(indices < 0, -1),)

    (found,) = _on_plain_tensors(
        search, queries, gallery, W_diag, W_blocks, exclusions, offset, normalize=normalize, backend=backend
    )
    return found
