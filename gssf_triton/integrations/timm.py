"""GSSF attention in timm's vision transformers: their `attn_layer`.

`timm.create_model("vit_base_patch16_224", attn_layer=GSSFAttention)`: pretrained weights load and give the same output
until the metric is trained. A layer whose plain weights are all in the state dict, without a metric, gets the identity.
A state dict that holds only some of them (an adapter's) leaves the metric as it is.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from torch import Tensor, nn

from gssf_triton.attention.heads import HeadMetric, complete_state_dict
from gssf_triton.checks import check_count, check_terms


class NormThenMetric(HeadMetric):
    """timm's norm of the queries, then T, in the norm's place."""

    def __init__(self, norm: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.norm = norm

    def forward(self, q: Tensor) -> Tensor:
        """T(norm(q)), (..., H, L, D)."""
        return super().forward(self.norm(q))


class GSSFAttention(Attention):
    """timm's `Attention` with GSSF similarities as its scores, a metric a head, the identity at the start.

    Everything else, fused attention and masks included, is timm's: T is applied where timm normalises the queries.

    Args:
        dim: Channels of the tokens; further arguments are timm's.
        num_heads: Heads.
        block_size: Size B of the metric's blocks, a divisor of a head's channels; None takes the largest up to 32.
        diag: Learn the diagonal term.
        blocks: Learn the block term.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import timm, torch
        >>> from gssf_triton.integrations.timm import GSSFAttention
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=1, attn_layer=GSSFAttention)
        >>> vit(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """

    q_norm: nn.Module

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        block_size: int | None = None,
        diag: bool = True,
        blocks: bool = True,
        **kwargs: Any,
    ) -> None:
        check_count("dim", dim, 1)
        check_count("num_heads", num_heads, 1)
        check_terms(diag, blocks)
        if block_size is not None:
            check_count("block_size", block_size, 1)
        super().__init__(dim, num_heads, *args, **kwargs)
        weight = self.qkv.weight
        form = {"block_size": block_size, "diag": diag, "blocks": blocks}
        place = {"device": weight.device, "dtype": weight.dtype}
        self.q_norm = NormThenMetric(self.q_norm, num_heads=num_heads, head_dim=self.head_dim, **form, **place)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """A plain model's weights too: its norm is one level deeper here, and it has no metric."""
        for path, module in self.q_norm.named_modules(prefix=f"{prefix}q_norm"):  # what wraps one may be around it
            if isinstance(module, NormThenMetric):
                for name in module.norm.state_dict():
                    if f"{path}.{name}" in state_dict and f"{path}.norm.{name}" not in state_dict:
                        state_dict[f"{path}.norm.{name}"] = state_dict.pop(f"{path}.{name}")
        complete_state_dict(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
