"""GSSF: a learned, structured sparse similarity at the cost of cosine, in Triton and in torch.

s(x, y) = xᵀ(W ⊙ U)y with a diagonal and a block-diagonal weight (Diao et al., IEEE TIP 2024, arXiv 2410.15266).
"""

from __future__ import annotations

from gssf_triton import nn
from gssf_triton.functional import dense_metric, paired_sim, pairwise_sim, pairwise_terms, transform
from gssf_triton.heads import attention

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "attention",
    "dense_metric",
    "nn",
    "paired_sim",
    "pairwise_sim",
    "pairwise_terms",
    "transform",
]
