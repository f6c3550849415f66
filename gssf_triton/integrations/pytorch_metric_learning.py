"""GSSF as a distance of pytorch-metric-learning (PML): for its losses, miners and accuracy calculator.

PML's testers measure with FAISS's Euclidean neighbours whatever distance was trained; give them `GSSFKNN`:
`AccuracyCalculator(knn_func=GSSFKNN(distance))`.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

import gssf_triton
from gssf_triton import checks
from gssf_triton.integrations import as_tensor
from gssf_triton.metric import Metric
from gssf_triton.nn import GSSF
from gssf_triton.similarity import functional
from gssf_triton.tracing import Leaf


class GSSFDistance(Leaf, BaseDistance):
    """A learned similarity that replaces PML's `CosineSimilarity` and equals it at the start.

    The metric is not symmetric: everywhere in PML the query is its left side and the reference its right side. Where a
    loss compares a batch with itself, mat[i, j] and mat[j, i] differ once trained, unless `symmetric=True`.

    Give its parameters to an optimizer: `loss_func.parameters()` has them.

    Eleven of PML's losses are defined by a distance of their own and refuse any other: `AngularLoss`, `CircleLoss`,
    `DynamicSoftMarginLoss`, `FastAPLoss`, `InstanceLoss`, `LargeMarginSoftmaxLoss` (and its kinds `ArcFaceLoss`,
    `CosFaceLoss`, `SphereFaceLoss` and `SubCenterArcFaceLoss`), `PNPLoss`, `SignalToNoiseRatioContrastiveLoss`,
    `SmoothAPLoss`, `ThresholdConsistentMarginLoss`, `TupletMarginLoss`. `VICRegLoss` takes no distance, and
    `P2SGradLoss` ignores the one it is given.

    Args:
        dim: Channels D of the embeddings.
        block_size: Size B of the blocks; divides `dim`.
        diag: Learn the diagonal term.
        blocks: Learn the block term.
        symmetric: Use the symmetric part of the metric, (s(x, y) + s(y, x)) / 2.
        kwargs: `BaseDistance`'s: `normalize_embeddings` (True), `p`, `power`, `collect_stats`.

    Attributes:
        metric: The `gssf_triton.nn.GSSF` that holds W_diag and W_blocks; embeddings reach it normalised.

    Raises:
        ValueError: sizes that do not divide, or neither term.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266); Musgrave et al., PyTorch Metric Learning, 2020.

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.losses import TripletMarginLoss
        >>> from gssf_triton.integrations.pytorch_metric_learning import GSSFDistance
        >>> loss_func = TripletMarginLoss(distance=GSSFDistance(dim=64))
        >>> loss = loss_func(torch.randn(8, 64), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
        >>> loss.backward()
        >>> [name for name, _ in loss_func.named_parameters()]
        ['distance.metric.W_diag', 'distance.metric.W_blocks']
    """

    def __init__(
        self,
        dim: int,
        block_size: int = 32,
        diag: bool = True,
        blocks: bool = True,
        symmetric: bool = False,
        **kwargs: Any,
    ) -> None:
        checks.check_flags(symmetric=symmetric)
        super().__init__(is_inverted=True, **kwargs)
        self.metric = GSSF(dim, block_size, diag, blocks, normalize=False)
        self.symmetric = symmetric

    def weights(self) -> tuple[Tensor | None, Tensor | None]:
        """(W_diag, W_blocks) as the distance uses them."""
        W_blocks = self.metric.W_blocks
        if self.symmetric and W_blocks is not None:
            return self.metric.W_diag, (W_blocks + W_blocks.mT) / 2
        return self.metric.W_diag, W_blocks

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """The similarity of every query with every reference, (Q, R)."""
        return functional.pairwise_sim(query_emb, ref_emb, *self.weights())

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """The similarity of query i with reference i, (N,)."""
        return functional.paired_sim(query_emb, ref_emb, *self.weights())


class GSSFKNN:
    """Exact nearest neighbours under a trained `GSSFDistance`, for `AccuracyCalculator` and `InferenceModel`.

    A query among the references is left out by its index, not by rank: under a learned metric an item is often not its
    own best match.

    Args:
        distance: The distance; its weights are read at every call.

    Example:
        >>> from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
        >>> from gssf_triton.integrations.pytorch_metric_learning import GSSFDistance, GSSFKNN
        >>> distance = GSSFDistance(dim=64)
        >>> calculator = AccuracyCalculator(include=("precision_at_1",), knn_func=GSSFKNN(distance))
    """

    def __init__(self, distance: GSSFDistance) -> None:
        checks.check_kind("distance", distance, GSSFDistance, "a GSSFDistance")
        self.distance = distance
        self.reference: Tensor | None = None

    def train(self, embeddings: Tensor) -> None:
        """Replace the references."""
        self.reference = as_tensor(embeddings)

    def add(self, embeddings: Tensor) -> None:
        """Add references."""
        added = as_tensor(embeddings)
        self.reference = added if self.reference is None else torch.cat([self.reference, added])

    @torch.no_grad()
    def __call__(
        self, query: Tensor, k: int, reference: Tensor | None = None, ref_includes_query: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The k best references of each query.

        Args:
            query: (Q, D).
            k: References a query.
            reference: (R, D); those of `train` and `add` where None.
            ref_includes_query: reference[i] is query[i] and is left out of its answers.

        Returns:
            (similarities, indices), (Q, k), best first.

        Raises:
            ValueError: no references, or k beyond them.
        """
        checks.check_count("k", k, 0)
        checks.check_flags(ref_includes_query=ref_includes_query)
        reference = self.reference if reference is None else reference
        if reference is None:
            raise ValueError("reference must be given where train() or add() was not called before, got None")
        for name, x in (("query", query), ("reference", reference)):
            checks.check_features(name, x)
        reference = reference.to(query)
        checks.check_batches(query, reference, ("query", "reference"), paired=False)
        distance: Any = self.distance
        metric = Metric(*distance.weights()).map(lambda w: w.detach().to(query.device))
        query, reference = (distance.maybe_normalize(x) for x in (query, reference))
        k_found = k + 1 if ref_includes_query else k
        values, indices = gssf_triton.topk(query, reference, metric.W_diag, metric.W_blocks, k=k_found)
        if not ref_includes_query:
            return values, indices
        itself = indices == torch.arange(len(query), device=indices.device)[:, None]
        # If a query is not among its own k + 1 best, the last of them is dropped.
        itself[:, -1] |= ~itself.any(1)
        return values[~itself].view(-1, k), indices[~itself].view(-1, k)
