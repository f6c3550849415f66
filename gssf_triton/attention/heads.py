"""The metric of an attention layer's heads as a module, and how plain attention's state dicts load into such layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from gssf_triton import checks
from gssf_triton.attention.functional import check_head_weights, fold_heads
from gssf_triton.backend import resolve_backend
from gssf_triton.metric import Metric
from gssf_triton.similarity.parameters import Learned, fill_identity, repr_of_weights, reset_metric
from gssf_triton.tracing import Leaf


def check_heads(num_heads: object, head_dim: int, learned: Learned) -> None:
    """The arguments that a module with one metric a head is made with."""
    checks.check_count("num_heads", num_heads, 1)
    checks.check_count("head_dim", head_dim, 1)
    learned.check(head_dim, f"the {head_dim} channels of a head", may_choose=True)


@torch.fx.wrap
def _fold_checked(q: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None) -> Tensor:
    """`fold_heads` of an unchecked argument."""
    checks.check_features("q", q)
    check_head_weights(q, W_diag, W_blocks)
    return fold_heads(q, Metric(W_diag, W_blocks), backend=resolve_backend("auto", q, W_blocks))


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
        >>> from gssf_triton.attention.heads import HeadMetric
        >>> q = torch.randn(2, 8, 10, 64)
        >>> torch.equal(HeadMetric(num_heads=8, head_dim=64)(q), q)
        True
    """

    W_diag: nn.Parameter | None
    W_blocks: nn.Parameter | None

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
        learned = Learned(diag, blocks, block_size, device, dtype)
        check_heads(num_heads, head_dim, learned)
        learned.add_to(self, head_dim, num_heads)

    def reset_parameters(self) -> None:
        """Back to the identity; under torch's usual name, which initialises what was made on the meta device."""
        reset_metric(self)

    def reset_metric(self) -> None:
        """Back to the identity."""
        reset_metric(self)

    def forward(self, q: Tensor) -> Tensor:
        """T(q), (..., H, L, D) to the same."""
        return _fold_checked(q, self.W_diag, self.W_blocks)

    def extra_repr(self) -> str:
        return repr_of_weights(self)


def complete_state_dict(
    layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
) -> None:
    """If a state dict has all of a plain layer's weights and no metric, add the identity for each metric of the layer.

    So pretrained models load strictly and are unchanged until trained. A state dict that lacks one of the layer's own
    weights (an adapter's, a head's, an empty one) or has a weight of a metric is not changed: what it does not name
    stays untouched and is reported missing. The signature is that of a hook for
    `Module.register_load_state_dict_pre_hook`.
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
            # With assign=True the state dict's tensors replace the layer's own, which may be on the meta device.
            like = state_dict[plain[0]] if local_metadata.get("assign_to_params_buffers") else weight
            dtype = like.dtype if like.is_floating_point() else weight.dtype
            made[own] = torch.empty_like(weight, device=like.device, dtype=dtype, requires_grad=False)
            state_dict[f"{start}{own}"] = made[own]
        fill_identity(made.get("W_diag"), made.get("W_blocks"))
