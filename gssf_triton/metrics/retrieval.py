"""Retrieval within one set, as deep metric learning reports it: Recall@K, MAP@R and R-precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gssf_triton import checks
from gssf_triton.backend import resolve_backend
from gssf_triton.metrics.common import BELOW_CALLER, are_matches, average_precision, percent, recalls, to_host
from gssf_triton.progress import progress_bar
from gssf_triton.retrieval.finite import warn_of_bad_rows
from gssf_triton.retrieval.match_ranks import match_ranks
from gssf_triton.retrieval.query import Query
from gssf_triton.retrieval.search import SEARCHES


@torch.no_grad()
def retrieval(
    embeddings: Tensor,
    labels: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    normalize: bool = True,
    progress: bool = False,
    backend: str = "auto",
) -> dict[str, float]:
    """Every item as a query against all others: what CUB-200-2011, Cars-196 and SOP are reported in.

    An item is left out of its own ranking by its index, not as the first result: under a learned metric it is often
    not its own best match. MAP@R and R-precision are those of PyTorch Metric Learning, which leaves items whose label
    nobody shares out of Recall@K, too; here, as in the first evaluations of these sets, they are misses. Equal scores
    go by the lower index.

    Args:
        embeddings: (N, D); the queries are the left side of the similarity.
        labels: (N,) integers of any dtype.
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D, or None.
        ks: The cut-offs K of Recall@K.
        normalize: Put both sides on the unit sphere first.
        progress: Show a bar (needs tqdm).
        backend: As in `pairwise_sim`.

    Returns:
        `r{k}`: share of all items with an item of their label among the first k (an item whose label nobody shares
        counts, and never has one); `map_at_r` and `r_precision`: means over the items whose label R > 0 others share,
        of Σ precision at the matches among the first R, over R, and of the matches among the first R, over R. All in
        percent; NaN where there is no item to average over.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes or devices that do not agree, or no weight.
        ImportError: `progress=True` without tqdm.
        RuntimeError: `backend="triton"` where Triton cannot run.

    Source:
        Musgrave et al., A Metric Learning Reality Check, ECCV 2020 (MAP@R); Diao et al., GSSF, IEEE TIP 2024
        (arXiv 2410.15266).

    Example:
        >>> import torch, gssf_triton
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [0.0, 1.0]])
        >>> gssf_triton.metrics.retrieval(x, torch.tensor([5, 6, 5, 6]), torch.ones(2), ks=(1, 2))
        {'r1': 0.0, 'r2': 75.0, 'map_at_r': 0.0, 'r_precision': 0.0}
    """
    checks.check_features("embeddings", embeddings)
    checks.check_matrix("embeddings", embeddings, "(N, D)")
    checks.check_weights("embeddings", embeddings, W_diag, W_blocks)
    N = embeddings.shape[0]
    labels = checks.check_labels("labels", labels, N, "embeddings", embeddings)
    checks.check_ks(ks)
    checks.check_flags(normalize=normalize, progress=progress)
    backend = resolve_backend(backend, embeddings, W_blocks)
    warn_of_bad_rows(BELOW_CALLER, embeddings=embeddings)
    itself = torch.arange(N, device=embeddings.device)
    query = Query(
        embeddings, embeddings, W_diag, W_blocks, normalize, backend,
        exclude=itself, query_ids=labels, gallery_ids=labels,
    )  # fmt: skip
    scores = SEARCHES[backend](query)
    first, average, precision = [], [np.zeros(0)], [np.zeros(0)]
    for _, ranks, counts in match_ranks(scores, progress_bar(progress, "retrieval")):
        if ranks.shape[1] == 0:
            first.append(counts - 1)
            continue
        matched = counts > 0
        first.append(torch.where(matched, ranks[:, 0], -1))
        places, R = ranks[matched].cpu().numpy(), counts[matched].cpu().numpy()
        among_first = are_matches(places, R) & (places < R[:, None])
        average.append(average_precision(places, R, among_first))
        precision.append(among_first.sum(1) / R)
    return recalls(to_host(first), tuple(ks), "r") | {
        "map_at_r": percent(np.concatenate(average)),
        "r_precision": percent(np.concatenate(precision)),
    }
