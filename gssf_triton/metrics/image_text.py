"""Image–text retrieval: Recall@K both ways, their sum, median and mean rank; also in folds (COCO's 1K protocol)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gssf_triton import checks
from gssf_triton.backend import resolve_backend
from gssf_triton.kernels import retrieval_configs
from gssf_triton.metric import Metric
from gssf_triton.metrics.common import BELOW_CALLER, recalls, to_host
from gssf_triton.progress import progress_bar
from gssf_triton.retrieval import ranks
from gssf_triton.retrieval.finite import warn_of_bad_rows
from gssf_triton.slices import slices


@torch.no_grad()
def image_text(
    images: Tensor,
    texts: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    image_ids: Tensor,
    text_ids: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    folds: int = 1,
    normalize: bool = True,
    progress: bool = False,
    backend: str = "auto",
) -> dict[str, float]:
    """Image-to-text and text-to-image retrieval; equal ids match, any number of captions an image and images a caption.

    The rank of a query is that of its best match. Queries with no match are left out of every number (their items stay
    in the other direction's gallery). With `folds` the images are cut, in order, into that many parts of equal size (to
    within one), each with the texts that match it and an even share of the texts that match no image; each number is
    the folds' mean, so `rsum` is the sum of the averaged recalls. `folds=5` on COCO's 5,000 test images is its 1K
    protocol. (Evaluation scripts in wide circulation print another number as the folds' mean rsum: six times the mean
    of the wrong column of their results. This one is the sum.)

    Args:
        images: (I, D), the left side of the similarity.
        texts: (T, D), of the images' dtype and device.
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D, or None.
        image_ids: (I,) integers, and
        text_ids: (T,) integers, each of any dtype; compared as int64.
        ks: The cut-offs K.
        folds: Parts that are evaluated apart, at most I.
        normalize: Put both sides on the unit sphere first.
        progress: Show a bar (needs tqdm).
        backend: As in `pairwise_sim`.

    Returns:
        `i2t_r{k}` and `t2i_r{k}` for each k, in percent; `rsum`, their sum; `i2t_medr` (the median rank rounded down,
        as VSE++ has it), `i2t_meanr`, `t2i_medr`, `t2i_meanr`, ranks from 1. NaN where no query has a match.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes, dtypes or devices that do not agree, no weight, or more folds than images.
        ImportError: `progress=True` without tqdm.
        RuntimeError: `backend="triton"` where Triton cannot run.

    Source:
        Faghri et al., VSE++, BMVC 2018 (the protocol); Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch, gssf_triton
        >>> images = torch.eye(3)
        >>> texts = torch.tensor([[1.0, 0.2, 0.0], [0.6, 0.5, 0.0], [0.0, 0.0, 1.0]])
        >>> ids = torch.arange(3)
        >>> found = gssf_triton.metrics.image_text(
        ...     images, texts, torch.ones(3), image_ids=ids, text_ids=ids, ks=(1, 2)
        ... )
        >>> {name: round(value, 1) for name, value in found.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'i2t_r1': 100.0, 'i2t_r2': 100.0, 't2i_r1': 66.7, 't2i_r2': 100.0, 'rsum': 366.7,
         'i2t_medr': 1.0, 'i2t_meanr': 1.0, 't2i_medr': 1.0, 't2i_meanr': 1.3}
    """
    names = ("images", "texts")
    checks.check_pair(images, texts, names)
    checks.check_matrix("images", images, "(I, D)")
    checks.check_matrix("texts", texts, "(T, D)")
    checks.check_same_dtype(images, texts, names)
    checks.check_weights("images", images, W_diag, W_blocks)
    image_ids = checks.check_labels("image_ids", image_ids, images.shape[0], "images", images)
    text_ids = checks.check_labels("text_ids", text_ids, texts.shape[0], "texts", texts)
    checks.check_ks(ks)
    checks.check_count("folds", folds, 1, max(images.shape[0], 1))
    checks.check_flags(normalize=normalize, progress=progress)
    resolve_backend(backend, images, W_blocks)
    warn_of_bad_rows(BELOW_CALLER, images=images, texts=texts)
    metric = Metric(W_diag, W_blocks)
    parts = _folds(image_ids, text_ids, folds)
    results = []
    for number, (image_part, text_part) in enumerate(parts):
        sides = [(images[image_part], image_ids[image_part]), (texts[text_part], text_ids[text_part])]
        result: dict[str, float] = {}
        for name, side, order in (("i2t", metric, 1), ("t2i", metric.mT, -1)):
            (queries, query_ids), (gallery, gallery_ids) = sides[::order]
            bar = progress_bar(progress, name if folds == 1 else f"{name} fold {number + 1}/{folds}")
            rows = retrieval_configs.stream_chunks(
                len(queries), len(gallery), queries.shape[1], queries.dtype.itemsize, queries.device.type
            ).rows
            batches = [
                ranks(
                    queries[batch], gallery, side.W_diag, side.W_blocks, query_ids=query_ids[batch],
                    gallery_ids=gallery_ids, normalize=normalize, backend=backend,
                )
                for batch in bar(slices(0, queries.shape[0], rows))
            ]  # fmt: skip
            first = to_host(batches)
            result |= _direction(name, first[first >= 0], tuple(ks))
        results.append(result)
    mean = {name: sum(result[name] for result in results) / folds for name in results[0]}
    return _in_order(mean, tuple(ks))


def _folds(image_ids: Tensor, text_ids: Tensor, folds: int) -> list[tuple[Tensor | slice, Tensor | slice]]:
    """(images, texts) of every fold; with one fold everything, uncopied."""
    if folds == 1:
        return [(slice(None), slice(None))]
    unmatched = ~torch.isin(text_ids, image_ids)
    shares = torch.zeros_like(text_ids)
    shares[unmatched] = torch.arange(int(unmatched.sum()), device=text_ids.device) % folds
    parts: list[tuple[Tensor | slice, Tensor | slice]] = []
    for fold, image_part in enumerate(torch.arange(image_ids.shape[0], device=image_ids.device).tensor_split(folds)):
        belongs = torch.isin(text_ids, image_ids[image_part]) | (unmatched & (shares == fold))
        parts.append((image_part, belongs.nonzero()[:, 0]))
    return parts


def _direction(name: str, first: NDArray[np.int64], ks: tuple[int, ...]) -> dict[str, float]:
    """Recalls, median and mean of the ranks (from 0) of one direction's queries."""
    found = recalls(first, ks, f"{name}_r")
    median, mean = (float(np.median(first)), float(first.mean())) if first.size else (math.nan, math.nan)
    return found | {f"{name}_medr": median // 1 + 1, f"{name}_meanr": mean + 1}


def _in_order(values: dict[str, float], ks: tuple[int, ...]) -> dict[str, float]:
    """Recalls, their sum, then the ranks."""
    named = [f"{name}_r{k}" for name in ("i2t", "t2i") for k in ks]
    found = {name: values[name] for name in named}
    found["rsum"] = sum(found.values())
    return found | {name: value for name, value in values.items() if name not in found}
