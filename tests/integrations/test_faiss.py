"""FAISS serves GSSF: indexes of the raw gallery, the metric in the queries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from support import reference
from support.reference import assert_close, features, tolerance, weights
from torch import Tensor

from gssf_triton.integrations.arrays import folded_queries, gallery_rows, load_arrays, save_arrays
from gssf_triton.integrations.faiss import build_index, search
from gssf_triton.optional import require

G, B = 3, 8
KINDS = pytest.mark.parametrize("kind", ["diag", "blocks", "diag+blocks"])
NORMALIZE = pytest.mark.parametrize("normalize", [False, True], ids=["as-is", "normalize"])


def exact_topk(queries: Tensor, gallery: Tensor, metric: dict[str, Any], k: int, normalize: bool) -> Any:
    """All scores in float64, best first, equal ones by the lower index."""
    wide = {name: None if w is None else w.double() for name, w in metric.items()}
    S = reference.pairwise_sim(queries.double(), gallery.double(), **wide, normalize=normalize)
    values, indices = S.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def check_neighbours(found: tuple[Tensor, Tensor], S: Tensor, k: int) -> None:
    """The k best by float32's measure: the values right, each index's own score its value, no item twice."""
    values, indices = found
    assert values.dtype == torch.float32 and indices.dtype == torch.int64
    best = S.sort(dim=-1, descending=True).values[:, :k]
    assert_close(values, best, tolerance(torch.float32))
    assert_close(values, S.gather(1, indices), tolerance(torch.float32))
    assert all(len(set(row)) == k for row in indices.tolist())
    assert bool((values.diff(dim=1) <= 0).all())


@KINDS
@NORMALIZE
def test_flat_index_is_exact(kind: str, normalize: bool) -> None:
    queries, gallery, metric = features(17, G * B), features(101, G * B), weights(kind, G, B)
    index = build_index(gallery, normalize=normalize)
    found = search(index, queries, **metric, k=10, normalize=normalize)
    wide = {name: None if w is None else w.double() for name, w in metric.items()}
    S = reference.pairwise_sim(queries.double(), gallery.double(), **wide, normalize=normalize)
    check_neighbours(found, S, 10)


def test_index_holds_the_raw_gallery_and_serves_any_weights() -> None:
    queries, gallery = features(5, G * B), features(50, G * B)
    index = build_index(gallery)
    assert np.array_equal(index.reconstruct_n(0, 50), gallery.numpy())
    for _ in range(3):
        metric = weights("diag+blocks", G, B)
        S = reference.pairwise_sim(queries.double(), gallery.double(), **{n: w.double() for n, w in metric.items()})
        check_neighbours(search(index, queries, **metric, k=7), S, 7)


def whole_numbers(*shape: int) -> Tensor:
    """Small integers: every score is exact in float32, and many are equal."""
    return torch.randint(-2, 3, shape).float()


@pytest.mark.parametrize("k", [1, 5, 40, 60])
def test_equal_scores_come_by_the_lower_index(k: int) -> None:
    queries, gallery = whole_numbers(9, G * B), whole_numbers(20, G * B).repeat(3, 1)
    metric = {"W_diag": whole_numbers(G * B), "W_blocks": whole_numbers(G, B, B)}
    values, indices = search(build_index(gallery), queries, **metric, k=k)
    expected_values, expected_indices = exact_topk(queries, gallery, metric, k, False)
    assert torch.equal(values.double(), expected_values) and torch.equal(indices, expected_indices)


def test_a_gallery_of_one_item_repeated() -> None:
    values, indices = search(build_index(torch.ones(33, 4)), torch.ones(2, 4), torch.ones(4), k=3)
    assert values.tolist() == [[4.0] * 3] * 2 and indices.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("factory", ["IVF8,Flat", "HNSW32"])
@NORMALIZE
def test_approximate_indexes(factory: str, normalize: bool) -> None:
    """Searched as widely as they can be, they find what is there."""
    queries, gallery, metric = features(20, G * B), features(600, G * B), weights("diag+blocks", G, B)
    index = build_index(gallery, factory, normalize=normalize)
    if factory.startswith("IVF"):
        faiss.extract_index_ivf(index).nprobe = 8
    else:
        index.hnsw.efSearch = 600
    _, indices = search(index, queries, **metric, k=10, normalize=normalize)
    _, expected = exact_topk(queries, gallery, metric, 10, normalize)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(indices.tolist(), expected.tolist(), strict=True)])
    assert recall == 1.0 if factory.startswith("IVF") else recall > 0.9


def test_what_an_approximate_index_does_not_find() -> None:
    gallery = torch.cat([features(40, 8) + 20, features(40, 8) - 20])
    index = build_index(gallery, "IVF2,Flat")  # one of the two cells is looked into
    values, indices = search(index, torch.ones(1, 8), torch.ones(8), k=60)
    assert sorted(indices[0, :40].tolist()) == list(range(40))
    assert bool((indices[0, 40:] == -1).all()) and bool((values[0, 40:] == -torch.inf).all())


def test_memory_mapped_gallery(tmp_path: Path) -> None:
    np.save(tmp_path / "gallery.npy", features(30, G * B).numpy())
    gallery = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    _, indices = search(build_index(gallery), gallery[:4], torch.ones(G * B), k=1)
    assert indices.flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_features_of_any_dtype_are_folded_in_float32(dtype: torch.dtype) -> None:
    queries, gallery, metric = features(5, G * B, dtype=dtype), features(9, G * B, dtype=dtype), weights("diag", G, B)
    folded = folded_queries(queries, **metric)
    assert folded.dtype == np.float32 and folded.flags.c_contiguous
    expected = reference.transform(queries.double(), metric["W_diag"].double())
    assert_close(torch.from_numpy(folded), expected, tolerance(torch.float32))
    assert gallery_rows(gallery).dtype == np.float32


@NORMALIZE
@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_plain_arrays(ending: str, normalize: bool, tmp_path: Path) -> None:
    queries, gallery, metric = features(4, G * B), features(9, G * B), weights("diag+blocks", G, B)
    path = tmp_path / f"arrays.{ending}"
    save_arrays(path, **metric, queries=queries, gallery=gallery, normalize=normalize)
    arrays = load_arrays(path)
    assert set(arrays) == {"W_diag", "W_blocks", "queries", "gallery"}
    assert all(array.dtype == np.float32 for array in arrays.values())
    wide = {name: w.double() for name, w in metric.items()}
    expected = reference.pairwise_sim(queries.double(), gallery.double(), **wide, normalize=normalize)
    assert_close(torch.from_numpy(arrays["queries"] @ arrays["gallery"].T), expected, tolerance(torch.float32))
    for name, weight in metric.items():
        assert np.array_equal(arrays[name], weight.numpy())


def test_arrays_of_the_weights_alone(tmp_path: Path) -> None:
    save_arrays(tmp_path / "metric.npz", W_blocks=torch.nn.Parameter(torch.ones(2, 4, 4)))
    with np.load(tmp_path / "metric.npz") as file:
        assert list(file) == ["W_blocks"] and file["W_blocks"].shape == (2, 4, 4)


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    index, queries = build_index(features(6, 8)), features(2, 8)
    with pytest.raises(ValueError, match=r"k must be from 1 to the gallery's size, 6, got 7"):
        search(index, queries, torch.ones(8), k=7)
    with pytest.raises(ValueError, match="D = 8"):
        search(index, features(2, 4), torch.ones(4), k=1)
    with pytest.raises(ValueError, match="inner products"):
        search(faiss.IndexFlatL2(8), queries, torch.ones(8), k=1)
    with pytest.raises(ValueError, match="'Flood'"):
        build_index(features(6, 8), "Flood")
    with pytest.raises(ValueError, match=r"\.npz or \.safetensors"):
        save_arrays(tmp_path / "a.bin", W_diag=torch.ones(2))
    with pytest.raises(ValueError, match="no weight"):
        save_arrays(tmp_path / "a.npz", gallery=torch.ones(2, 2))
    with pytest.raises(ValueError, match="gallery"):
        save_arrays(tmp_path / "a.npz", W_diag=torch.ones(2), gallery=torch.ones(2, 3))
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named_with_its_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=re.escape('pip install "gssf_triton[faiss]"')):
        require("no_such_library.part", "faiss")


class Asked:
    """What FAISS was asked for: (queries, results a query) of each search."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
        self.searches: list[tuple[int, int]] = []
        search = kind.search

        def told(index: Any, x: Any, k: int, *rest: Any, **more: Any) -> Any:
            self.searches.append((len(x), k))
            return search(index, x, k, *rest, **more)

        monkeypatch.setattr(kind, "search", told)


def test_missing_results_are_no_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = torch.cat([features(40, 8) + 20, features(40, 8) - 20])
    index, asked = build_index(gallery, "IVF2,Flat"), Asked(monkeypatch, faiss.IndexIVFFlat)
    values, indices = search(index, torch.ones(3, 8), torch.ones(8), k=60)  # the cell that is looked into has 40
    assert asked.searches == [(3, 61)]
    assert [sorted(row[:40]) for row in indices.tolist()] == [list(range(40))] * 3
    assert bool((indices[:, 40:] == -1).all()) and bool((values[:, 40:] == -torch.inf).all())


@pytest.mark.parametrize("factory", ["Flat", "IVF1,Flat"])
def test_only_queries_with_ties_are_asked_again(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that could not be read, all zeros, ties with every item; three more have a tie of five."""
    gallery = features(300, 8)
    gallery[[3, 50, 51, 120, 299]] = gallery[7] * 0 + 9
    queries = torch.cat([features(20, 8), torch.ones(3, 8)])
    queries[11] = 0
    kind = faiss.IndexFlat if factory == "Flat" else faiss.IndexIVFFlat
    index, asked = build_index(gallery, factory), Asked(monkeypatch, kind)
    monkeypatch.setattr("gssf_triton.integrations.faiss.MOST_RESULTS", 40)
    values, indices = search(index, queries, torch.ones(8), k=3)
    best = (queries @ gallery.T).sort(dim=1, descending=True).values
    tied = int((best[:, 2] == best[:, 3]).sum())
    first, *later = asked.searches
    assert first == (23, 4) and 4 <= tied < 23 and sum(count for count, k in later if k == 8) == tied
    assert {count for count, k in later if k > 8} == {1} and all(count * k <= 40 or count == 1 for count, k in later)
    assert indices[11].tolist() == [0, 1, 2] and values[11].tolist() == [0.0] * 3
    assert indices[20:].tolist() == [[3, 50, 51]] * 3 and values[20:].tolist() == [[72.0] * 3] * 3


def test_rows_that_are_no_numbers_are_counted() -> None:
    gallery, queries = features(30, 8), features(4, 8)
    gallery[[9, 17], 2], queries[2] = torch.nan, torch.nan
    with pytest.warns(
        UserWarning, match="2 of the 30 rows of gallery hold NaN or infinity, the first is 9: FAISS"
    ) as said:
        index = build_index(gallery)
    assert said[0].filename == __file__
    with pytest.warns(
        UserWarning, match="1 of the 4 rows of folded queries holds NaN or infinity, the first is 2: FAISS"
    ):
        values, indices = search(index, queries, torch.ones(8), k=28)
    assert indices[2].tolist() == [-1] * 28 and values[2].tolist() == [-torch.inf] * 28
    assert sorted(indices[0].tolist()) == [i for i in range(30) if i not in (9, 17)]
    with pytest.raises(ValueError, match=r"gallery must be finite, for FAISS to train 'IVF2,Flat' on it: 2 of the 30"):
        build_index(gallery, "IVF2,Flat")
