"""Attention whose scores are GSSF similarities, and the metric of an attention layer's heads.

softmax(T(q) kᵀ · scale) v is PyTorch's own scaled_dot_product_attention on T(q): flash kernels apply. Diao et al.,
GSSF, IEEE TIP 2024 (arXiv 2410.15266), in the attention of Vaswani et al., 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from gssf_triton import checks, options
from gssf_triton.backend import resolve_backend
from gssf_triton.precision import float16_operands, joined, product_dtype
from gssf_triton.similarity import functional
from gssf_triton.tracing import Leaf

#: Blocks of a head's channels are at most as large as nn.GSSF's default block where no size is given.
LARGEST_DEFAULT_BLOCK = 32


@torch.fx.wrap
def fold_checked(q: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None) -> Tensor:
    """`fold_heads` of an argument that nobody has checked."""
    checks.check_features("q", q)
    checks.check_head_weights(q, W_diag, W_blocks)
    return fold_heads(q, W_diag, W_blocks)


def fold_heads(q: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, backend: str = "auto") -> Tensor:
    """T(q), (..., H, L, D) to the same: each head under its own metric, or all under one.

    The heads side by side are one row of H·D channels, and their metrics one metric of H·G blocks: the fold that serves
    everything else, one batched product in torch and one kernel in Triton, serves here, and q that was split into heads
    as a view is read in place.
    """
    return _fold_heads(partial(functional.transform, backend=backend), q, W_diag, W_blocks)


def fold_queries(
    q: Tensor, k: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(T(q), k) in the dtype they are multiplied in. In float16 T(q) may leave the range that its scores keep to."""
    dtype = product_dtype(q)
    if dtype != torch.float16:
        return fold_heads(q, W_diag, W_blocks, backend), k.to(dtype)
    fold = partial(functional.fold_rows, normalize=False, backend=resolve_backend(backend, q, W_blocks))
    return float16_operands(_fold_heads(fold, q, W_diag, W_blocks), k)


def _fold_heads(fold: Callable[..., Tensor], q: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None) -> Tensor:
    per_head = (W_diag is not None and W_diag.dim() == 2) or (W_blocks is not None and W_blocks.dim() == 4)
    if not per_head:
        return fold(q, W_diag, W_blocks)
    heads, channels = q.shape[-3], q.shape[-1]
    diag = None if W_diag is None else W_diag.expand(heads, channels).reshape(heads * channels)
    blocks = None if W_blocks is None else W_blocks.expand(heads, *W_blocks.shape[-3:]).flatten(0, 1)
    folded = fold(q.transpose(-3, -2).flatten(-2), diag, blocks)
    return folded.unflatten(-1, (heads, channels)).transpose(-3, -2)


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
    options.check_flags(is_causal=is_causal)
    options.check_probability("dropout_p", dropout_p)
    if scale is not None:
        options.check_number("scale", scale)
    checks.check_attention(q, k, v)
    checks.check_head_weights(q, W_diag, W_blocks)
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    checks.check_mask("attn_mask", attn_mask, "q", q, [(*batch, q.shape[-2], k.shape[-2])], broadcast=True)
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask and is_causal must not be given together: got a mask and is_causal=True")
    q, k, v = joined(q, k, v)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"q and {name} must have the same dtype: q is {q.dtype}, {name} is {x.dtype}")
    backend = resolve_backend(backend, q, W_blocks)
    if attn_mask is not None:
        attn_mask = torch.atleast_2d(attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(product_dtype(q)))
    if is_causal and scale is not None and scale <= 0:
        # PyTorch's fused attention on a CPU masks with −∞ before it scales: 0 · −∞ is NaN, and −1 · −∞ the maximum.
        q, scale = q * scale, 1.0
    v = v.to(product_dtype(q))
    q, k = fold_queries(q, k, W_diag, W_blocks, backend)
    q, k, v = (x.expand(*batch, *x.shape[-2:]) for x in (q, k, v))
    # PyTorch's fused kernels take four dimensions; with fewer a GPU would hold all weights.
    lead = max(4 - q.dim(), 0) if q.is_cuda else 0
    if lead:
        q, k, v = (x[(None,) * lead] for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
    )
    return out[(0,) * lead] if lead else out


class HeadMetric(Leaf):
    """The metric of every head of an attention layer; starts as the identity, which leaves attention as it is.

    The layer around it lets plain attention's state dicts load: see `complete_state_dict`.

    Args:
        num_heads: H.
        head_dim: Channels D of a head.
        block_size: Size B of the blocks, which must divide `head_dim`; None takes its largest divisor up to 32.
        diag: Learn `W_diag`.
        blocks: Learn `W_blocks`.
        device: Where the weights are made.
        dtype: The weights' dtype.

    Attributes:
        W_diag: Parameter (H, D), 1 at the start, or None.
        W_blocks: Parameter (H, D/B, B, B), 0 at the start, or the identity where there is no diagonal; or None.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch
        >>> from gssf_triton.attention.functional import HeadMetric
        >>> q = torch.randn(2, 8, 10, 64)
        >>> torch.equal(HeadMetric(num_heads=8, head_dim=64)(q), q)
        True
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        block_size: int | None = None,
        diag: bool = True,
        blocks: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        add_head_weights(self, num_heads, head_dim, block_size, diag, blocks, device, dtype)

    W_diag: nn.Parameter | None
    W_blocks: nn.Parameter | None

    def reset_parameters(self) -> None:
        """Back to the identity; under torch's usual name, which initialises what was made on the meta device."""
        reset_head_weights(self)

    def reset_metric(self) -> None:
        """Back to the identity."""
        reset_head_weights(self)

    def forward(self, q: Tensor) -> Tensor:
        """T(q), (..., H, L, D) to the same."""
        return fold_checked(q, self.W_diag, self.W_blocks)

    def extra_repr(self) -> str:
        return repr_of_weights(self)


def check_head_options(
    num_heads: object, head_dim: int, block_size: object, diag: object, blocks: object, device: object, dtype: object
) -> None:
    """What a module with a metric a head is made with."""
    options.check_count("num_heads", num_heads, 1)
    options.check_count("head_dim", head_dim, 1)
    options.check_terms(diag, blocks)
    options.check_place(device, dtype)
    if blocks and block_size is not None:
        options.check_block_size("block_size", block_size, head_dim, f"the {head_dim} channels of a head")


def add_head_weights(
    module: nn.Module,
    num_heads: int,
    head_dim: int,
    block_size: int | None,
    diag: bool,
    blocks: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Give a module the parameters `W_diag` and `W_blocks`, a metric a head, at the identity."""
    check_head_options(num_heads, head_dim, block_size, diag, blocks, device, dtype)
    if block_size is None:
        block_size = max(size for size in range(1, LARGEST_DEFAULT_BLOCK + 1) if head_dim % size == 0)
    module.register_parameter("W_diag", None)
    module.register_parameter("W_blocks", None)
    if diag:
        module.W_diag = nn.Parameter(torch.empty(num_heads, head_dim, device=device, dtype=dtype))
    if blocks:
        shape = (num_heads, head_dim // block_size, block_size, block_size)
        module.W_blocks = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
    reset_head_weights(module)


@torch.no_grad()
def fill_identity(W_diag: Tensor | None, W_blocks: Tensor | None) -> None:
    """1 on the diagonal and 0 in the blocks, or the identity there where no diagonal is learned."""
    if W_diag is not None:
        W_diag.fill_(1.0)
    if W_blocks is not None:
        W_blocks.zero_()
        if W_diag is None:
            W_blocks.diagonal(dim1=-2, dim2=-1).fill_(1.0)


def reset_head_weights(module: nn.Module) -> None:
    fill_identity(module._parameters["W_diag"], module._parameters["W_blocks"])


def complete_state_dict(
    layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
) -> None:
    """Where a state dict has a plain layer's weights, put the identity of every metric in the layer there.

    Those are every parameter of this one layer but the metric's; what else the state dict holds or lacks is of no
    account. One that lacks any of them (an adapter's, a head's, an empty one) or has a weight of the metric stays as it
    is: what it does not name is not touched, and reported missing. So pretrained models load strictly, and are
    unchanged until trained. The arguments are those that `Module.register_load_state_dict_pre_hook` hands over, so
    this is such a hook as it stands.
    """
    metrics: dict[str, dict[str, Tensor]] = {}
    plain = []
    for name, parameter in layer.named_parameters():
        path, _, own = name.rpartition(".")
        if own in ("W_diag", "W_blocks"):
            metrics.setdefault(f"{prefix}{path}." if path else prefix, {})[own] = parameter
        else:
            plain.append(f"{prefix}{name}")
    has_metric = any(f"{start}{own}" in state_dict for start in metrics for own in ("W_diag", "W_blocks"))
    if has_metric or not plain or any(name not in state_dict for name in plain):
        return
    for start, weights in metrics.items():
        made = {}
        for own, weight in weights.items():
            # Assigned weights replace the layer's own, which may be on the meta device: theirs is the device then.
            like = state_dict[plain[0]] if local_metadata.get("assign_to_params_buffers") else weight
            dtype = like.dtype if like.is_floating_point() else weight.dtype
            made[own] = torch.empty_like(weight, device=like.device, dtype=dtype, requires_grad=False)
            state_dict[f"{start}{own}"] = made[own]
        fill_identity(made.get("W_diag"), made.get("W_blocks"))


def repr_of_weights(module: nn.Module) -> str:
    shapes = {name: getattr(module, name) for name in ("W_diag", "W_blocks")}
    return ", ".join(f"{name}={None if w is None else tuple(w.shape)}" for name, w in shapes.items())
