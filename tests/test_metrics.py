"""The metrics against textbook code on random cases: ties, unmatched queries, junk, distractors, lone labels, folds."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import support.retrieval_reference as naive
import torch
from sklearn.metrics import average_precision_score, top_k_accuracy_score
from support.reference import features, weights
from support.retrieval_reference import coarse, coarse_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gssf_triton import metrics
from gssf_triton.kernels import retrieval_configs
from gssf_triton.retrieval import match_ranks as matching
from gssf_triton.retrieval.query import Query, checked
from gssf_triton.retrieval.scoring import Scores
from gssf_triton.retrieval.search import SEARCHES


@pytest.fixture(params=["whole", "chunks"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything in one chunk, or in many."""
    if request.param == "chunks":
        chunks = retrieval_configs.StreamChunks(rows=16, columns=64, block_rows=64)
        monkeypatch.setattr(retrieval_configs, "stream_chunks", lambda *shape: chunks)
    return str(request.param)


def same(ours: dict[str, float], expected: dict[str, float]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True), name


def data(rows: tuple[int, int], real: bool, device: str) -> dict[str, Any]:
    """Two sets of features and a metric; whole numbers, with ties everywhere, or real ones."""
    make, metric = (features, weights) if real else (coarse, coarse_weights)
    a, b = (make(count, 12, device=device) for count in rows)
    return {"a": a, "b": b, **metric("diag+blocks", 3, 4, device=device)}


def scores(call: dict[str, Any], normalize: bool) -> Any:
    return naive.scores_of(call["a"], call["b"], call["W_diag"], call["W_blocks"], normalize=normalize).tolist()


#: Ties may part at a cut; real numbers are in chunks alone.
REAL = pytest.mark.parametrize(
    ("real", "cut"), [(False, "whole"), (False, "chunks"), (True, "chunks")], indirect=["cut"],
    ids=["ties-whole", "ties-chunks", "real-chunks"],
)  # fmt: skip


# ---------------------------------------------------------------- image–text


def image_text_call(I: int, T: int, real: bool, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:  # noqa: E741
    call = data((I, T), real, device)
    # Several captions an image, several images a caption, some of each without a match.
    names = {
        "image_ids": torch.randint(0, max(I * 2 // 3, 1), (I,)).to(device),
        "text_ids": torch.randint(-3, max(I * 2 // 3, 1), (T,)).to(device),
    }
    names["text_ids"][:1] = names["image_ids"][:1]
    return call, names


@REAL
@pytest.mark.parametrize(("I", "T"), [(1, 1), (17, 80), (40, 37)], ids=str)
def test_image_text(I: int, T: int, real: bool, cut: str, backend: str, device: str) -> None:  # noqa: E741
    call, names = image_text_call(I, T, real, device)
    weights = {name: call[name] for name in ("W_diag", "W_blocks")}
    for normalize in (True,) if real else (False,):
        ours = metrics.image_text(
            call["a"], call["b"], **weights, **names, ks=(1, 3, 10), normalize=normalize, backend=backend
        )
        lists = (names["image_ids"].tolist(), names["text_ids"].tolist())
        same(ours, naive.image_text(scores(call, normalize), *lists, (1, 3, 10)))


def test_image_text_in_coco_folds(cut: str, backend: str, device: str) -> None:
    """Five captions an image, in order: each fold is a run of images and their captions."""
    call, names = data((20, 100), False, device), {}
    names["image_ids"] = torch.arange(20, device=device)
    names["text_ids"] = names["image_ids"].repeat_interleave(5)
    weights = {name: call[name] for name in ("W_diag", "W_blocks")}
    ours = metrics.image_text(call["a"], call["b"], **weights, **names, folds=5, normalize=False, backend=backend)
    S = scores(call, False)
    folds = [
        naive.image_text(
            [row[20 * f : 20 * f + 20] for row in S[4 * f : 4 * f + 4]],
            range(4), [t // 5 for t in range(20)], (1, 5, 10),
        )
        for f in range(5)
    ]  # fmt: skip
    same(ours, {name: naive.mean(fold[name] for fold in folds) for name in folds[0]})
    assert ours["rsum"] == pytest.approx(sum(ours[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)))


def test_image_text_in_folds_of_any_order(device: str) -> None:
    """Captions lie where they like: a fold has those of its images, and a share of those of none."""
    call = data((23, 61), False, device)
    names = {"image_ids": torch.arange(23, device=device), "text_ids": torch.randint(-3, 23, (61,)).to(device)}
    names["text_ids"][:3] = torch.tensor([1, 9, 20])  # every fold has a pair
    weights = {name: call[name] for name in ("W_diag", "W_blocks")}
    ours = metrics.image_text(call["a"], call["b"], **weights, **names, folds=3, normalize=False)
    S, text_ids = scores(call, False), names["text_ids"].tolist()
    nobody = [t for t, name in enumerate(text_ids) if not 0 <= name < 23]
    folds = []
    for fold, images in enumerate([range(0, 8), range(8, 16), range(16, 23)]):
        texts = [t for t, name in enumerate(text_ids) if name in images or t in nobody[fold::3]]
        part = [[S[i][t] for t in texts] for i in images]
        folds.append(naive.image_text(part, list(images), [text_ids[t] for t in texts], (1, 5, 10)))
    same(ours, {name: naive.mean(fold[name] for fold in folds) for name in folds[0]})


# ---------------------------------------------------------------- re-identification


def reid_call(Q: int, N: int, real: bool, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    names = {
        "query_ids": torch.randint(1, 9, (Q,)),
        "gallery_ids": torch.randint(-1, 7, (N,)),  # −1 junk, 0 distractors; nobody is 7 or 8
        "query_cams": torch.randint(0, 3, (Q,)),
        "gallery_cams": torch.randint(0, 3, (N,)),
    }
    return data((Q, N), real, device), {name: x.to(device) for name, x in names.items()}


@REAL
@pytest.mark.parametrize(("Q", "N"), [(1, 40), (20, 90), (35, 131)], ids=str)
def test_reid(Q: int, N: int, real: bool, cut: str, backend: str, device: str) -> None:
    call, names = reid_call(Q, N, real, device)
    names["query_ids"][0], names["gallery_ids"][:2] = 3, 3
    names["query_cams"][0], names["gallery_cams"][0] = 0, 1
    weights = {name: call[name] for name in ("W_diag", "W_blocks")}
    ours = metrics.reid(call["a"], call["b"], **weights, **names, ks=(1, 5, 10), normalize=real, backend=backend)
    same(ours, naive.reid(scores(call, real), *(x.tolist() for x in names.values()), (1, 5, 10)))


def test_reid_precision_is_scikit_learns(device: str) -> None:
    """Where no scores are equal, average precision has one definition."""
    call, names = reid_call(30, 80, True, device)
    weights = {name: call[name] for name in ("W_diag", "W_blocks")}
    ours = metrics.reid(call["a"], call["b"], **weights, **names)
    S = naive.scores_of(call["a"], call["b"], **weights, normalize=True).cpu()
    names = {name: x.cpu() for name, x in names.items()}
    found = []
    for i in range(30):
        same_id = names["gallery_ids"] == names["query_ids"][i]
        ranked = (names["gallery_ids"] != -1) & ~(same_id & (names["gallery_cams"] == names["query_cams"][i]))
        if (same_id & ranked).any():
            found.append(average_precision_score(same_id[ranked].numpy(), S[i][ranked].numpy()))
    assert ours["map"] == pytest.approx(100 * sum(found) / len(found), rel=1e-9)


def test_recalls_are_scikit_learns(device: str) -> None:
    """Where each query has one match and no scores are equal, Recall@K is top-k accuracy; folds apart."""
    call = data((30, 30), True, device)
    weights = {name: call[name] for name in ("W_diag", "W_blocks")}
    ids = torch.randperm(30).to(device)
    ours = metrics.image_text(call["a"], call["b"], **weights, image_ids=ids, text_ids=ids)
    S = naive.scores_of(call["a"], call["b"], **weights, normalize=True).cpu()
    for name, rows in (("i2t", S), ("t2i", S.T)):
        for k in (1, 5, 10):
            accuracy = top_k_accuracy_score(range(30), rows.numpy(), k=k, labels=range(30))
            assert ours[f"{name}_r{k}"] == pytest.approx(100 * accuracy)


def test_reid_where_nobody_has_a_match(backend: str, device: str) -> None:
    call, names = reid_call(5, 9, True, device)
    names["query_ids"] += 100
    weights = {name: call[name] for name in ("W_diag", "W_blocks")}
    ours = metrics.reid(call["a"], call["b"], **weights, **names, backend=backend)
    assert list(ours) == ["map", "minp", "cmc1", "cmc5", "cmc10"]
    assert all(math.isnan(value) for value in ours.values())


# ---------------------------------------------------------------- one set


@REAL
@pytest.mark.parametrize(("N", "classes"), [(1, 1), (2, 1), (90, 40), (131, 3)], ids=str)
def test_retrieval(N: int, classes: int, real: bool, cut: str, backend: str, device: str) -> None:
    call = data((N, 1), real, device)
    call["b"] = call["a"]
    labels = torch.randint(0, classes, (N,)).to(device)
    ours = metrics.retrieval(
        call["a"], labels, call["W_diag"], call["W_blocks"], (1, 2, 4, 8), normalize=real, backend=backend
    )
    same(ours, naive.retrieval(scores(call, real), labels.tolist(), (1, 2, 4, 8)))


def test_retrieval_with_nan_in_the_set(backend: str, device: str) -> None:
    """Items that are not numbers rank first, as in torch.topk, and are counted as what they are."""
    x = coarse(60, 12, device=device)
    x[torch.rand(60, device=device) < 0.2] = float("nan")
    labels = torch.randint(0, 5, (60,)).to(device)
    x[7] = float("nan")
    W_diag = torch.ones(12, device=device)
    bad = x.isnan().any(1).nonzero()[:, 0].tolist()
    with pytest.warns(UserWarning, match=rf"{len(bad)} of the 60 rows of embeddings hold.* first is {bad[0]}:") as said:
        ours = metrics.retrieval(x, labels, W_diag, normalize=False, backend=backend)
    assert [warning.filename for warning in said] == [__file__], "told to whoever calls"
    same(ours, naive.retrieval(naive.scores_of(x, x, W_diag, None).tolist(), labels.tolist(), (1, 2, 4, 8)))


def test_many_matches_and_few_cost_different_ways_to_the_same_ranks(
    cut: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sorted whole, or looked up among the matches; ties, NaN, junk, dropped items and queries without a match."""
    call, names = reid_call(33, 131, False, device)
    call["a"][5], call["b"][17], call["b"][40] = float("nan"), float("nan"), float("nan")
    ids, cams = (names["query_ids"], names["gallery_ids"]), (names["query_cams"], names["gallery_cams"])
    mask = torch.rand(33, 131, device=device) < 0.8
    for dtype in (torch.float32, torch.float64):
        queries, gallery = call["a"].to(dtype), call["b"].to(dtype)
        query = Query(queries, gallery, call["W_diag"], call["W_blocks"], False, backend, mask=mask, **names)
        scores = SEARCHES[backend](checked(query))
        S = naive.scores_of(queries, gallery, call["W_diag"], call["W_blocks"]).tolist()
        keep = [
            naive.kept(
                i, 131, mask=mask.tolist(), same=lambda i, j: ids[0][i] == ids[1][j] and cams[0][i] == cams[1][j]
            )
            for i in range(33)
        ]
        expected = naive.match_places(S, ids[0].tolist(), ids[1].tolist(), keep)
        for few, numpy_threads in ((0, 2), (0, 0), (200, 2)):
            monkeypatch.setattr(matching, "FEW_MATCHES", few)
            monkeypatch.setattr(matching, "NUMPY_SORT_THREADS", numpy_threads)
            monkeypatch.setattr(matching, "sorted_rows", lambda N, device: 7)
            found: list[list[int]] = []
            for rows, ranks, counts in matching.match_ranks(scores, iter):
                assert rows.start == len(found)
                found += [row[:count] for row, count in zip(ranks.tolist(), counts.tolist(), strict=True)]
            assert found == expected


def test_few_classes_take_no_longer_than_sorting(device: str) -> None:
    """Counted in scores, not seconds: half of all items match, and S is computed once, a bounded part at a time."""
    x = coarse(600, 8, device=device)
    labels = torch.arange(600, device=device) % 2
    scored: list[int] = []
    multiply = Scores.multiply

    def counted(self: Scores, queries: Tensor, items: Tensor, out: Tensor) -> None:
        scored.append(queries.shape[0] * items.shape[0])
        multiply(self, queries, items, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scores, "multiply", counted)
        patch.setattr(matching, "sorted_rows", lambda N, device: 16)
        found = metrics.retrieval(x, labels, torch.ones(8, device=device), normalize=False)
    assert sum(scored) == 600 * 600 and max(scored) <= 16 * 600
    S = naive.scores_of(x, x, torch.ones(8, device=device), None)
    same(found, naive.retrieval(S.tolist(), labels.tolist(), (1, 2, 4, 8)))


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_rows_that_are_no_numbers_are_counted(value: float, device: str) -> None:
    call, names = image_text_call(9, 30, True, device)
    call["b"][[4, 21]], call["a"][3, 5] = value, value
    weights = {name: call[name] for name in ("W_diag", "W_blocks")}
    with pytest.warns(UserWarning) as said:
        metrics.image_text(call["a"], call["b"], **weights, **names)
    assert [str(warning.message) for warning in said] == [
        "1 of the 9 rows of images holds NaN or infinity, the first is 3: NaN ranks before every number",
        "2 of the 30 rows of texts hold NaN or infinity, the first is 4: NaN ranks before every number",
    ]
    call, names = reid_call(5, 20, True, device)
    call["b"][11] = value
    weights = {name: call[name] for name in ("W_diag", "W_blocks")}
    with pytest.warns(UserWarning, match="1 of the 20 rows of gallery holds NaN or infinity, the first is 11:") as said:
        metrics.reid(call["a"], call["b"], **weights, **names)
    assert len(said) == 1 and said[0].filename == __file__


class NoFloat64(TorchDispatchMode):
    """A device that lacks float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert not any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves(out)), func
        return out


def test_a_device_without_float64(device: str) -> None:
    """The same numbers, to the last bit."""
    call, names = image_text_call(17, 80, True, device)
    weights = {name: call[name] for name in ("W_diag", "W_blocks")}
    texts, labels = call["b"], torch.arange(80, device=device) % 3
    people, cameras = reid_call(20, 90, True, device)
    weights_of_people = {name: people[name] for name in ("W_diag", "W_blocks")}

    def all_three() -> list[dict[str, float]]:
        return [
            metrics.image_text(call["a"], texts, **weights, **names, folds=3),
            metrics.retrieval(texts, labels, **weights),
            metrics.retrieval(texts, torch.arange(80, device=device) // 2, **weights),
            metrics.reid(people["a"], people["b"], **weights_of_people, **cameras),
        ]

    with NoFloat64():
        without = all_three()
    assert without == all_three()


# ---------------------------------------------------------------- promises


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype, backend: str, device: str) -> None:
    """Whole numbers are exact in all of them."""
    call = data((20, 1), False, device)
    labels = torch.randint(0, 4, (20,)).to(device)
    weights = call["W_diag"], call["W_blocks"]
    ours = metrics.retrieval(call["a"].to(dtype), labels, *weights, normalize=False, backend=backend)
    same(ours, metrics.retrieval(call["a"], labels, *weights, normalize=False, backend=backend))


def test_both_sides_are_normalised_unless_told_otherwise(device: str) -> None:
    x, labels, W = features(40, 12, device=device), torch.arange(40, device=device) % 5, torch.ones(12, device=device)
    longer = x * (1 + torch.arange(40, device=device)[:, None])
    same(metrics.retrieval(longer, labels, W), metrics.retrieval(x, labels, W))
    assert metrics.retrieval(longer, labels, W, normalize=False) != metrics.retrieval(x, labels, W, normalize=False)


def test_progress_changes_nothing_but_the_screen(
    device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, names = reid_call(20, 90, False, device)
    weights = {name: call[name] for name in ("W_diag", "W_blocks")}
    quiet = metrics.reid(call["a"], call["b"], **weights, **names)
    assert capsys.readouterr().err == ""
    assert metrics.reid(call["a"], call["b"], **weights, **names, progress=True) == quiet
    assert "re-id" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="progress=True needs tqdm"):
        metrics.reid(call["a"], call["b"], **weights, **names, progress=True)
