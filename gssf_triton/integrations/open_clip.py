"""GSSF in open_clip: the metric in the logits of any of its losses.

Nothing here imports the library. Its losses multiply image and text features, in either order. So the metric folded
into the image side is in both logits: T(x) yᵀ is S and y T(x)ᵀ is Sᵀ.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gssf_triton import checks
from gssf_triton.metric import IDENTITY
from gssf_triton.nn import GSSF
from gssf_triton.precision import joined
from gssf_triton.similarity import torch_backend
from gssf_triton.tracing import Leaf


class GSSFLoss(Leaf):
    """An open_clip loss (`ClipLoss`, `SigLipLoss`, `CoCaLoss`, `DistillClipLoss`) on GSSF similarities.

    Called as the loss itself, which still gathers across devices. Give `parameters()`, the metric, to the optimizer:
    open_clip's training script optimises the model alone. With several processes give the loss `gather_with_grad=True`
    and wrap this module in DistributedDataParallel, as the model is: then the metric's gradient is that of the whole
    batch.

    Args:
        loss: The loss.
        metric: Images are its left side, texts its right side.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch
        >>> from open_clip.loss import ClipLoss
        >>> from gssf_triton.integrations.open_clip import GSSFLoss
        >>> from gssf_triton.nn import GSSF
        >>> images, texts = (torch.nn.functional.normalize(torch.randn(4, 64), dim=-1) for _ in range(2))
        >>> loss = GSSFLoss(ClipLoss(), GSSF(dim=64))
        >>> torch.allclose(loss(images, texts, torch.tensor(100.0)), ClipLoss()(images, texts, torch.tensor(100.0)))
        True
    """

    def __init__(self, loss: nn.Module, metric: GSSF) -> None:
        super().__init__()
        checks.check_module("loss", loss)
        checks.check_kind("metric", metric, GSSF, "a gssf_triton.nn.GSSF")
        self.loss = loss
        self.metric = metric

    def fold(self, image_features: Tensor) -> Tensor:
        """T(image_features): its products with text features or zero-shot classifier weights are the similarities."""
        return self.metric.transform(image_features)

    def forward(self, image_features: Tensor, text_features: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the loss returns; further arguments (`logit_scale` first) are passed on to it."""
        names = ("image_features", "text_features")
        checks.check_pair(image_features, text_features, names)
        images, texts = joined(image_features, text_features)
        checks.check_same_dtype(images, texts, names)
        if self.metric.normalize:
            text_features = torch_backend.fold(text_features, IDENTITY, normalize=True)
        return self.loss(self.fold(image_features), text_features, *args, **kwargs)
