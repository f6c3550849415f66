"""Attention whose scores are GSSF similarities.

softmax(T(q) kᵀ · scale) v is PyTorch's own scaled_dot_product_attention on T(q): flash kernels apply. Diao et al.,
GSSF, IEEE TIP 2024 (arXiv 2410.15266), in the attention of Vaswani et al., 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_triton import checks
from gssf_triton.backend import resolve_backend
from gssf_triton.metric import Metric
from gssf_triton.precision import float16_operands, joined, product_dtype
from gssf_triton.remembered import Remembered, look
from gssf_triton.similarity.functional import fold_rows, folded
from gssf_triton.similarity.torch_backend import as_dtype

#: The leading dimensions of earlier calls, by all that their checks look at.
_BATCHES = Remembered[tuple[int, ...]]()


def check_attention(q: object, k: object, v: object) -> tuple[int, ...]:
    """The common leading dimensions of q (..., L, D), k (..., S, D) and v (..., S, E) that can meet."""
    q, k, v = (checks.check_features(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    checks.check_same_device("q", q, "k", k)
    checks.check_same_device("q", q, "v", v)
    checks.check_meeting(q, k, ("q", "k"))
    checks.check_rows(k, v, ("k", "v"), "")
    return checks.broadcast_batch(q=q, k=k, v=v)


def check_head_weights(q: Tensor, W_diag: object, W_blocks: object) -> None:
    """Attention's metric: shared, (D,) and (G, B, B), or (H, D) and (H, G, B, B) one a head of q (..., H, L, D)."""
    checks.check_weights("q", q, W_diag, W_blocks, heads=True)
    heads = q.shape[-3] if q.dim() > 2 else None
    for name, weight, form in (("W_diag", W_diag, "(H, D)"), ("W_blocks", W_blocks, "(H, G, B, B)")):
        if isinstance(weight, Tensor) and weight.dim() in (2, 4) and weight.shape[0] != heads:
            raise checks.wrong_shape(name, f"{form} with the H, D of q (..., H, L, D) {checks.shape_of(q)}", weight)


def check_attention_mask(
    name: str, mask: object, of: str, x: Tensor, shapes: Sequence[Sequence[int]], broadcast: bool = False
) -> None:
    """A boolean or floating-point mask of one of `shapes`, or with `broadcast` one that broadcasts to the first."""
    if mask is None:
        return
    mask = checks.check_tensor(name, mask)
    if mask.dtype != torch.bool and mask.dtype not in checks.FEATURE_DTYPES:
        raise ValueError(f"{name} must be bool, {checks.FLOAT_NAMES}, got {mask.dtype}")
    wanted = [tuple(shape) for shape in shapes]
    if checks.shape_of(mask) not in wanted:
        try:
            fits = broadcast and tuple(torch.broadcast_shapes(mask.shape, wanted[0])) == wanted[0]
        except RuntimeError:
            fits = False
        if not fits:
            form = "broadcast to" if broadcast else "have shape"
            raise ValueError(f"{name} must {form} {' or '.join(map(str, wanted))}, got {checks.shape_of(mask)}")
    checks.check_same_device(of, x, name, mask)


def fold_heads(q: Tensor, metric: Metric, *, backend: str, wide: bool = False) -> Tensor:
    """T(q), (..., H, L, D) to the same: each head under its own metric, or all under one.

    For Triton the heads side by side are one row of H·D channels, and their metrics one metric of H·G blocks: one fold
    serves all heads, and q that was split into heads as a view is read in place. `wide`: in float32 at least.
    """
    fold, (W_diag, W_blocks) = fold_rows if wide else folded, (metric.W_diag, metric.W_blocks)
    if (W_diag is None or W_diag.dim() == 1) and (W_blocks is None or W_blocks.dim() == 3):
        return fold(q, metric, False, backend=backend)
    rows = q.transpose(-3, -2)
    if backend == "torch":
        return fold(rows, metric, False, backend=backend).transpose(-3, -2)
    heads, channels = q.shape[-3], q.shape[-1]
    diag = None if W_diag is None else W_diag.expand(heads, channels).reshape(heads * channels)
    blocks = None if W_blocks is None else W_blocks.expand(heads, *W_blocks.shape[-3:]).flatten(0, 1)
    rows = fold(rows.flatten(-2), Metric(diag, blocks), False, backend=backend)
    return rows.unflatten(-1, (heads, channels)).transpose(-3, -2)


def fold_queries(q: Tensor, k: Tensor, metric: Metric, *, backend: str) -> tuple[Tensor, Tensor]:
    """(T(q), k) in the dtype of their product. In float16 both are scaled: T(q) may be out of range though S is not."""
    dtype = product_dtype(q)
    if dtype == torch.float16:
        return float16_operands(fold_heads(q, metric, backend=backend, wide=True), k)
    return fold_heads(q, metric, backend=backend), as_dtype(k, dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""Attention with GSSF similarities as its scores.

    $$\mathrm{softmax}(T(q)\, k^\top \cdot scale + mask)\, v$$

    Args:
        q: Queries, (..., H, L, D), or (..., L, D) where the metric is shared; float16, bfloat16, float32 or float64.
        k: Keys, (..., H, S, D). Leading dimensions of q, k and v broadcast.
        v: Values, (..., H, S, E).
        W_diag: Diagonal weight, (D,) for all heads or (H, D), or None. Weights may be float32 beside half precision.
        W_blocks: Block weight, (G, B, B) with G·B = D for all heads or (H, G, B, B), or None.
        attn_mask: Broadcasts to (..., H, L, S): boolean, True where a key takes part, or floating, added to the scores.
        is_causal: Query i sees keys 0 to i only; not together with `attn_mask`.
        scale: Factor on the scores; 1/√D where None.
        dropout_p: Probability that an attention weight is dropped; applied whenever it is not 0.
        backend: What computes T(q), as in `pairwise_sim`; the attention is PyTorch's on either.

    Returns:
        (..., H, L, E), in v's dtype. On a GPU the backward pass of PyTorch's fused kernels may add in any order; its
        bits repeat under torch.use_deterministic_algorithms(True). Those kernels have no second derivative.

    Raises:
        TypeError: an argument that is not a tensor.
        ValueError: shapes, dtypes or devices that do not agree, no weight, or a mask together with `is_causal`.
        RuntimeError: `backend="triton"` where Triton cannot run.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266), plugged into scaled dot-product attention.

    Example:
        >>> import torch, gssf_triton
        >>> q, k, v = (torch.randn(2, 4, 5, 16) for _ in range(3))
        >>> W_diag, W_blocks = torch.ones(4, 16), torch.zeros(4, 2, 8, 8)  # a metric a head, here the identity
        >>> plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> torch.allclose(gssf_triton.attention(q, k, v, W_diag, W_blocks), plain, atol=1e-6)
        True
    """
    key = tuple(map(look, (q, k, v, W_diag, W_blocks, attn_mask, is_causal, scale, dropout_p)))
    batch = _BATCHES.get(key)
    if batch is None:
        checks.check_flags(is_causal=is_causal)
        checks.check_probability("dropout_p", dropout_p)
        if scale is not None:
            checks.check_number("scale", scale)
        batch = check_attention(q, k, v)
        check_head_weights(q, W_diag, W_blocks)
        check_attention_mask("attn_mask", attn_mask, "q", q, [(*batch, q.shape[-2], k.shape[-2])], broadcast=True)
        if is_causal and attn_mask is not None:
            raise ValueError("attn_mask and is_causal must not be given together: got a mask and is_causal=True")
        _BATCHES.put(key, batch)
    if not q.dtype == k.dtype == v.dtype:
        q, k, v = joined(q, k, v)
        checks.check_same_dtype(q, k, ("q", "k"))
        checks.check_same_dtype(q, v, ("q", "v"))
    backend = resolve_backend(backend, q, W_blocks)
    if attn_mask is not None:
        attn_mask = torch.atleast_2d(attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(product_dtype(q)))
    if is_causal and scale is not None and scale <= 0:
        # PyTorch's fused attention on a CPU masks with −∞ before it scales: 0 · −∞ is NaN and −1 · −∞ is the maximum.
        q, scale = q * scale, 1.0
    q, k = fold_queries(q, k, Metric(W_diag, W_blocks), backend=backend)
    v = as_dtype(v, q.dtype)
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2] == batch:
        q, k, v = (x.expand(*batch, *x.shape[-2:]) for x in (q, k, v))
    # PyTorch's fused kernels take four dimensions. With fewer, a GPU would store all attention weights.
    lead = max(4 - q.dim(), 0) if q.is_cuda else 0
    if lead:
        q, k, v = (x[(None,) * lead] for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
    )
    return out[(0,) * lead] if lead else out
