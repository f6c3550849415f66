"""topk and ranks against a sort in Python: ties, exclusions, NaN, every cut of the work, every shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.retrieval_reference as naive
import torch
from support.reference import Largest, assert_close, features, tolerance, weights
from support.retrieval_reference import coarse, coarse_weights
from torch import Tensor

import gssf_triton
from gssf_triton.kernels import retrieval_configs
from gssf_triton.retrieval import scan


@pytest.fixture(params=["whole", "chunks"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything in one chunk, or in many, none of them even."""
    if request.param == "chunks":
        chunks = retrieval_configs.StreamChunks(rows=16, columns=64, block_rows=64)
        monkeypatch.setattr(retrieval_configs, "stream_chunks", lambda *shape: chunks)
    return str(request.param)


def problem(Q: int, N: int, kind: str, device: str, special: float | None = None) -> dict[str, Any]:
    """Queries and a gallery over 12 channels; some gallery rows are `special` throughout."""
    gallery = coarse(N, 12, device=device)
    if special is not None:
        gallery[torch.rand(N, device=device) < 0.1] = special
    return {"queries": coarse(Q, 12, device=device), "gallery": gallery, **coarse_weights(kind, 3, 4, device)}


def exclusions(Q: int, N: int, device: str, share: float) -> dict[str, Tensor]:
    return {
        "mask": (torch.rand(Q, N) < share).to(device),
        "exclude": torch.randint(-1, N, (Q,)).to(device),
    }


def expected_topk(call: dict[str, Any], k: int, excluded: dict[str, Tensor]) -> tuple[list[list[float]], Any]:
    S = naive.scores_of(**call).tolist()
    lists = {name: x.tolist() for name, x in excluded.items()}
    indices = []
    for i, row in enumerate(S):
        found = naive.order(row, naive.kept(i, len(row), **lists))
        indices.append((found + [-1] * k)[:k])
    values = [[S[i][j] if j >= 0 else -float("inf") for j in found] for i, found in enumerate(indices)]
    return values, indices


#: Every shape with both terms, and each term alone once: the kernels see rows that are folded already.
PROBLEMS = [(1, 1, "diag+blocks"), (1, 33, "diag+blocks"), (5, 1, "diag+blocks"), (9, 31, "diag"), (9, 31, "blocks"),
            (9, 31, "diag+blocks"), (35, 131, "diag+blocks")]  # fmt: skip
problems = pytest.mark.parametrize(("Q", "N", "kind"), PROBLEMS, ids=str)
#: Every share with every special value, in one chunk and in many by turns.
EXCLUSIONS = [
    pytest.param(share, special, ("whole", "chunks")[(row + column) % 2], id=f"{share:.0%}-kept-{special}")
    for row, share in enumerate((0.02, 0.5, 0.98))
    for column, special in enumerate((None, float("nan"), float("inf"), -float("inf"), 0.0))
]
excluding = pytest.mark.parametrize(("share", "special", "cut"), EXCLUSIONS, indirect=["cut"])


@problems
def test_topk_is_a_sort(Q: int, N: int, kind: str, cut: str, backend: str, device: str) -> None:
    call = problem(Q, N, kind, device)
    for k in sorted({1, min(N, 10), N}):
        values, indices = gssf_triton.topk(**call, k=k, backend=backend)
        expected_values, expected = expected_topk(call, k, {})
        assert indices.tolist() == expected
        assert values.tolist() == expected_values


@excluding
def test_topk_with_exclusions(share: float, special: float | None, cut: str, backend: str, device: str) -> None:
    Q, N = 20, 100
    call, excluded = problem(Q, N, "diag+blocks", device, special), exclusions(Q, N, device, share)
    for k in (1, 6, N):
        values, indices = gssf_triton.topk(**call, **excluded, k=k, backend=backend)
        expected_values, expected = expected_topk(call, k, excluded)
        assert indices.tolist() == expected
        torch.testing.assert_close(values.double().cpu(), torch.tensor(expected_values).double(), equal_nan=True)


def test_one_score_for_all_goes_by_index(cut: str, backend: str, device: str) -> None:
    """The worst case for ties: every score is equal, at the boundary of every list."""
    call = {"queries": torch.zeros(9, 4, device=device), "gallery": features(200, 4, device=device)}
    for k in (1, 17, 200):
        values, indices = gssf_triton.topk(**call, W_diag=torch.ones(4, device=device), k=k, backend=backend)
        assert indices.equal(torch.arange(k, device=device).expand(9, k))
        assert not values.any()


@pytest.mark.parametrize("where", ["tensor", "array"])
def test_copies_of_an_item_go_by_index(where: str, cut: str, device: str) -> None:
    """Equal rows have equal scores wherever they lie, in full chunks and in the last one, which holds four.

    A library's product promises that only for equal shapes. (The interpreter's products are NumPy's, tile by tile, and
    keep no such promise: a kernel's columns are equal by the instruction, on a GPU.)
    """
    rows = features(33, 40, device=device).repeat(4, 1)
    gallery = rows if where == "tensor" else rows.cpu().numpy()
    call = {"queries": features(9, 40, device=device), "gallery": gallery}
    values, indices = gssf_triton.topk(
        **call, **weights("diag+blocks", 5, 8, device=device), normalize=True, k=132, backend="torch"
    )
    scores = torch.zeros_like(values).scatter_(1, indices, values).view(9, 4, 33)
    assert (scores == scores[:, :1]).all()
    later = values[:, 1:] == values[:, :-1]
    assert (indices.diff(dim=1)[later] > 0).all(), "equal scores lie in the order of their indices"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("normalize", "cut"),
    [(False, "whole"), (True, "chunks")],
    indirect=["cut"],
    ids=["as-is-whole", "normalize-chunks"],
)
def test_topk_of_real_numbers(dtype: torch.dtype, normalize: bool, cut: str, backend: str, device: str) -> None:
    queries, gallery = features(23, 40, dtype=dtype, device=device), features(131, 40, dtype=dtype, device=device)
    gallery *= torch.rand(131, 1).to(gallery) * 3
    metric = weights("diag+blocks", 5, 8, device=device)
    S = naive.scores_of(queries, gallery, **metric, normalize=normalize)
    for k in (7, 100):
        values, indices = gssf_triton.topk(queries, gallery, **metric, normalize=normalize, k=k, backend=backend)
        assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert indices.dtype == torch.int64
        assert_close(values, S.gather(1, indices), tolerance(dtype, torch.float32), name="scores of the indices")
        assert_close(values, S.topk(k).values, tolerance(dtype, torch.float32), name="the k best scores")
        assert all(len(set(row)) == k for row in indices.tolist())


def ids(Q: int, N: int, device: str) -> dict[str, Tensor]:
    names = {"query_ids": (6, Q), "gallery_ids": (40, N), "query_cams": (2, Q), "gallery_cams": (2, N)}
    labels = {name: torch.randint(0, most, (count,)).to(device) for name, (most, count) in names.items()}
    labels["query_ids"][:1] = 99  # nobody's
    return labels


def expected_ranks(call: dict[str, Any], labels: dict[str, Tensor], excluded: dict[str, Tensor]) -> list[int]:
    S = naive.scores_of(**call).tolist()
    lists = {name: x.tolist() for name, x in (labels | excluded).items()}
    cameras = None
    if "query_cams" in lists:

        def cameras(i: int, j: int) -> bool:
            same_id = lists["query_ids"][i] == lists["gallery_ids"][j]
            return same_id and lists["query_cams"][i] == lists["gallery_cams"][j]

    N = len(lists["gallery_ids"])
    keep = [naive.kept(i, N, lists.get("exclude"), lists.get("mask"), cameras) for i in range(len(S))]
    places = naive.match_places(S, lists["query_ids"], lists["gallery_ids"], keep)
    return [found[0] if found else -1 for found in places]


@problems
def test_ranks_are_places_in_a_sort(Q: int, N: int, kind: str, cut: str, backend: str, device: str) -> None:
    call = problem(Q, N, kind, device)
    labels = {name: x for name, x in ids(Q, N, device).items() if name.endswith("ids")}
    found = gssf_triton.ranks(**call, **labels, backend=backend)
    assert found.dtype == torch.int64
    assert found.tolist() == expected_ranks(call, labels, {})


@excluding
def test_ranks_with_exclusions(share: float, special: float | None, cut: str, backend: str, device: str) -> None:
    Q, N = 20, 100
    call, excluded = problem(Q, N, "diag+blocks", device, special), exclusions(Q, N, device, share)
    labels = ids(Q, N, device)
    found = gssf_triton.ranks(**call, **labels, **excluded, backend=backend)
    assert found.tolist() == expected_ranks(call, labels, excluded)
    assert (found == -1).any(), "the case has unmatched queries"


@pytest.mark.parametrize("cut", ["chunks"], indirect=True)
def test_integers_of_any_width(cut: str, backend: str, device: str) -> None:
    """Labels and places come as they are stored, also where the gallery has more items than they can count."""
    call, labels = problem(9, 200, "diag", device), ids(9, 200, device)
    exclude = torch.randint(-1, 100, (9,), device=device)

    def found(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        options = {**call, "exclude": exclude.to(dtype), "backend": backend}
        narrow = {name: x.to(dtype) for name, x in labels.items()}
        return (*gssf_triton.topk(**options, k=20), gssf_triton.ranks(**options, **narrow))

    expected = found(torch.int64)
    for dtype in (torch.int32, torch.int16, torch.int8):
        for ours, theirs in zip(found(dtype), expected, strict=True):
            assert ours.dtype == theirs.dtype and ours.equal(theirs), dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ranks_agree_with_topk(dtype: torch.dtype, cut: str, backend: str, device: str) -> None:
    """On real numbers, to the last bit: the rank is where `topk`, asked for everything, has the first match."""
    Q, N = 20, 60  # as many as the kernel's list is long
    tensors = {"queries": features(Q, 40, dtype=dtype, device=device), "gallery": features(N, 40, device=device)}
    tensors["gallery"] = tensors["gallery"].to(dtype)
    tensors |= weights("diag+blocks", 5, 8, device=device)
    labels = {name: x for name, x in ids(Q, N, device).items() if name.endswith("ids")}
    labels["gallery_ids"] %= 9
    _, indices = gssf_triton.topk(**tensors, normalize=True, k=N, backend=backend)
    match = labels["gallery_ids"][indices] == labels["query_ids"][:, None]
    expected = torch.where(match.any(1), match.int().argmax(1), -1)
    assert gssf_triton.ranks(**tensors, **labels, normalize=True, backend=backend).equal(expected)


def test_an_item_is_often_not_its_own_best_match(backend: str, device: str) -> None:
    """Under a metric that is not positive, dropping the first column would drop another item."""
    x = features(50, 12, device=device)
    W_diag = -torch.ones(12, device=device)
    itself = torch.arange(50, device=device)
    _, first = gssf_triton.topk(x, x, W_diag, k=1, backend=backend)
    assert (first[:, 0] != itself).any()
    _, others = gssf_triton.topk(x, x, W_diag, k=49, exclude=itself, backend=backend)
    assert (others.sort(1).values + (others.sort(1).values >= 0)).shape == (50, 49)
    assert not (others == itself[:, None]).any()
    assert all(len({*row, i}) == 50 for i, row in enumerate(others.tolist()))


# ---------------------------------------------------------------- galleries on disk


@pytest.mark.parametrize(
    ("dtype", "cut"),
    [(np.float32, "whole"), (np.float16, "chunks"), (np.float32, "chunks"), (np.float64, "chunks")],
    indirect=["cut"],
    ids=lambda value: value if isinstance(value, str) else np.dtype(value).name,
)
def test_a_memory_mapped_gallery(dtype: Any, cut: str, backend: str, device: str, tmp_path: Path) -> None:
    """The same bits as from memory; the file is opened read-only and read in blocks."""
    gallery = features(131, 12).numpy().astype(dtype)
    np.save(tmp_path / "gallery.npy", gallery)
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    resident = torch.from_numpy(gallery).to(device)
    queries = features(9, 12, dtype=resident.dtype, device=device)
    metric = weights("diag+blocks", 3, 4, device=device)
    excluded = exclusions(9, 131, device, 0.7)
    options = {**metric, **excluded, "normalize": True, "backend": backend}
    for k in (5, 100):
        for ours, expected in zip(
            gssf_triton.topk(queries, mapped, **options, k=k),
            gssf_triton.topk(queries, resident, **options, k=k),
            strict=True,
        ):
            assert torch.equal(ours, expected)
    labels = ids(9, 131, device)
    assert gssf_triton.ranks(queries, mapped, **options, **labels).equal(
        gssf_triton.ranks(queries, resident, **options, **labels)
    )


def test_an_array_of_any_strides(backend: str, device: str) -> None:
    array = features(40, 24).numpy()[::-2, ::2]
    queries, W_diag = features(3, 12, device=device), torch.ones(12, device=device)
    _, indices = gssf_triton.topk(queries, array, W_diag, k=5, backend=backend)
    _, expected = gssf_triton.topk(queries, torch.from_numpy(array.copy()).to(device), W_diag, k=5, backend=backend)
    assert indices.equal(expected)


# ---------------------------------------------------------------- promises


def test_the_score_matrix_is_never_held(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Q, N = 64, 640
    chunks = retrieval_configs.StreamChunks(rows=32, columns=64, block_rows=128)
    monkeypatch.setattr(retrieval_configs, "stream_chunks", lambda *shape: chunks)
    call = {"queries": features(Q, 8, device=device), "gallery": features(N, 8, device=device)}
    metric = weights("diag", 1, 8, device=device)
    for k in (3, 70):
        with Largest() as largest:
            gssf_triton.topk(**call, **metric, k=k, normalize=True, backend=backend)
        assert largest.bytes < Q * N * 4 // 3
    labels = {name: x for name, x in ids(Q, N, device).items() if name.endswith("ids")}
    with Largest() as largest:
        gssf_triton.ranks(**call, **metric, **labels, normalize=True, backend=backend)
    assert largest.bytes < Q * N * 4 // 3


def test_a_bar_counts_every_pair(cut: str, backend: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And changes nothing else; one pass for topk, two for ranks."""
    call = problem(20, 150, "diag", device)
    labels = {name: x for name, x in ids(20, 150, device).items() if name.endswith("ids")}
    quiet = gssf_triton.topk(**call, k=5, backend=backend), gssf_triton.ranks(**call, **labels, backend=backend)
    assert capsys.readouterr().err == ""
    _, indices = gssf_triton.topk(**call, k=5, progress=True, backend=backend)
    assert "topk: 100%" in (bar := capsys.readouterr().err) and "3.00k/3.00k" in bar
    found = gssf_triton.ranks(**call, **labels, progress=True, backend=backend)
    assert "ranks: 100%" in (bar := capsys.readouterr().err) and "6.00k/6.00k" in bar
    assert indices.equal(quiet[0][1]) and found.equal(quiet[1])


def test_same_call_same_bits(cut: str, backend: str, device: str) -> None:
    call = {"queries": features(33, 24, device=device), "gallery": features(100, 24, device=device)}
    call |= weights("diag+blocks", 3, 8, device=device)
    labels = ids(33, 100, device)
    first = (*gssf_triton.topk(**call, k=9, normalize=True, backend=backend),)
    first += (gssf_triton.ranks(**call, **labels, normalize=True, backend=backend),)
    again = (*gssf_triton.topk(**call, k=9, normalize=True, backend=backend),)
    again += (gssf_triton.ranks(**call, **labels, normalize=True, backend=backend),)
    assert all(torch.equal(now, before) for now, before in zip(again, first, strict=True))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_strides(layout: str, cut: str, backend: str, device: str) -> None:
    queries, gallery = coarse(11, 12, device=device), coarse(90, 12, device=device)
    change = {
        "transposed": lambda x: x.mT.contiguous().mT,
        "strided": lambda x: torch.stack((x, x), dim=2).flatten(1)[:, ::2],
        "expanded": lambda x: x[:1].expand(x.shape),
    }[layout]
    metric = coarse_weights("diag+blocks", 3, 4, device)
    mask = (torch.rand(90, 11) < 0.7).to(device).mT
    labels = {name: torch.stack((x, x), dim=1)[:, 0] for name, x in ids(11, 90, device).items()}
    call = {"queries": change(queries), "gallery": change(gallery), **metric}
    plain = {name: x.contiguous() for name, x in call.items()}
    for ours, expected in zip(
        gssf_triton.topk(**call, mask=mask, k=8, backend=backend),
        gssf_triton.topk(**plain, mask=mask.contiguous(), k=8, backend=backend),
        strict=True,
    ):
        assert torch.equal(ours, expected)
    assert gssf_triton.ranks(**call, **labels, mask=mask, backend=backend).equal(
        gssf_triton.ranks(
            **plain, **{name: x.contiguous() for name, x in labels.items()}, mask=mask.contiguous(), backend=backend
        )
    )


@pytest.mark.parametrize(("Q", "N", "k"), [(0, 5, 3), (4, 0, 0), (0, 0, 0), (4, 5, 0)])
def test_empty(Q: int, N: int, k: int, backend: str, device: str) -> None:
    call = {"queries": features(Q, 8, device=device), "gallery": features(N, 8, device=device)}
    call["W_diag"] = torch.ones(8, device=device)
    values, indices = gssf_triton.topk(**call, k=k, backend=backend)
    assert values.shape == indices.shape == (Q, k)
    labels = {name: x for name, x in ids(Q, N, device).items() if name.endswith("ids")}
    found = gssf_triton.ranks(**call, **labels, backend=backend)
    assert found.shape == (Q,)
    if N == 0:
        assert (found == -1).all()
    assert gssf_triton.topk(call["queries"], np.zeros((N, 8), np.float32), call["W_diag"], k=k)[1].shape == (Q, k)


def test_no_channels(backend: str, device: str) -> None:
    """Every score is 0."""
    none = torch.ones(0, device=device)
    _, indices = gssf_triton.topk(torch.ones(2, 0), torch.ones(5, 0), none, k=3, backend=backend)
    assert indices.tolist() == [[0, 1, 2]] * 2


def test_nothing_is_differentiated_and_nothing_changed(backend: str, device: str) -> None:
    call = {"queries": features(5, 8, device=device), "gallery": features(9, 8, device=device)}
    call |= weights("diag+blocks", 2, 4, device=device)
    call = {name: x.requires_grad_() for name, x in call.items()}
    excluded = exclusions(5, 9, device, 0.5)
    labels = ids(5, 9, device)
    kept = {name: x.detach().clone() for name, x in (call | excluded | labels).items()}
    values, indices = gssf_triton.topk(**call, **excluded, k=3, normalize=True, backend=backend)
    found = gssf_triton.ranks(**call, **excluded, **labels, normalize=True, backend=backend)
    assert not values.requires_grad and not indices.requires_grad and not found.requires_grad
    for name, x in (call | excluded | labels).items():
        assert torch.equal(x.detach(), kept[name]), name


@pytest.mark.parametrize("special", [None, float("nan"), float("inf"), -float("inf"), 0.0], ids=str)
@pytest.mark.parametrize("k", [10, scan.LONG + 8])
def test_the_filter_and_the_full_merge_agree(k: int, special: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way through a chunk is taken where it should be, and finds what the slow one does."""
    monkeypatch.setattr(
        retrieval_configs, "stream_chunks", lambda *shape: retrieval_configs.StreamChunks(16, 1024, 1024)
    )
    call = {"queries": features(40, 8), "gallery": features(20_000, 8), "W_diag": torch.ones(8)}
    if special is not None:
        call["gallery"][torch.rand(20_000) < 1e-3] = special
    call["mask"] = torch.rand(40, 20_000) < 0.9
    taken = []
    better = scan._add_better
    monkeypatch.setattr(scan, "_add_better", lambda *args: taken.append(better(*args)) or taken[-1])
    fast = gssf_triton.topk(**call, k=k)
    assert sum(taken) > len(taken) / 2
    monkeypatch.setattr(scan, "_add_better", lambda *args: False)
    slow = gssf_triton.topk(**call, k=k)
    assert fast[1].equal(slow[1])
    torch.testing.assert_close(fast[0], slow[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("count", [0, 3], ids=["no query", "queries"])
def test_half_precision_galleries_under_the_other_ones_autocast(count: int, backend: str, device: str) -> None:
    """Norms of fewer rows than are summed together are taken outside autocast."""
    queries, gallery = (torch.randn(n, 12, device=device, dtype=torch.bfloat16) for n in (count, 5))
    W_diag, ids = torch.ones(12, device=device), torch.arange(5, device=device)
    call = {"query_ids": ids[:count], "gallery_ids": ids, "normalize": True, "backend": backend}
    plain = gssf_triton.ranks(queries, gallery, W_diag, **call)
    with torch.autocast(device, torch.float16):
        assert torch.equal(gssf_triton.ranks(queries, gallery, W_diag, **call), plain)
