"""GSSF served by FAISS: the metric is folded into the queries, the index holds the gallery unchanged.

s(x, y) = ⟨T(x), y⟩, so any inner-product index works, and new weights need no re-indexing.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gssf_triton import checks
from gssf_triton.integrations.arrays import Features, folded_queries, gallery_rows
from gssf_triton.optional import require
from gssf_triton.retrieval.finite import bad_rows

#: Results asked for at a time, 12 bytes each, for queries with more ties than k.
MOST_RESULTS = 1 << 24


def build_index(gallery: Features, factory: str = "Flat", *, normalize: bool = False) -> Any:
    """An inner-product index of the gallery. It does not depend on the weights.

    Args:
        gallery: (N, D), a tensor or an array (a memory-mapped one too).
        factory: FAISS's description of the index: "Flat" is exact, "IVF256,Flat" and "HNSW32" are not; see
            `faiss.index_factory`. The index is trained on the gallery where it needs training.
        normalize: Put the gallery on the unit sphere, for a metric with `normalize=True`.

    Returns:
        A `faiss.Index`; its own parameters (`nprobe`, `hnsw.efSearch`) are the caller's to set.

    Raises:
        ModuleNotFoundError: FAISS is not installed (the extra `gssf_triton[faiss]`).
        TypeError: neither a tensor nor an array.
        ValueError: a gallery of another form, or with NaN or infinity in it where the index is trained, or a `factory`
            that FAISS does not know.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266); Johnson et al., FAISS, 2019.

    Example:
        >>> import torch
        >>> from gssf_triton.integrations.faiss import build_index, search
        >>> gallery = torch.eye(4)
        >>> index = build_index(gallery)
        >>> search(index, torch.ones(1, 4), torch.tensor([1.0, 4.0, 2.0, 3.0]), k=2)
        (tensor([[4., 3.]]), tensor([[1, 3]]))
        >>> search(index, torch.ones(1, 4), torch.tensor([4.0, 1.0, 2.0, 3.0]), k=1)[1]  # other weights, same index
        tensor([[0]])
    """
    faiss = require("faiss", "faiss")
    checks.check_kind("factory", factory, str, "a str")
    rows = gallery_rows(gallery, normalize=normalize)
    try:
        index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"factory must be an index that FAISS knows, got {factory!r}: {error}") from None
    bad = bad_rows("gallery", rows)
    if not index.is_trained:
        if bad is not None:
            raise ValueError(f"gallery must be finite, for FAISS to train {factory!r} on it: {bad}")
        index.train(rows)
    if bad is not None:
        warnings.warn(f"{bad}: FAISS finds none of them", stacklevel=2)
    index.add(rows)
    return index


def search(
    index: Any,
    queries: Features,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    k: int,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k best gallery items of each query under the metric, as `gssf_triton.topk` returns them.

    A flat index gives `topk`'s answer, ties by the lower index included. FAISS breaks ties in any order, so for queries
    with more results of the k-th score than were fetched, twice as many are fetched, and sorted. Only NaN differs:
    FAISS finds no such item, and nothing for such a query; a warning counts them.

    Args:
        index: An inner-product index of the gallery, as `build_index` makes it.
        queries: (Q, D), folded here in float32 and not normalised again.
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block weight, (G, B, B), or None.
        k: Items a query, 1 to the gallery's size.
        normalize: Put the queries on the unit sphere before they are folded; the index needs the same.

    Returns:
        (values, indices), (Q, k) float32 and int64, best first, on the CPU. Where an approximate index finds fewer than
        k items, the rest are −inf and −1.

    Raises:
        TypeError: neither a tensor nor an array.
        ValueError: shapes that do not agree, no weight, an index of another metric, or k beyond the gallery.
    """
    faiss = require("faiss", "faiss")
    checks.check_kind("index", index, faiss.Index, "a faiss.Index")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError("index must be one for inner products (faiss.METRIC_INNER_PRODUCT), got another metric")
    checks.check_count("k", k, 1)
    if k > index.ntotal:
        raise ValueError(f"k must be from 1 to the gallery's size, {index.ntotal}, got {k}")
    folded = folded_queries(queries, W_diag, W_blocks, normalize=normalize)
    if folded.shape[1] != index.d:
        raise ValueError(f"queries must have the index's D = {index.d}, got shape {folded.shape}")
    bad = bad_rows("folded queries", folded)
    if bad is not None:
        warnings.warn(f"{bad}: FAISS finds nothing for them", stacklevel=2)
    found = _best(index, folded, k, min(k + 1, index.ntotal))
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def _best(index: Any, folded: NDArray[np.float32], k: int, fetched: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """(values, indices), (Q, k), of `fetched` results a query, or of more where all after the k-th tie with it."""
    values, indices = index.search(folded, fetched)
    missing = indices < 0
    values[missing] = -np.inf
    # Where FAISS found fewer than it was asked for, there are no more.
    goes_on = (values[:, k - 1] == values[:, -1]) & ~missing[:, -1] if fetched < index.ntotal else ()
    # Score first, then index; what was not found comes last.
    order = np.lexsort((np.where(missing, index.ntotal, indices), -values), axis=-1)[:, :k]
    values, indices = (np.take_along_axis(found, order, axis=-1) for found in (values, indices))
    (open_rows,) = np.nonzero(goes_on)
    wider = min(2 * fetched, index.ntotal)
    step = max(1, MOST_RESULTS // wider)
    for start in range(0, len(open_rows), step):
        rows = open_rows[start : start + step]
        values[rows], indices[rows] = _best(index, folded[rows], k, wider)
    return values, indices
