"""GSSF: a learned, structured sparse similarity at the cost of cosine, in Triton and in torch.

s(x, y) = xᵀ(W ⊙ U)y with a diagonal and a block-diagonal weight (Diao et al., IEEE TIP 2024, arXiv 2410.15266).
"""

from __future__ import annotations

import torch.fx

from gssf_triton import autotune as autotune
from gssf_triton import metrics, nn, training
from gssf_triton.attention.functional import attention
from gssf_triton.losses import distillation_loss, info_nce, sigmoid_loss, triplet_loss
from gssf_triton.region_word import cross_attention_sim, late_interaction
from gssf_triton.retrieval import ranks, topk
from gssf_triton.similarity.functional import dense_metric, paired_sim, pairwise_sim, pairwise_terms, transform

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "attention",
    "cross_attention_sim",
    "dense_metric",
    "distillation_loss",
    "info_nce",
    "late_interaction",
    "metrics",
    "nn",
    "paired_sim",
    "pairwise_sim",
    "pairwise_terms",
    "ranks",
    "sigmoid_loss",
    "topk",
    "training",
    "transform",
    "triplet_loss",
]

# Each function is one step of what torch.fx traces.
for _name in {*__all__} - {"__version__", "metrics", "nn", "training"}:
    torch.fx.wrap(_name)
