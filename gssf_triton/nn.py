"""Modules that hold the metric's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gssf_triton import checks
from gssf_triton.attention.module import GSSFAttention
from gssf_triton.losses.modules import DistillationLoss, InfoNCELoss, SigmoidLoss, TripletLoss
from gssf_triton.similarity import functional
from gssf_triton.similarity.parameters import Learned, reset_metric
from gssf_triton.tracing import Leaf

__all__ = ["GSSF", "DistillationLoss", "GSSFAttention", "InfoNCELoss", "SigmoidLoss", "TripletLoss"]


class GSSF(Leaf):
    """A learned similarity that starts as exactly the cosine and can replace it in any retrieval model.

    Args:
        dim: Channels D of both sides.
        block_size: Size B of the channel blocks; must divide `dim`. Ignored if `blocks=False`.
        diag: Learn the diagonal term, `W_diag` (D,), starting at 1.
        blocks: Learn the block term, `W_blocks` (D/B, B, B), starting at 0, or at the identity where `diag=False`.
        normalize: Put both sides on the unit sphere first.
        device: Where the weights are made.
        dtype: The weights' dtype; float32 weights work beside half-precision features.

    Attributes:
        W_diag: Parameter (D,), or None where `diag=False`.
        W_blocks: Parameter (D/B, B, B), or None where `blocks=False`.

    Raises:
        ValueError: a `block_size` that does not divide `dim`, a size below 1, or neither term.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch
        >>> from gssf_triton.nn import GSSF
        >>> metric = GSSF(dim=64, block_size=16)
        >>> images, texts = torch.randn(3, 64), torch.randn(5, 64)
        >>> metric(images, texts).shape
        torch.Size([3, 5])
        >>> cosine = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1)
        >>> torch.allclose(metric(images, texts), cosine, atol=1e-6)
        True
    """

    W_diag: nn.Parameter | None
    W_blocks: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        block_size: int = 32,
        diag: bool = True,
        blocks: bool = True,
        normalize: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_count("dim", dim, 1)
        learned = Learned(diag, blocks, block_size, device, dtype)
        checks.check_flags(normalize=normalize)
        learned.check(dim, f"dim = {dim}", may_choose=False)
        self.dim = dim
        self.block_size = block_size
        self.normalize = normalize
        learned.add_to(self, dim)

    def reset_parameters(self) -> None:
        """Back to the cosine: W_diag = 1 and W_blocks = 0, or W_blocks = I where there is no diagonal."""
        reset_metric(self)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """S (..., M, N) of a (..., M, D) with b (..., N, D); see `gssf_triton.pairwise_sim`."""
        return functional.pairwise_sim(a, b, self.W_diag, self.W_blocks, normalize=self.normalize)

    def paired(self, a: Tensor, b: Tensor) -> Tensor:
        """(..., N): a[i] against b[i]; see `gssf_triton.paired_sim`."""
        return functional.paired_sim(a, b, self.W_diag, self.W_blocks, normalize=self.normalize)

    def transform(self, x: Tensor, side: str = "a") -> Tensor:
        """T(x), of x's shape, after `normalize`; see `gssf_triton.transform`.

        With `normalize=True` the other side must be on the unit sphere too for the dot product to be the similarity.
        """
        return functional.transform(x, self.W_diag, self.W_blocks, side=side, normalize=self.normalize)

    def dense(self) -> Tensor:
        """The (D, D) matrix W ⊙ U; see `gssf_triton.dense_metric`."""
        return functional.dense_metric(self.W_diag, self.W_blocks)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, block_size={self.block_size}, diag={self.W_diag is not None}, "
            f"blocks={self.W_blocks is not None}, normalize={self.normalize}"
        )
