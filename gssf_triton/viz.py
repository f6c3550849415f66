"""Look inside a learned metric: what it weighs, and which channels and blocks make the scores what they are.

GSSF is bilinear, so a score is exactly the sum of its channels' shares. The paper says that the learned weights
highlight the relevant channels and cross-channel relations: `relevance` measures that. Plots need matplotlib (the extra
`gssf_triton[viz]`).

Source: Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gssf_triton import checks
from gssf_triton.metric import IDENTITY, accumulate_dtype
from gssf_triton.optional import require
from gssf_triton.precision import full_precision
from gssf_triton.similarity import functional, torch_backend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Rows of the similarity matrix that a histogram holds at a time.
CHUNK_ROWS = 1024


@dataclass(frozen=True)
class ScoreParts:
    """Scores split into parts that sum to them.

    Attributes:
        diagonal: (..., D), channel m's share of the diagonal term, a_m W_diag_m b_m; 0 where there is no such term.
        crossing: (..., D), channel m of the left side's share of the block term, a_m Σ_q W_mq b_q.
        block_size: B, or 1 where there is no block term.
    """

    diagonal: Tensor
    crossing: Tensor
    block_size: int

    @property
    def channels(self) -> Tensor:
        """(..., D), each channel's share of the score."""
        return self.diagonal + self.crossing

    @property
    def blocks(self) -> Tensor:
        """(..., D/B), each block's share of the score, its channels' diagonal terms included."""
        return self.channels.unflatten(-1, (-1, self.block_size)).sum(-1)

    @property
    def score(self) -> Tensor:
        """(...), the similarity."""
        return self.channels.sum(-1)

    @property
    def effective_channels(self) -> Tensor:
        """(...), how many channels carry the score: exp of the entropy of the shares' sizes, from 1 to D."""
        share = self.channels.abs()
        share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
        return torch.special.entr(share).sum(-1).exp()


@torch.no_grad()
def score_parts(
    a: Tensor,
    b: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    normalize: bool = False,
) -> ScoreParts:
    """Split the score of each pair (a[i], b[i]) by channel and block.

    Args:
        a: (..., N, D).
        b: (..., N, D).
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block weight, (G, B, B), or None.
        normalize: As in `pairwise_sim`.

    Returns:
        The parts, in float32 at least; `parts.score` is `paired_sim`.

    Raises:
        TypeError: an argument that is not a tensor.
        ValueError: shapes, dtypes or devices that do not agree, or no weight.

    Example:
        >>> import torch
        >>> from gssf_triton.viz import score_parts
        >>> parts = score_parts(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), None, torch.ones(1, 2, 2))
        >>> parts.channels, parts.score
        (tensor([[ 7., 14.]]), tensor([21.]))
    """
    checks.check_flags(normalize=normalize)
    checks.check_pair(a, b)
    checks.check_rows(a, b)
    checks.check_weights("a", a, W_diag, W_blocks)
    checks.broadcast_batch(a=a, b=b)
    checks.check_same_dtype(a, b)
    wide = accumulate_dtype(a.dtype)
    a, b = (torch_backend.fold(x.to(wide), IDENTITY, normalize) for x in (a, b))
    nothing = torch.zeros_like(a * b)
    diagonal = nothing if W_diag is None else a * W_diag.to(wide) * b
    with full_precision(a):
        crossing = nothing if W_blocks is None else a * functional.transform(b, None, W_blocks.to(wide), side="b")
    return ScoreParts(diagonal, crossing, 1 if W_blocks is None else W_blocks.shape[-1])


def _check_batches(
    a: Tensor, b: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, normalize: bool, *, paired: bool
) -> None:
    checks.check_flags(normalize=normalize)
    checks.check_batches(a, b, paired=paired)
    checks.check_weights("a", a, W_diag, W_blocks)
    checks.check_same_dtype(a, b)


@torch.no_grad()
def relevance(
    a: Tensor,
    b: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    normalize: bool = False,
) -> ScoreParts:
    """How much each channel and block tells matches from the rest: its mean share in matches less that in other pairs.

    a[i] matches b[i]. A share is bilinear, so its mean over all N² pairs is the share of the mean vectors: only the
    matches are computed one by one.

    Args:
        a: (N, D), N of at least 2.
        b: (N, D).
        W_diag: As in `score_parts`, and so are the others.
        W_blocks: (G, B, B), or None.
        normalize: As in `pairwise_sim`.

    Returns:
        The parts, (D,); `score` is the mean similarity of the matches less that of the other pairs.

    Raises:
        TypeError: an argument that is not a tensor.
        ValueError: as in `score_parts`, or fewer than two pairs.

    Example:
        >>> import torch
        >>> from gssf_triton.viz import relevance
        >>> x = torch.tensor([[1.0, 1.0, 0.3], [-1.0, 1.0, 0.3]])  # the first channel alone tells the rows apart
        >>> relevance(x, x, torch.ones(3)).channels
        tensor([2., 0., 0.])
    """
    _check_batches(a, b, W_diag, W_blocks, normalize, paired=True)
    if a.shape[0] < 2:
        raise ValueError(f"a must have shape (N, D) with N of at least 2, got {tuple(a.shape)}")
    wide = accumulate_dtype(a.dtype)
    a, b = (torch_backend.fold(x.to(wide), IDENTITY, normalize) for x in (a, b))
    matched = score_parts(a, b, W_diag, W_blocks)
    everywhere = score_parts(a.mean(0, keepdim=True), b.mean(0, keepdim=True), W_diag, W_blocks)
    N = a.shape[0]
    # The mean over the N² − N other pairs is (N² everywhere − N matched) / (N² − N).
    diagonal, crossing = (
        (inside.mean(0) - anywhere[0]) * (N / (N - 1))
        for inside, anywhere in ((matched.diagonal, everywhere.diagonal), (matched.crossing, everywhere.crossing))
    )
    return ScoreParts(diagonal, crossing, matched.block_size)


@dataclass(frozen=True)
class SimilarityHistogram:
    """How often which similarity occurs.

    Attributes:
        edges: (bins + 1,) the bins' edges, from the smallest similarity to the largest.
        positives: (bins,) int64, pairs of equal ids.
        negatives: (bins,) int64, all other pairs.
    """

    edges: Tensor
    positives: Tensor
    negatives: Tensor


@torch.no_grad()
def similarity_histogram(
    a: Tensor,
    b: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    a_ids: Tensor | None = None,
    b_ids: Tensor | None = None,
    bins: int = 100,
    normalize: bool = False,
) -> SimilarityHistogram:
    """Count the similarities of matches and of all other pairs, a chunk of rows at a time.

    Args:
        a: (M, D).
        b: (N, D).
        W_diag: As in `pairwise_sim`, and so are W_blocks and `normalize`.
        W_blocks: (G, B, B), or None.
        a_ids: (M,) integers, and
        b_ids: (N,) integers: pairs of equal ids match. Where neither is given, a[i] matches b[i].
        bins: Bins of equal width.
        normalize: Put both sides on the unit sphere first.

    Raises:
        TypeError: an argument that is not a tensor.
        ValueError: shapes that do not agree, no rows, one of the ids without the other, or no bin.

    Example:
        >>> import torch
        >>> from gssf_triton.viz import similarity_histogram
        >>> found = similarity_histogram(torch.eye(3), torch.eye(3), torch.ones(3), bins=2)
        >>> found.positives, found.negatives
        (tensor([0, 3]), tensor([6, 0]))
    """
    _check_batches(a, b, W_diag, W_blocks, normalize, paired=False)
    if 0 in (a.shape[0], b.shape[0]):
        raise ValueError(
            f"a and b must have shapes (M, D) and (N, D) with rows, got {tuple(a.shape)}, {tuple(b.shape)}"
        )
    checks.check_count("bins", bins, 1)
    if (a_ids is None) != (b_ids is None):
        raise ValueError("a_ids and b_ids must be given together: one of them is None")
    if a_ids is None or b_ids is None:
        a_ids, b_ids = (torch.arange(x.shape[0], device=a.device) for x in (a, b))
    a_ids = checks.check_labels("a_ids", a_ids, a.shape[0], "a", a).cpu()
    b_ids = checks.check_labels("b_ids", b_ids, b.shape[0], "b", b).cpu()
    wide = accumulate_dtype(a.dtype)

    def chunk(start: int) -> Tensor:
        rows = a[start : start + CHUNK_ROWS]
        with full_precision(rows):
            return functional.pairwise_sim(rows, b, W_diag, W_blocks, normalize=normalize, out_dtype=wide)

    starts = range(0, a.shape[0], CHUNK_ROWS)
    ends = [chunk(start).aminmax() for start in starts]
    low, high = min(float(end.min) for end in ends), max(float(end.max) for end in ends)
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    counts = torch.zeros(2, bins, dtype=torch.int64)
    for start in starts:
        S = chunk(start).cpu()  # not every device has float64
        place = (
            ((S.double() - low) * (bins / max(high - low, torch.finfo(torch.float64).tiny))).long().clamp_(0, bins - 1)
        )
        match = a_ids[start : start + CHUNK_ROWS, None] == b_ids[None]
        for row, chosen in enumerate((match, ~match)):
            counts[row] += torch.bincount(place[chosen], minlength=bins)
    return SimilarityHistogram(edges, counts[0], counts[1])


def _check_made_by(name: str, value: object, kind: type) -> None:
    checks.check_kind(name, value, kind, f"a gssf_triton.viz.{kind.__name__}")


def _check_axes(ax: object) -> None:
    if ax is not None:
        checks.check_kind("ax", ax, require("matplotlib.axes", "viz").Axes, "a matplotlib.axes.Axes or None")


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    new: Axes = require("matplotlib.pyplot", "viz").subplots(layout="constrained")[1]
    return new


@torch.no_grad()
def plot_metric(W_diag: Tensor | None = None, W_blocks: Tensor | None = None, *, ax: Axes | None = None) -> Axes:
    """W ⊙ U as a heat map: zero is white, entries outside the topology are grey.

    Args:
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block weight, (G, B, B), or None.
        ax: Where to draw; a new figure where None.

    Returns:
        The axes.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import torch
        >>> from gssf_triton.viz import plot_metric
        >>> plot_metric(torch.ones(8), torch.randn(2, 4, 4)).get_xlabel()
        'channel of b'
    """
    _check_axes(ax)
    metric = functional.dense_metric(W_diag, W_blocks).float().cpu()
    D = metric.shape[0]
    size = 1 if W_blocks is None else W_blocks.shape[-1]
    group = torch.arange(D) // size
    shown = metric.masked_fill(group[:, None] != group[None], float("nan"))
    limit = float(metric.abs().max()) or 1.0
    ax = _axes(ax)
    ax.set_facecolor("0.9")
    image = ax.imshow(shown.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="weight")
    ax.set(xlabel="channel of b", ylabel="channel of a", title=f"W ⊙ U, {D} channels, blocks of {size}")
    return ax


def plot_parts(parts: ScoreParts, *, ax: Axes | None = None) -> Axes:
    """One score or one relevance by channel: the shares of the diagonal and of the blocks, and each block's sum.

    Args:
        parts: Of one pair, (D,): `relevance`'s, or one row of `score_parts`.
        ax: Where to draw; a new figure where None.

    Raises:
        ValueError: parts of several pairs.
    """
    _check_made_by("parts", parts, ScoreParts)
    _check_axes(ax)
    if parts.channels.dim() != 1:
        raise ValueError(f"parts must be of one pair, (D,), got shape {tuple(parts.channels.shape)}")
    ax = _axes(ax)
    place = torch.arange(len(parts.channels)).numpy()
    diagonal, crossing, blocks = (x.cpu().numpy() for x in (parts.diagonal, parts.crossing, parts.blocks))
    ax.bar(place - 0.2, diagonal, width=0.4, label="diagonal")
    ax.bar(place + 0.2, crossing, width=0.4, label="block")
    if parts.block_size > 1:
        edges = torch.arange(len(blocks) + 1).numpy() * parts.block_size - 0.5
        ax.stairs(blocks, edges, color="0.3", label="sum of the block")
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set(xlabel="channel", ylabel="part of the score", title=f"score {float(parts.score):.4g}")
    ax.legend()
    return ax


def plot_similarities(histogram: SimilarityHistogram, *, ax: Axes | None = None) -> Axes:
    """The similarities of matches and of other pairs, each as a density.

    Args:
        histogram: From `similarity_histogram`.
        ax: Where to draw; a new figure where None.
    """
    _check_made_by("histogram", histogram, SimilarityHistogram)
    _check_axes(ax)
    ax = _axes(ax)
    edges = histogram.edges.numpy()
    for label, counts in (("matches", histogram.positives), ("other pairs", histogram.negatives)):
        total = int(counts.sum())
        density = counts.double().numpy() / max(total, 1) / max(edges[1] - edges[0], 1e-300)
        ax.stairs(density, edges, fill=True, alpha=0.5, label=f"{label} ({total:,})")
    ax.set(xlabel="similarity", ylabel="density")
    ax.legend()
    return ax
