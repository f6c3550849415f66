"""GSSF in sentence-transformers: the similarity of its ranking losses and evaluators, and a fused loss.

Nothing here imports the library, which takes any callable of two batches of embeddings as a similarity. In one process
its Trainer learns the metric as a parameter of the loss. The model does not hold it: save it with
`torch.save(similarity.state_dict(), …)`.

The Trainer wraps only the model. So a metric in the loss is not averaged over processes, and a cached loss does not
divide its gradient by the steps of gradient accumulation: 4 steps make it 4 times as large. In both cases put the
metric into the model: `gssf_triton.integrations.sentence_transformers_model.QueryMetric`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.fx
from numpy.typing import NDArray
from torch import Tensor, nn

import gssf_triton
from gssf_triton import checks
from gssf_triton.integrations import as_tensor
from gssf_triton.nn import GSSF
from gssf_triton.tracing import Leaf

Embeddings = Tensor | NDArray[np.floating] | list[Any]


@torch.fx.wrap
def _batch(name: str, x: Embeddings, weight: Tensor) -> Tensor:
    """Embeddings as the library passes them (tensors, arrays, lists of them) as one batch; one embedding is one row."""
    checks.check_kind(name, x, (Tensor, np.ndarray, list), "a torch.Tensor, a numpy.ndarray or a list of them")
    try:
        if isinstance(x, list) and x and isinstance(x[0], (Tensor, np.ndarray)):
            x = torch.stack([as_tensor(row) for row in x])
        batch = as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must hold embeddings of one length, got a {type(x).__name__}: {error}") from None
    if batch.is_complex():
        raise ValueError(f"{name} must hold real numbers, got {batch.dtype}")
    batch = batch.to(weight.device)
    if not batch.is_floating_point():
        batch = batch.to(weight.dtype)
    return batch.unsqueeze(0) if batch.dim() == 1 else batch


class GSSFSimilarity(GSSF):
    """A learned `similarity_fct`, called as `sentence_transformers.util.cos_sim` is; the cosine at the start.

    The first batch is the metric's left side: losses and evaluators pass queries first.

    With several processes, or with a cached loss and gradient accumulation, use `QueryMetric`: see the top of this
    file.

    Args:
        dim: Channels D of the embeddings.
        block_size: As `gssf_triton.nn.GSSF`, and so are the others.
        diag: Learn the diagonal term.
        blocks: Learn the block term.
        normalize: Put the embeddings on the unit sphere first.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch
        >>> from gssf_triton.integrations.sentence_transformers import GSSFSimilarity
        >>> similarity = GSSFSimilarity(dim=64)
        >>> # MultipleNegativesRankingLoss(model, similarity_fct=similarity)
        >>> # InformationRetrievalEvaluator(…, score_functions={"gssf": similarity.score})
        >>> similarity(torch.randn(3, 64), torch.randn(5, 64)).shape
        torch.Size([3, 5])
    """

    #: The library's model cards print a similarity's name.
    __name__ = "GSSFSimilarity"

    def forward(self, a: Embeddings, b: Embeddings) -> Tensor:
        """(M, N) similarities of a (M, D) and b (N, D): for ranking losses."""
        _warn_of_many_processes(self)
        weight = next(self.parameters())
        return super().forward(_batch("a", a, weight), _batch("b", b, weight))

    def pairwise(self, a: Embeddings, b: Embeddings) -> Tensor:
        """(N,) similarities of a[i] and b[i]. For a loss that should learn the metric, use `PairwiseSimilarity`."""
        _warn_of_many_processes(self)
        weight = next(self.parameters())
        return self.paired(_batch("a", a, weight), _batch("b", b, weight))

    def score(self, a: Embeddings, b: Embeddings) -> Tensor:
        """`forward` without a gradient: for evaluators' `score_functions` and `util.semantic_search`."""
        with torch.no_grad():
            scores: Tensor = self(a, b)
        return scores.detach()  # torch.fx does not trace no_grad


def _warn_of_many_processes(similarity: GSSFSimilarity) -> None:
    """With several processes the Trainer would silently leave each with a metric of its own."""
    learns = torch.is_grad_enabled() and any(weight.requires_grad for weight in similarity.parameters())
    if learns and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            "a GSSFSimilarity in a loss is not averaged over processes by sentence-transformers' Trainer, which wraps "
            "the model alone: put gssf_triton.integrations.sentence_transformers_model.QueryMetric into the model, or "
            "wrap the loss in DistributedDataParallel yourself",
            stacklevel=3,
        )


def _check_similarity(similarity: object) -> None:
    checks.check_kind("similarity", similarity, GSSFSimilarity, "a GSSFSimilarity")


class PairwiseSimilarity(Leaf):
    """`GSSFSimilarity.pairwise` as a module, for losses over pairs (`CoSENTLoss`), which then learn the metric.

    Args:
        similarity: Holds the metric.
    """

    __name__ = "PairwiseSimilarity"

    def __init__(self, similarity: GSSFSimilarity) -> None:
        super().__init__()
        _check_similarity(similarity)
        self.similarity = similarity

    def forward(self, a: Embeddings, b: Embeddings) -> Tensor:
        """(N,) similarities of a[i] and b[i]."""
        return self.similarity.pairwise(a, b)


class FusedRankingLoss(Leaf):
    """`MultipleNegativesRankingLoss` on GSSF similarities without the matrix of scores: `gssf_triton.info_nce`.

    For pairs (anchor, positive); every other positive of the batch is a negative. With hard-negative columns use
    `MultipleNegativesRankingLoss(model, similarity_fct=similarity)`.

    Args:
        model: A `SentenceTransformer`.
        similarity: The metric, learned with the model.
        scale: Factor on the similarities, the inverse temperature.
        symmetric: Average with the loss from positives to anchors, the library's `directions=("query_to_doc",
            "doc_to_query"), partition_mode="per_direction"`.

    Raises:
        ValueError: at the call, anything but two columns of sentences.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266); van den Oord et al., 2018 (arXiv 1807.03748).
    """

    def __init__(
        self, model: nn.Module, similarity: GSSFSimilarity, scale: float = 20.0, symmetric: bool = False
    ) -> None:
        super().__init__()
        checks.check_module("model", model)
        _check_similarity(similarity)
        checks.check_positive("scale", scale)
        checks.check_flags(symmetric=symmetric)
        self.model = model
        self.similarity = similarity
        self.scale = scale
        self.symmetric = symmetric

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch: two columns of tokenized sentences; `labels` are ignored."""
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of (anchors, positives), each (N, D)."""
        if len(embeddings) != 2:
            raise ValueError(
                f"sentence_features must have two columns, anchors and positives, got {len(embeddings)}: hard "
                "negatives are for MultipleNegativesRankingLoss with a GSSFSimilarity as its similarity_fct"
            )
        metric = self.similarity
        _warn_of_many_processes(metric)
        anchors, positives = embeddings
        return gssf_triton.info_nce(
            anchors,
            positives,
            metric.W_diag,
            metric.W_blocks,
            logit_scale=torch.tensor(self.scale, device=embeddings[0].device),
            symmetric=self.symmetric,
            normalize=metric.normalize,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """What the library's model card prints."""
        return {"scale": self.scale, "similarity_fct": self.similarity.__name__, "symmetric": self.symmetric}
