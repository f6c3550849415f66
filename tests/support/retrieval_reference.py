"""Retrieval as a textbook writes it: sort one query's items in Python, look where the matches lie.

Nothing here knows of chunks, keys or kernels. `scores` are lists of floats, one list a query.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from support import reference

Scores = Sequence[Sequence[float]]


def scores_of(queries: Tensor, gallery: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, **options: Any) -> Any:
    """S in float64, (Q, N)."""
    weights = (None if w is None else w.double() for w in (W_diag, W_blocks))
    return reference.pairwise_sim(queries.double(), gallery.double(), *weights, **options)


def order(row: Sequence[float], keep: Iterable[int] | None = None) -> list[int]:
    """The items of one query, best first: NaN, then higher scores, equal ones by index."""

    def key(j: int) -> tuple[int, float, int]:
        return (0, 0.0, j) if math.isnan(row[j]) else (1, -row[j], j)

    return sorted(range(len(row)) if keep is None else keep, key=key)


def kept(row: int, N: int, exclude: Any = None, mask: Any = None, same: Any = None) -> list[int]:
    """The items that query `row` may find; `same(i, j)` says which share its identity and camera."""
    return [
        j
        for j in range(N)
        if (exclude is None or exclude[row] != j)
        and (mask is None or mask[row][j])
        and (same is None or not same(row, j))
    ]


def match_places(
    scores: Scores, query_ids: Sequence[int], gallery_ids: Sequence[int], keep: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """For every query the places, from 0, of its matches."""
    places = []
    for i, row in enumerate(scores):
        ranking = order(row, None if keep is None else keep[i])
        places.append([place for place, j in enumerate(ranking) if gallery_ids[j] == query_ids[i]])
    return places


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def image_text(
    scores: Scores, image_ids: Sequence[int], text_ids: Sequence[int], ks: Sequence[int]
) -> dict[str, float]:
    columns = [list(column) for column in zip(*scores, strict=True)]
    found = {}
    for name, rows, ids, other in (("i2t", scores, image_ids, text_ids), ("t2i", columns, text_ids, image_ids)):
        first = [places[0] for places in match_places(rows, ids, other) if places]
        for k in ks:
            found[f"{name}_r{k}"] = 100 * mean(rank < k for rank in first)
        found[f"{name}_medr"] = math.floor(statistics.median(first)) + 1
        found[f"{name}_meanr"] = mean(first) + 1
    found["rsum"] = sum(found[f"{name}_r{k}"] for name in ("i2t", "t2i") for k in ks)
    return found


def reid(
    scores: Scores,
    query_ids: Sequence[int],
    gallery_ids: Sequence[int],
    query_cams: Sequence[int],
    gallery_cams: Sequence[int],
    ks: Sequence[int],
) -> dict[str, float]:
    """One query at a time, as evaluation scripts for Market-1501 go."""
    cmc: dict[int, list[bool]] = {k: [] for k in ks}
    precision, penalty = [], []
    for i, row in enumerate(scores):
        ranking = [
            j
            for j in order(row)
            if gallery_ids[j] != -1 and not (gallery_ids[j] == query_ids[i] and gallery_cams[j] == query_cams[i])
        ]
        right = [gallery_ids[j] == query_ids[i] for j in ranking]
        if not any(right):
            continue
        for k in ks:
            cmc[k].append(any(right[:k]))
        at = [place + 1 for place, hit in enumerate(right) if hit]
        precision.append(mean((number + 1) / place for number, place in enumerate(at)))
        penalty.append(len(at) / at[-1])
    return {"map": 100 * mean(precision), "minp": 100 * mean(penalty)} | {f"cmc{k}": 100 * mean(cmc[k]) for k in ks}


def retrieval(scores: Scores, labels: Sequence[int], ks: Sequence[int]) -> dict[str, float]:
    recall: dict[int, list[bool]] = {k: [] for k in ks}
    average, precision = [], []
    for i, row in enumerate(scores):
        right = [labels[j] == labels[i] for j in order(row) if j != i]
        for k in ks:
            recall[k].append(any(right[:k]))
        R = sum(right)
        if R:
            precision.append(sum(right[:R]) / R)
            average.append(sum(sum(right[: p + 1]) / (p + 1) for p in range(R) if right[p]) / R)
    return {f"r{k}": 100 * mean(recall[k]) for k in ks} | {
        "map_at_r": 100 * mean(average),
        "r_precision": 100 * mean(precision),
    }


# ---------------------------------------------------------------- data


def coarse(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Small whole numbers: every score is exact in every dtype, and many are equal."""
    return torch.randint(-2, 3, shape).to(device, dtype)


def coarse_weights(kind: str, G: int, B: int, device: str = "cpu") -> dict[str, Tensor | None]:
    return {
        "W_diag": coarse(G * B, device=device) if "diag" in kind else None,
        "W_blocks": torch.randint(-1, 2, (G, B, B)).to(device, torch.float32) if "blocks" in kind else None,
    }
