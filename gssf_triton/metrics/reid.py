"""Re-identification as Market-1501 has it: CMC, mean average precision and mean inverse negative penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gssf_triton import checks
from gssf_triton.backend import resolve_backend
from gssf_triton.metrics.common import BELOW_CALLER, are_matches, average_precision, percent, recalls, to_host
from gssf_triton.progress import progress_bar
from gssf_triton.retrieval.finite import warn_of_bad_rows
from gssf_triton.retrieval.match_ranks import match_ranks
from gssf_triton.retrieval.query import Query, checked
from gssf_triton.retrieval.search import SEARCHES

#: The id of gallery items that are neither right nor wrong: they are not ranked.
JUNK = -1


@torch.no_grad()
def reid(
    queries: Tensor,
    gallery: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor,
    gallery_cams: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    normalize: bool = True,
    progress: bool = False,
    backend: str = "auto",
) -> dict[str, float]:
    """Person re-identification's metrics in Market-1501's single-query protocol.

    For each query, gallery items of its identity and its camera are not ranked, nor is junk (id −1); distractors (id 0,
    or any id that no query has) are. Queries without a match among what is left are left out. Average precision is
    torchreid's and fast-reid's, the mean of the precisions at the matches; Market-1501's own script takes trapezoids
    below the precision–recall curve, some tenths of a percent less. Equal scores go by the lower index (others leave
    them to NumPy's sort).

    Args:
        queries: (Q, D), the left side of the similarity.
        gallery: (N, D), of the queries' dtype and device.
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D, or None.
        query_ids: (Q,) integers of any dtype, the identities; compared as int64.
        gallery_ids: (N,) integers; −1 is junk.
        query_cams: (Q,) integers, the cameras.
        gallery_cams: (N,) integers.
        ks: The cut-offs K of CMC.
        normalize: Put both sides on the unit sphere first.
        progress: Show a bar (needs tqdm).
        backend: As in `pairwise_sim`.

    Returns:
        `map`: mean over the queries of the mean of the precisions at their matches; `minp`: mean of matches divided by
        the rank (from 1) of the last match; `cmc{k}`: share of the queries with a match among the first k. All in
        percent; NaN where no query has a match.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, dtypes or devices that do not agree, or no weight.
        ImportError: `progress=True` without tqdm.
        RuntimeError: `backend="triton"` where Triton cannot run.

    Source:
        Zheng et al., Scalable Person Re-identification, ICCV 2015 (the protocol); Ye et al., Deep Learning for Person
        Re-identification, TPAMI 2021 (mINP); Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch, gssf_triton
        >>> queries, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5]])
        >>> gssf_triton.metrics.reid(
        ...     queries, gallery, torch.ones(2), query_ids=torch.tensor([3]), gallery_ids=torch.tensor([3, 0, 3]),
        ...     query_cams=torch.tensor([1]), gallery_cams=torch.tensor([1, 2, 2]), ks=(1, 2),
        ... )
        {'map': 50.0, 'minp': 50.0, 'cmc1': 0.0, 'cmc2': 100.0}
    """
    query = checked(
        Query(
            queries, gallery, W_diag, W_blocks, normalize, backend, query_ids=query_ids, gallery_ids=gallery_ids,
            query_cams=query_cams, gallery_cams=gallery_cams,
        ),
        "query_ids", "gallery_ids", "query_cams", "gallery_cams", arrays=False,
    )  # fmt: skip
    checks.check_ks(ks)
    checks.check_flags(progress=progress)
    backend = resolve_backend(backend, queries, W_blocks)
    warn_of_bad_rows(BELOW_CALLER, queries=queries, gallery=gallery)
    assert query.gallery_ids is not None
    ranked = (query.gallery_ids != JUNK).expand(query.shape)
    scores = SEARCHES[backend](replace(query, backend=backend, mask=ranked))
    first, precision, penalty = [], [np.zeros(0)], [np.zeros(0)]
    for _, ranks, counts in match_ranks(scores, progress_bar(progress, "re-id")):
        matched = counts > 0
        ranks, counts = ranks[matched], counts[matched]
        if counts.numel() == 0:
            continue
        first.append(ranks[:, 0].clone())  # a view would hold them all
        last = ranks.gather(1, counts[:, None] - 1)[:, 0]
        places, matches = ranks.cpu().numpy(), counts.cpu().numpy()
        precision.append(average_precision(places, matches, are_matches(places, matches)))
        penalty.append(matches / (last.cpu().numpy() + 1))
    summary = {"map": percent(np.concatenate(precision)), "minp": percent(np.concatenate(penalty))}
    return summary | recalls(to_host(first), tuple(ks), "cmc")
