"""InfoNCE, the softmax loss of CLIP, over GSSF similarities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton import checks
from gssf_triton.losses.batch import Batch, Sides
from gssf_triton.losses.common import Loss, Product, Whole
from gssf_triton.metric import Metric
from gssf_triton.streaming.epilogues import EMPTY_MAX, log_sum_exp, merge_softmax

MEMORY = ("least", "fast")


@dataclass(frozen=True)
class _InfoNCE(Loss):
    """½(−log softmax over the row − log softmax over the column) at the matching pair, or the row's part alone.

    Forward is one product. Backward recomputes S chunk by chunk, with the matching pairs left out: their softmax
    minus 1 would drown in half precision, so their part is added outside the product, in float32.
    """

    NAME = "info_nce"
    GRADIENTS = 5

    symmetric: bool
    label_smoothing: float
    memory: str

    @property
    def stores(self) -> bool:
        """Whether S is stored for the backward pass; a compiler would have to know how."""
        return self.memory == "fast" and self.wants and not torch.compiler.is_compiling()

    @classmethod
    def check_options(cls, **options: Any) -> None:
        checks.check_flags(symmetric=options["symmetric"])
        checks.check_fraction("label_smoothing", options["label_smoothing"])
        checks.check_choice("memory", options["memory"], MEMORY)

    @property
    def directions(self) -> str:
        return "both" if self.symmetric else "rows"

    def values(self, x: Product, scale: Tensor) -> tuple[Tensor, ...]:
        alpha, smoothing = x.scaled(scale), self.label_smoothing
        kept = self.stream(
            f"softmax_{'sums_' if smoothing else ''}{self.directions}", x, alpha[None], stores=self.stores
        )
        state, match = kept.rows[:-1], kept.rows[-1].clone()
        if self.symmetric:
            # Both sides in one tensor, and then in half as many operations: the host's time.
            state = torch.cat((state, self.parts.merge(kept.columns, merge_softmax)), 1)
            match = torch.cat((match, self.parts.gather(match)))
        z = match * alpha
        loss = log_sum_exp(state, z)
        if smoothing:
            loss = loss + smoothing * (z - state[2] / state[3])
        loss = self._joined(loss, x.t.shape[0]) * self.weight
        stored = (kept.stored, kept.tops) if self.stores else ()
        return loss, match, state, *(match.new_empty(0) if part is None else part for part in stored)

    def _joined(self, values: Tensor, M: int | torch.SymInt) -> Tensor:
        """Σ over the directions of values of all rows and, with both directions, then of all columns: (M,)."""
        return values[:M] + values[M:][self.parts.own] if self.symmetric else values

    def slopes(
        self, x: Product, weight: Tensor, scale: Tensor, match: Tensor, state: Tensor, *stored: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        own, M, alpha, smoothing = self.parts.own, x.t.shape[0], x.scaled(scale), self.label_smoothing
        if self.reduction != "none":
            weight = torch.full_like(match, self.weight)
        elif self.symmetric:
            weight = torch.cat((weight, self.parts.gather(weight))) * self.weight
        lse = log_sum_exp(state)
        at_match = torch.expm1(match * alpha - lse)
        uniform = torch.zeros_like(match)
        if smoothing:
            uniform = smoothing / state[3]
            at_match = at_match + smoothing - uniform
        at_match = self._joined(at_match * weight, M)[:, None]
        # As the slope's epilogue reads: what smoothing takes off every softmax is third.
        vectors = torch.stack((lse, weight, uniform, match))
        # A copy is aligned, whatever M: no batch needs a kernel of its own.
        rows, columns = (vectors[:, :M], vectors[:, M:].contiguous()) if self.symmetric else (vectors, None)
        epilogue = f"softmax_slope_{self.directions}"
        slope = self.stream(epilogue, x, alpha[None], rows, columns, stored, wants_slope=True)
        slope.d_t.addcmul_(at_match, x.y[own])
        slope.d_y[own].addcmul_(at_match, x.t)
        return slope.d_t, slope.d_y, slope.totals[0]

    def whole(self, x: Product, scale: Tensor) -> Whole:
        S = x.t @ x.y.mT
        excluded, z = None, S * scale if self.wants else S.mul_(scale)
        if x.row_ids is not None and x.column_ids is not None:
            excluded = (x.row_ids[:, None] == x.column_ids).fill_diagonal_(False)
            z.masked_fill_(excluded, EMPTY_MAX)
        log_likelihood, slope, at_match = self._direction(z, 1, excluded)
        if self.symmetric:
            other, of_column, at_column = self._direction(z, 0, excluded)
            log_likelihood = log_likelihood + other
            if slope is not None:
                slope, at_match = slope.add_(of_column), at_match + at_column
        if slope is None:
            return Whole(log_likelihood * -self.weight)
        total = at_match.new_zeros(())
        if self.needs[4]:
            # As in the epilogue: less the match's similarity, or the total would be what two large sums differ by.
            total = (torch.linalg.vecdot(slope, S) + at_match * S.diagonal()).sum()
        slope.diagonal().copy_(at_match)
        return Whole(log_likelihood * -self.weight, slope=slope, totals=(total,))

    @property
    def weight(self) -> float:
        return 0.5 if self.symmetric else 1.0

    def _direction(self, z: Tensor, dim: int, excluded: Tensor | None) -> tuple[Any, ...]:
        """(−losses, slope but for the matches, slope at the matches) of the softmax of z along `dim`."""
        smoothing, uniform = self.label_smoothing, None
        log_p = z.log_softmax(dim)
        log_likelihood = log_p.diagonal().clone()  # a view would keep all of log_p
        if smoothing:
            kept, count = log_p, torch.full_like(log_likelihood, z.shape[dim])
            if excluded is not None:
                kept, count = log_p.masked_fill(excluded, 0.0), count - excluded.sum(dim)
            uniform = smoothing / count
            log_likelihood = (1 - smoothing) * log_likelihood + kept.sum(dim) * uniform
        if not self.wants:
            return log_likelihood, None, None
        slope = log_p.exp()
        if uniform is not None:
            slope.sub_(uniform.unsqueeze(dim))
        if excluded is not None:
            slope.masked_fill_(excluded, 0.0)
        # Slopes sum to 0. 1 minus the match's own softmax would lose the digits of a small sum.
        at_match = slope.fill_diagonal_(0.0).sum(dim).neg_()
        # A match that is alone has no other to be NaN with.
        return log_likelihood, slope, torch.where(log_likelihood.isnan(), log_likelihood, at_match)


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
    memory: str = "least",
    normalize: bool = False,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""InfoNCE over the similarities of a batch of matching pairs, without storing them.

    $$L = \frac{1}{N} \sum_i \tfrac12 \left(-\log\frac{e^{\tau S_{ii}}}{\sum_j e^{\tau S_{ij}}}
    -\log\frac{e^{\tau S_{ii}}}{\sum_j e^{\tau S_{ji}}}\right)$$

    Memory grows with N: S is computed forward once, backward again (four products in all), and never stored unless it
    is small or `memory` allows it.

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
        memory: "least", or "fast": the forward pass keeps the similarities for the backward pass, which saves one of
            four products, and takes 2 bytes a pair of half-precision features on Triton (2.2 GB at 32,768 pairs), and
            on torch 4 or 8, the features' own. Errors keep to the same bounds. Under torch.compile it is "least".
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
    student, scalars = Sides(a, b, Metric(W_diag, W_blocks)), {"logit_scale": logit_scale}
    batch = Batch(student, normalize, reduction, group, backend, scalars, ids)
    return batch.run(_InfoNCE, symmetric=symmetric, label_smoothing=label_smoothing, memory=memory)[0]
