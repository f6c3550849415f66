"""What viz shows is what the metric does: parts sum to scores, means and counts are those of all pairs."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from support import reference
from support.reference import assert_close, features, tolerance, weights

import gssf_triton
from gssf_triton import viz

matplotlib.use("Agg")

G, B = 3, 4
D = G * B
KINDS = pytest.mark.parametrize("kind", ["diag", "blocks", "diag+blocks"])
NORMALIZE = pytest.mark.parametrize("normalize", [False, True], ids=["as-is", "normalize"])


def share(a: torch.Tensor, b: torch.Tensor, metric: dict[str, torch.Tensor | None]) -> torch.Tensor:
    """(M, N, D): channel m's share of s(a[i], b[j]), from the dense metric."""
    dense = reference.dense_metric(*(None if w is None else w.double() for w in metric.values()))
    return torch.einsum("im,mn,jn->ijm", a.double(), dense, b.double())


def unit(x: torch.Tensor, normalize: bool) -> torch.Tensor:
    return torch.nn.functional.normalize(x.double(), dim=-1) if normalize else x.double()


@KINDS
@NORMALIZE
def test_parts_sum_to_the_score(kind: str, normalize: bool, device: str) -> None:
    a, b, metric = features(7, D, device=device), features(7, D, device=device), weights(kind, G, B, device=device)
    parts = viz.score_parts(a, b, **metric, normalize=normalize)
    expected = share(unit(a, normalize), unit(b, normalize), metric).diagonal().T
    assert_close(parts.channels, expected, tolerance(torch.float32))
    assert_close(parts.score, gssf_triton.paired_sim(a, b, **metric, normalize=normalize).double(), 1e-5)
    size = B if "blocks" in kind else 1
    assert_close(parts.blocks, expected.unflatten(-1, (-1, size)).sum(-1), 10 * tolerance(torch.float32))
    if "diag" not in kind:
        assert not parts.diagonal.any()
    if "blocks" not in kind:
        assert not parts.crossing.any()


@KINDS
@NORMALIZE
def test_relevance_is_matches_less_the_rest(kind: str, normalize: bool, device: str) -> None:
    a, metric = features(9, D, device=device), weights(kind, G, B, device=device)
    b = a + 0.5 * features(9, D, device=device)
    shares = share(unit(a, normalize), unit(b, normalize), metric)
    match = torch.eye(9, dtype=torch.bool, device=device)
    found = viz.relevance(a, b, **metric, normalize=normalize)
    assert_close(found.channels, shares[match].mean(0) - shares[~match].mean(0), 1e-5)


def test_effective_channels() -> None:
    assert viz.score_parts(
        torch.ones(1, 8), torch.ones(1, 8), torch.ones(8)
    ).effective_channels.item() == pytest.approx(8)
    one = torch.zeros(1, 8)
    one[0, 3] = 2.0
    assert viz.score_parts(one, one, torch.ones(8)).effective_channels.item() == pytest.approx(1)
    assert viz.score_parts(0 * one, one, torch.ones(8)).effective_channels.item() == pytest.approx(1)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_histogram_counts_every_pair(chunk: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(viz, "CHUNK_ROWS", chunk)
    a, b, metric = (
        features(11, D, device=device),
        features(13, D, device=device),
        weights("diag+blocks", G, B, device=device),
    )
    a_ids, b_ids = (torch.randint(0, 4, (n,), device=device) for n in (11, 13))
    found = viz.similarity_histogram(a, b, **metric, a_ids=a_ids, b_ids=b_ids, bins=7)
    S, match = gssf_triton.pairwise_sim(a, b, **metric).cpu().numpy(), (a_ids[:, None] == b_ids).cpu().numpy()
    assert found.edges[0] == pytest.approx(S.min()) and found.edges[-1] == pytest.approx(S.max())
    for counts, values in ((found.positives, S[match]), (found.negatives, S[~match])):
        # One row at a time, or all: a similarity at an edge may round to either side of it, and numpy drops what is
        # below the first edge or above the last.
        edges = found.edges.numpy()
        expected, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
        assert np.abs(np.cumsum(counts.numpy() - expected)).max() <= 1
        assert counts.sum() == values.size


def test_histogram_without_ids_and_of_one_value() -> None:
    found = viz.similarity_histogram(torch.ones(3, 2), torch.ones(4, 2), torch.ones(2), bins=3)
    assert found.positives.sum() == 3 and found.negatives.sum() == 9


def test_heat_map_shows_the_topology() -> None:
    W_diag, W_blocks = torch.arange(1.0, D + 1), -torch.ones(G, B, B)
    ax = viz.plot_metric(W_diag, W_blocks)
    shown = np.ma.filled(ax.images[0].get_array(), np.nan)
    dense = reference.dense_metric(W_diag, W_blocks).numpy()
    inside = np.kron(np.eye(G), np.ones((B, B))) > 0
    assert np.array_equal(shown[inside], dense[inside]) and np.isnan(shown[~inside]).all()
    assert ax.images[0].get_clim() == (-11.0, 11.0)
    same = viz.plot_metric(W_diag, ax=matplotlib.pyplot.figure().add_subplot())
    assert np.ma.getmaskarray(same.images[0].get_array())[0, 1]
    matplotlib.pyplot.close("all")


def test_bars_and_histograms() -> None:
    a, metric = features(5, D), weights("diag+blocks", G, B)
    parts = viz.relevance(a, a, **metric)
    ax = viz.plot_parts(parts)
    bars = [bar.get_height() for bar in ax.patches[: 2 * D]]
    assert np.allclose(bars, torch.cat([parts.diagonal, parts.crossing]))
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"diagonal", "block", "sum of the block"}
    with pytest.raises(ValueError, match=r"\(5, 12\)"):
        viz.plot_parts(viz.score_parts(a, a, **metric))
    histogram = viz.similarity_histogram(a, a, **metric, bins=8)
    ax = viz.plot_similarities(histogram)
    for patch in ax.patches:
        values, edges, _ = patch.get_data()
        assert (values * np.diff(edges)).sum() == pytest.approx(1)
    matplotlib.pyplot.close("all")


def test_numbers_need_no_matplotlib() -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch; from gssf_triton import viz\n"
        "assert viz.score_parts(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2)).score == 2\n"
        "try:\n    viz.plot_metric(torch.ones(2))\n"
        "except ModuleNotFoundError as error:\n    assert 'gssf_triton[viz]' in str(error), error\n"
        "else:\n    raise AssertionError\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
