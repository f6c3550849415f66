"""Scores of images and captions region by word: late interaction, and text-to-image attention."""

from __future__ import annotations

import torch
from torch import Tensor

from gssf_triton import checks
from gssf_triton.backend import resolve_backend
from gssf_triton.kernels.configs import CROSS_ATTENTION_REGIONS, CROSS_ATTENTION_WORDS, cross_attention_fits
from gssf_triton.metric import IDENTITY, Metric
from gssf_triton.precision import full_precision, joined, moved_unit, product_dtype
from gssf_triton.region_word.ops import CrossAttention, LateInteraction, Options
from gssf_triton.region_word.pairs import POOLINGS
from gssf_triton.similarity.functional import fold_rows
from gssf_triton.similarity.torch_backend import folds_left


def _checked(
    regions: Tensor,
    words: Tensor,
    metric: Metric,
    region_mask: Tensor | None,
    word_mask: Tensor | None,
    normalize: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The features, of one dtype, and the masks as booleans."""
    checks.check_regions_and_words(regions, words)
    checks.check_weights("regions", regions, metric.W_diag, metric.W_blocks)
    region_mask = checks.check_row_mask("region_mask", region_mask, "regions", regions)
    word_mask = checks.check_row_mask("word_mask", word_mask, "words", words)
    checks.check_flags(normalize=normalize)
    checks.check_dtype("out_dtype", out_dtype)
    regions, words = joined(regions, words)
    checks.check_same_dtype(regions, words, ("regions", "words"))
    return regions, words, region_mask, word_mask


def _folded(x: Tensor, mask: Tensor | None, metric: Metric, normalize: bool, backend: str) -> Tensor:
    """T(x) in float32 at least: rounded to half precision it would change which region is a word's best.

    For the backward pass padding is zeroed first: a NaN in it, times its gradient of 0, would reach the weights'.
    """
    if mask is not None and torch.is_grad_enabled():
        x = x.masked_fill(mask.logical_not()[..., None], 0)
    return fold_rows(x, metric, normalize, backend=backend)


def late_interaction(
    regions: Tensor,
    words: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    region_mask: Tensor | None = None,
    word_mask: Tensor | None = None,
    pooling: str = "max-mean",
    sharpness: float = 1.0,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Score of every image with every caption, each word meeting its best region.

    $$score_{it} = \frac{1}{|L_t|} \sum_{l \in L_t} \max_{r \in R_i} s(x_{ir}, y_{tl})$$

    The (I, T, R, L) similarities are never held, in forward or in backward, which makes them again: memory grows with
    the features and with the (I, T) scores. A mask is any pattern of booleans; padding does not take part, whatever it
    holds, and whole tiles of it cost nothing.

    Args:
        regions: Images, (I, R, D), float16, bfloat16, float32 or float64; any strides.
        words: Captions, (T, L, D), of the regions' dtype and device.
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D, or None. One of the two weights at least is given.
        region_mask: True (or not 0) where a region is valid, (I, R); all are where None.
        word_mask: True (or not 0) where a word is valid, (T, L); all are where None.
        pooling: "max-mean": the best region, then the mean over the words. "lse-mean": log-sum-exp over the regions,
            log Σ_r exp(sharpness · s) / sharpness, then the mean. "max-sum": the best region, summed over the words,
            ColBERT's MaxSim.
        sharpness: Of "lse-mean": the larger, the closer to the maximum (SCAN takes 6). The other poolings ignore it.
        normalize: Put all rows on the unit sphere first, x / max(‖x‖₂, 1e-12).
        out_dtype: Dtype of the scores; the features' where None, autocast's under torch.autocast.
        backend: "auto" (Triton where it compiles for the tensors' GPU, else torch), "triton" or "torch".

    Returns:
        Scores, (I, T). An image with no valid region, or a caption with no valid word, scores 0 with everything.
        Differentiable once in all four tensors; of equal regions the lowest gets a word's gradient.

    Raises:
        TypeError: an argument that is not a tensor, or a sharpness that is not a number.
        ValueError: shapes, dtypes or devices that do not agree, no weight, an unknown pooling.
        RuntimeError: `backend="triton"` where Triton cannot run.

    Source:
        Khattab and Zaharia, ColBERT, SIGIR 2020 (arXiv 2004.12832), eq. 3; log-sum-exp after Lee et al., SCAN,
        ECCV 2018 (arXiv 1803.08024); the similarity is GSSF's (arXiv 2410.15266).

    Example:
        >>> import torch, gssf_triton
        >>> regions = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> words = torch.tensor([[[3.0, 1.0], [0.0, 2.0]]])
        >>> gssf_triton.late_interaction(regions, words, torch.ones(2))  # (max(3, 1) + max(0, 2)) / 2
        tensor([[2.5000]])
        >>> second_only = torch.tensor([[False, True]])
        >>> gssf_triton.late_interaction(regions, words, torch.ones(2), region_mask=second_only, pooling="max-sum")
        tensor([[3.]])
    """
    checks.check_choice("pooling", pooling, POOLINGS)
    checks.check_positive("sharpness", sharpness)
    metric = Metric(W_diag, W_blocks)
    regions, words, region_mask, word_mask = _checked(
        regions, words, metric, region_mask, word_mask, normalize, out_dtype
    )
    dtype, backend = product_dtype(regions), resolve_backend(backend, regions, W_blocks)
    fold_words = not folds_left(regions, words)
    with full_precision(regions):
        if fold_words:
            t, y, y_mask = _folded(words, word_mask, metric.mT, normalize, backend), regions, region_mask
        else:
            t, y, y_mask = _folded(regions, region_mask, metric, normalize, backend), words, word_mask
        if backend == "triton" and dtype.itemsize == 2 and t.dtype == y.dtype == torch.float32:
            # Under autocast the kernel multiplies both sides in autocast's dtype.
            y, normalize = _folded(y, y_mask, IDENTITY, normalize, backend), False
            if dtype == torch.float16:
                unit = moved_unit(t, y)
                t, y = t / unit, y * unit
            y = y.to(dtype)
        regions, words = (y, t) if fold_words else (t, y)
        options = Options(normalize and fold_words, normalize and not fold_words, pooling, float(sharpness), backend)
        (scores,) = LateInteraction(options)(regions, words, None, region_mask, word_mask)
    return scores.to(out_dtype or dtype)


def _cross_attention_backend(backend: str, regions: Tensor, words: Tensor, W_blocks: Tensor | None) -> str:
    """The backend; images or captions of more rows than the kernel's registers hold are torch's."""
    resolved = resolve_backend(backend, regions, W_blocks)
    if resolved == "torch" or cross_attention_fits(regions.shape[1], words.shape[1]):
        return resolved
    if backend == "triton":
        raise ValueError(
            f"regions {checks.shape_of(regions)} and words {checks.shape_of(words)} have too many rows an item for "
            f'backend="triton": up to {CROSS_ATTENTION_REGIONS} regions and {CROSS_ATTENTION_WORDS} words; use '
            'backend="torch" or "auto"'
        )
    return "torch"


def cross_attention_sim(
    regions: Tensor,
    words: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    region_mask: Tensor | None = None,
    word_mask: Tensor | None = None,
    smooth: float = 9.0,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Score of every image with every caption, each word meeting the region it attends to: SCAN, text to image.

    With x the regions and y the words of a pair, all on the unit sphere,

    $$e_{rl} = LeakyReLU_{0.1}(x_r \cdot y_l), \quad
      \bar e_{rl} = \frac{e_{rl}}{\sqrt{\sum_l e_{rl}^2} + 10^{-8}}, \quad
      \alpha_{rl} = softmax_r(smooth \cdot \bar e_{rl}), \quad c_l = \frac{\sum_r \alpha_{rl} x_r}{\|\cdot\|_2}$$

    and the score is the mean of s(c_l, y_l) over the words. Neither (I, T, R, L) arrays nor the attended vectors c are
    held, in forward or in backward. Padding takes part in none of the sums, whatever it holds. SCAN's image-to-text
    attention is the same with the sides swapped: words and their mask given as regions, regions as words, W_blocks.mT;
    the scores then are (T, I). It averages (SCAN's AVG); SCAN's LogSumExp aggregation is missing.

    Args:
        regions: Images, (I, R, D), float16, bfloat16, float32 or float64; any strides.
        words: Captions, (T, L, D), of the regions' dtype and device.
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D, or None. One of the two weights at least is given.
        region_mask: True (or not 0) where a region is valid, (I, R); all are where None.
        word_mask: True (or not 0) where a word is valid, (T, L); all are where None.
        smooth: Inverse temperature of the attention.
        normalize: Makes no difference, since both sides of s are on the unit sphere here; every function takes it.
        out_dtype: Dtype of the scores; the features' where None, autocast's under torch.autocast.
        backend: "auto" (Triton where it compiles for the tensors' GPU, else torch), "triton" or "torch".

    Returns:
        Scores, (I, T). An image with no valid region, or a caption with no valid word, scores 0 with everything.
        Differentiable once in all four tensors.

    Raises:
        TypeError: an argument that is not a tensor, or a smooth that is not a number.
        ValueError: shapes, dtypes or devices that do not agree, no weight, or more regions or words than
            `backend="triton"` takes (128; 64 of one beside 128 of the other).
        RuntimeError: `backend="triton"` where Triton cannot run.

    Source:
        Lee et al., "Stacked Cross Attention for Image-Text Matching", ECCV 2018 (arXiv 1803.08024), section 3.1; the
        similarity is GSSF's (arXiv 2410.15266).

    Example:
        >>> import torch, gssf_triton
        >>> regions = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> words = torch.tensor([[[0.0, 5.0]]])
        >>> gssf_triton.cross_attention_sim(regions, words, torch.ones(2), smooth=50.0)
        tensor([[1.]])
        >>> gssf_triton.cross_attention_sim(regions, words, torch.ones(2), smooth=1.0)
        tensor([[0.9385]])
    """
    checks.check_positive("smooth", smooth)
    metric = Metric(W_diag, W_blocks)
    regions, words, region_mask, word_mask = _checked(
        regions, words, metric, region_mask, word_mask, normalize, out_dtype
    )
    backend, dtype = _cross_attention_backend(backend, regions, words, W_blocks), product_dtype(regions)
    with full_precision(regions):
        folded = _folded(regions, region_mask, metric, True, backend)
        options = Options(True, True, "attention", float(smooth), backend)
        (scores,) = CrossAttention(options)(regions, words, folded, region_mask, word_mask)
    return scores.to(out_dtype or dtype)
