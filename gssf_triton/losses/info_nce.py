"""InfoNCE, the softmax loss of CLIP, over GSSF similarities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton import options
from gssf_triton.losses.common import (
    Loss,
    check_ids,
    check_inputs,
    check_reduction,
    described,
    fold_sides,
    incoming,
    operands,
    reduce,
    scalar,
)
from gssf_triton.losses.ranks import gather_rows, spread
from gssf_triton.streaming.epilogues import log_sum_exp, merge_softmax
from gssf_triton.streaming.op import stream_op


@dataclass(frozen=True)
class _InfoNCE(Loss):
    """½(−log softmax over the row − log softmax over the column) at the matching pair, or the row's part alone.

    Forward is one product. Backward recomputes S chunk by chunk, with the matching pairs left out: their softmax
    minus 1 would drown in half precision, so their part is added outside the product, in float32.
    """

    NAME = "info_nce"
    GRADIENTS = 3

    symmetric: bool
    smoothing: float

    def forward(
        self, t: Tensor, y: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, unit_t: Tensor, unit_y: Tensor,
        row_ids: Tensor | None, column_ids: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        own = self.ranks.own
        kind = f"softmax_{'sums_' if self.smoothing else ''}{'both' if self.symmetric else 'rows'}"
        scalars = (scale * (unit_t * unit_y))[None]
        nothing = t.new_empty((0, t.shape[0])), t.new_empty((0, y.shape[0]))
        row, column, _, _, _ = stream_op(
            kind, rows, columns, None, None, *nothing, row_ids, column_ids, scalars, own.start, False, self.backend
        )
        match = row[-1].clone()
        z = match * scalars[0]

        def loss_of(state: Tensor) -> Tensor:
            loss = log_sum_exp(state, z)
            return loss + self.smoothing * (z - state[2] / state[3]) if self.smoothing else loss

        loss = loss_of(row)
        if self.symmetric:
            column = self.ranks.merge(column, merge_softmax)
            loss = (loss + loss_of(column[:, own])) / 2
        return self.total(loss), match, row, column

    def backward(
        self, grad: Tensor, scale: Tensor, t: Tensor, y: Tensor, unit_t: Tensor, unit_y: Tensor,
        row_ids: Tensor | None, column_ids: Tensor | None, match: Tensor, row: Tensor, column: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ranks, wide = self.ranks, match.dtype
        own = ranks.own
        alpha = scale * unit_t * unit_y
        factor, weight = incoming(grad, match, ranks)
        weight = weight.expand(t.shape[0]) * (0.5 if self.symmetric else 1.0)

        def vectors(state: Tensor, weights: Tensor, matches: Tensor) -> Tensor:
            """(log-sum-exp, weight, what smoothing takes off every softmax, match) as the slope's epilogue reads."""
            lse = log_sum_exp(state)
            uniform = self.smoothing / state[3] if self.smoothing else torch.zeros_like(lse)
            return torch.stack((lse, weights, uniform, matches))

        rows = vectors(row, weight, match)
        columns = y.new_empty((0, y.shape[0]), dtype=wide)
        if self.symmetric:
            weights = ranks.gather(weight) if grad.dim() == 1 else weight.new_full((y.shape[0],), 0.5)
            columns = vectors(column, weights, ranks.gather(match))
        _, _, totals, d_t, d_y = stream_op(
            f"softmax_slope_{'both' if self.symmetric else 'rows'}", t, y, None, None, rows, columns, row_ids,
            column_ids, alpha[None], own.start, True, self.backend,
        )  # fmt: skip
        z = match * alpha
        at_match = torch.zeros_like(z)
        for lse, w, uniform, _ in (rows, columns[:, own])[: 2 if self.symmetric else 1]:
            at_match += w * (torch.expm1(z - lse) + self.smoothing - uniform)
        d_t = d_t.addcmul_(at_match[:, None], y[own].to(wide))
        d_y[own].addcmul_(at_match[:, None], t.to(wide))
        d_scale = totals[0] * unit_t * unit_y * factor
        return d_t.mul_(factor * scale * unit_y), d_y.mul_(factor * scale * unit_t), d_scale


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
    check_reduction(reduction, group)
    options.check_flags(symmetric=symmetric)
    options.check_fraction("label_smoothing", label_smoothing)
    inputs = check_inputs(a, b, W_diag, W_blocks, normalize, backend)
    check_ids(ids, a)
    options.check_scalar("logit_scale", logit_scale, "a", a)
    sides = fold_sides(inputs)
    scale = scalar(logit_scale, sides.t)
    same = described(
        "info_nce", inputs, sides, scale, logit_scale=logit_scale, ids=ids is not None, symmetric=symmetric,
        label_smoothing=label_smoothing, reduction=reduction,
    )  # fmt: skip
    (ranks,) = spread(group, (a.shape[0],), a.device, same)
    ids = None if ids is None else ids.to(torch.int64)
    column_ids = None if ids is None else ranks.gather(ids)
    y = gather_rows(sides.y, ranks)
    op = _InfoNCE(reduction != "none", ranks, sides.backend, symmetric, float(label_smoothing))
    (loss,) = op(sides.t, y, scale, *operands(sides.t, y, sides.half, sides.backend), ids, column_ids)
    return reduce(loss, reduction, ranks.pairs)
