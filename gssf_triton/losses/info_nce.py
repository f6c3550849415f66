"""InfoNCE, the softmax loss of CLIP, over GSSF similarities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton import checks
from gssf_triton.losses.common import Batch, Loss, Product, check_features
from gssf_triton.metric import Metric
from gssf_triton.streaming.epilogues import log_sum_exp, merge_softmax


@dataclass(frozen=True)
class _InfoNCE(Loss):
    """½(−log softmax over the row − log softmax over the column) at the matching pair, or the row's part alone.

    Forward is one product. Backward recomputes S chunk by chunk, with the matching pairs left out: their softmax
    minus 1 would drown in half precision, so their part is added outside the product, in float32.
    """

    NAME = "info_nce"
    GRADIENTS = 3

    symmetric: bool
    label_smoothing: float

    @property
    def directions(self) -> str:
        return "both" if self.symmetric else "rows"

    def values(self, x: Product, scale: Tensor) -> tuple[Tensor, ...]:
        alpha, smoothing = scale * (x.unit_t * x.unit_y), self.label_smoothing
        kept = self.stream(f"softmax_{'sums_' if smoothing else ''}{self.directions}", x, alpha[None])
        match, column = kept.rows[-1].clone(), kept.columns
        z = match * alpha

        def loss_of(state: Tensor) -> Tensor:
            loss = log_sum_exp(state, z)
            return loss + smoothing * (z - state[2] / state[3]) if smoothing else loss

        loss = loss_of(kept.rows)
        if self.symmetric:
            column = self.parts.merge(column, merge_softmax)
            loss = (loss + loss_of(column[:, self.parts.own])) / 2
        return loss, match, kept.rows, column

    def slopes(
        self, x: Product, weight: Tensor, scale: Tensor, match: Tensor, row: Tensor, column: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts, wide = self.parts, match.dtype
        alpha = scale * (x.unit_t * x.unit_y)
        weight = weight * (0.5 if self.symmetric else 1.0)

        def vectors(state: Tensor, weights: Tensor, matches: Tensor) -> Tensor:
            """(log-sum-exp, weight, what smoothing takes off every softmax, match) as the slope's epilogue reads."""
            lse = log_sum_exp(state)
            uniform = self.label_smoothing / state[3] if self.label_smoothing else torch.zeros_like(lse)
            return torch.stack((lse, weights, uniform, matches))

        rows, columns = vectors(row, weight, match), None
        sides = [rows]
        if self.symmetric:
            weights = weight.new_full((x.y.shape[0],), 0.5) if self.summed else parts.gather(weight)
            columns = vectors(column, weights, parts.gather(match))
            sides.append(columns[:, parts.own])
        slope = self.stream(f"softmax_slope_{self.directions}", x, alpha[None], rows, columns, wants_slope=True)
        z = match * alpha
        at_match = torch.zeros_like(z)
        for lse, w, uniform, _ in sides:
            at_match += w * (torch.expm1(z - lse) + self.label_smoothing - uniform)
        slope.d_t.addcmul_(at_match[:, None], x.y[parts.own].to(wide))
        slope.d_y[parts.own].addcmul_(at_match[:, None], x.t.to(wide))
        return slope.d_t, slope.d_y, slope.totals


def info_nce(
    a: Tensor,
    b: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    logit_scale: Tensor | float,
    ids: Tensor | None = None,
    symmetric: bool = True,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""InfoNCE over the similarities of a batch of matching pairs, without storing them.

    $$L = \frac{1}{N} \sum_i \tfrac12 \left(-\log\frac{e^{\tau S_{ii}}}{\sum_j e^{\tau S_{ij}}}
    -\log\frac{e^{\tau S_{ii}}}{\sum_j e^{\tau S_{ji}}}\right)$$

    Memory grows with N: S is computed in chunks of constant size, forward once, backward again (four products in all).

    Args:
        a: Queries, (N, D), float16, bfloat16, float32 or float64.
        b: Gallery, (N, D), of a's dtype and device; b[i] matches a[i].
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D, or None. One of the two weights at least is given.
        logit_scale: τ, a number or a tensor of one element; multiplies the similarities.
        ids: (N,) integers or None. Pairs of equal ids are never negatives of each other: several captions of one image,
            for instance.
        symmetric: Both directions, halved; False takes a against b alone.
        label_smoothing: ε in [0, 1): the target is 1 − ε at the match and ε spread over all K candidates of the row,
            as in torch.nn.functional.cross_entropy.
        normalize: Put both sides on the unit sphere first.
        reduction: "mean", "sum", or "none" for one value a pair.
        group: A torch.distributed process group, or None: every process passes its part of the batch, of any length,
            and gets the loss of the whole batch ("none": the values of its own pairs). Gradients assume that they are
            averaged over processes, as DDP and FSDP do: wrap whatever holds parameters, this loss's among them.
        backend: "auto", "triton" or "torch".

    Returns:
        () or, with "none", (N,), in float32 (float64 for float64 features). Differentiable once in a, b, the weights
        and logit_scale.

    Raises:
        TypeError: an argument that is not what it should be.
        ValueError: shapes, dtypes or devices that do not agree, no weight, or ids of the wrong length.

    Source:
        van den Oord et al., "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748, eq. 4;
        symmetric as in Radford et al., CLIP, ICML 2021, fig. 3. The similarity: Diao et al., GSSF, IEEE TIP 2024
        (arXiv 2410.15266).

    Example:
        >>> import torch, gssf_triton
        >>> a = torch.eye(3)
        >>> gssf_triton.info_nce(a, a, torch.ones(3), logit_scale=1.0)
        tensor(0.5514)
        >>> gssf_triton.info_nce(a, a, torch.ones(3), logit_scale=0.0, reduction="none")
        tensor([1.0986, 1.0986, 1.0986])
    """
    checks.check_flags(symmetric=symmetric)
    checks.check_fraction("label_smoothing", label_smoothing)
    student = check_features(a, b, Metric(W_diag, W_blocks), normalize, backend)
    batch = Batch(student, reduction, group, ids, {"logit_scale": logit_scale})
    return batch.run(_InfoNCE, symmetric=symmetric, label_smoothing=float(label_smoothing))[0]
