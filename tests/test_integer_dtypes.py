"""Ids, labels, cameras, places and masks of rows in any integer dtype, and two in one call: the same numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import support.retrieval_reference as naive
import torch
from support.reference import features
from torch import Tensor

import gssf_triton as gssf
from gssf_triton import metrics, viz

DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64,
)  # fmt: skip
I, T, D = 10, 30, 8  # noqa: E741

Cast = Callable[[Tensor], Tensor]


def results(cast: Cast, backend: str, device: str) -> Iterator[tuple[str, object]]:
    """Every function that takes whole numbers, each of which goes through `cast`."""
    torch.manual_seed(3)
    images, texts, W = features(I, D, device=device), features(T, D, device=device), torch.ones(D, device=device)
    regions, words = features(3, 5, D, device=device), features(4, 6, D, device=device)
    image_ids = torch.arange(I, device=device)
    text_ids, cams = image_ids.repeat_interleave(3), torch.arange(T, device=device) % 2
    with_backend = {"W_diag": W, "backend": backend}
    a, b, ids = texts[:12], texts[12:24], text_ids[:12]
    yield "info_nce", gssf.info_nce(a, b, **with_backend, logit_scale=2.0, ids=cast(ids))
    yield "sigmoid_loss", gssf.sigmoid_loss(a, b, **with_backend, logit_scale=2.0, logit_bias=0.0, ids=cast(ids))
    yield "triplet_loss", gssf.triplet_loss(a, b, **with_backend, ids=cast(ids))
    yield "topk", torch.cat(gssf.topk(images, texts, **with_backend, k=3, exclude=cast(torch.arange(I, device=device))))
    mask = cast((torch.arange(I * T, device=device) % 3 > 0).view(I, T).long())
    yield "topk, mask", torch.cat(gssf.topk(images, texts, **with_backend, k=3, mask=mask))
    names = {"query_ids": cast(image_ids), "gallery_ids": cast(text_ids)}
    cameras = {"query_cams": cast(cams[:I]), "gallery_cams": cast(cams)}
    yield "ranks", gssf.ranks(images, texts, **with_backend, **names, **cameras, mask=mask)
    for folds in (1, 2):
        yield (
            f"image_text {folds}",
            metrics.image_text(
                images, texts, **with_backend, image_ids=cast(image_ids), text_ids=cast(text_ids), folds=folds
            ),
        )
    yield "reid", metrics.reid(images, texts, **with_backend, **names, **cameras)
    yield "retrieval", metrics.retrieval(texts, cast(text_ids), **with_backend)
    found = viz.similarity_histogram(images, texts, W, a_ids=cast(image_ids), b_ids=cast(text_ids), bins=4)
    yield "histogram", torch.cat((found.positives, found.negatives))
    masks = {
        "region_mask": cast((torch.arange(15, device=device) % 3 > 0).view(3, 5).long()),
        "word_mask": cast((torch.arange(24, device=device) % 4 > 0).view(4, 6).long()),
    }
    yield "late_interaction", gssf.late_interaction(regions, words, **with_backend, **masks)
    yield "cross_attention_sim", gssf.cross_attention_sim(regions, words, **with_backend, **masks)


def as_it_is(x: Tensor) -> Tensor:
    return x


def equal(found: object, expected: object) -> bool:
    return torch.equal(found, expected) if isinstance(found, Tensor) else found == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        *((dtype, "torch") for dtype in (*DTYPES, "mixed")),
        # What reaches a kernel is int64 whatever came.
        pytest.param("mixed", "triton", marks=pytest.mark.kernels),
    ],
    ids=str,
)
def test_every_function_takes_every_integer_dtype(dtype: torch.dtype | str, backend: str, device: str) -> None:
    turns = itertools.cycle(DTYPES)

    def cast(x: Tensor) -> Tensor:
        return x.to(next(turns) if isinstance(dtype, str) else dtype)

    pairs = zip(results(cast, backend, device), results(as_it_is, backend, device), strict=True)
    assert [name for (name, found), (_, expected) in pairs if not equal(found, expected)] == []


@pytest.mark.parametrize("folds", [1, 5])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.uint32], ids=str)
def test_image_text_of_narrow_ids(dtype: torch.dtype, folds: int, device: str) -> None:
    """Sorted in Python: texts of five images that are in nobody's fold are shared out among the folds."""
    images = naive.coarse(10, D, device=device)
    texts, W = naive.coarse(40, D, device=device), torch.ones(D, device=device)
    image_ids, text_ids = torch.arange(10, device=device), torch.arange(40, device=device) % 15
    found = metrics.image_text(
        images, texts, W, image_ids=image_ids.to(dtype), text_ids=text_ids, folds=folds, normalize=False
    )
    S = naive.scores_of(images, texts, W, None).tolist()
    nobodys = [t for t in range(40) if t % 15 >= 10]
    parts = []
    for fold in range(folds):
        own = list(range(10))[fold * 10 // folds : (fold + 1) * 10 // folds]
        kept = [t for t in range(40) if t % 15 in own or t in nobodys[fold::folds]]
        parts.append(naive.image_text([[S[i][t] for t in kept] for i in own], own, [t % 15 for t in kept], (1, 5, 10)))
    assert found == pytest.approx({name: naive.mean(part[name] for part in parts) for name in parts[0]})


def test_ids_beyond_int64(device: str) -> None:
    """Hashes of 64 bits, as int64 or uint64: equal ones match."""
    hashes = torch.tensor([2**63 - 1, -(2**63), -7, 5], device=device)
    x = torch.eye(4, device=device)
    W = torch.ones(4, device=device)
    for dtype in (torch.int64, torch.uint64):
        found = gssf.ranks(x, x.roll(1, 0), W, query_ids=hashes.view(dtype), gallery_ids=hashes.view(dtype).roll(1, 0))
        assert found.tolist() == [0, 0, 0, 0]
        assert metrics.retrieval(x, hashes.view(dtype), W)["r1"] == 0.0
