"""The losses in float64 with the whole matrix stored: what the streaming ones are held to."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support import reference


def _similarities(a: Tensor, b: Tensor, weights: dict[str, Tensor | None], normalize: bool) -> Tensor:
    return reference.pairwise_sim(a, b, weights["W_diag"], weights["W_blocks"], normalize=normalize)


def _reduced(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    total = values.sum()
    return total / max(len(values), 1) if reduction == "mean" else total


def _others_of_same_id(ids: Tensor | None, N: int) -> Tensor:
    """Pairs of equal ids that are not the matching pair."""
    eye = torch.eye(N, dtype=torch.bool)
    return torch.zeros(N, N, dtype=torch.bool) if ids is None else (ids[:, None] == ids[None, :]) & ~eye


def info_nce(
    a: Tensor, b: Tensor, *, W_diag: Tensor | None, W_blocks: Tensor | None, logit_scale: Tensor, ids: Tensor | None,
    symmetric: bool = True, label_smoothing: float = 0.0, normalize: bool = False, reduction: str = "mean",
    memory: str = "least",
) -> Tensor:  # fmt: skip
    S = logit_scale * _similarities(a, b, {"W_diag": W_diag, "W_blocks": W_blocks}, normalize)
    barred = _others_of_same_id(ids, len(a))

    def cross_entropy(logits: Tensor) -> Tensor:
        log_p = logits.masked_fill(barred, float("-inf")).log_softmax(1)
        uniform = log_p.masked_fill(barred, 0).sum(1) / (~barred).sum(1)
        return -(1 - label_smoothing) * log_p.diagonal() - label_smoothing * uniform

    losses = (cross_entropy(S) + cross_entropy(S.T)) / 2 if symmetric else cross_entropy(S)
    return _reduced(losses, reduction)


def sigmoid_loss(
    a: Tensor, b: Tensor, *, W_diag: Tensor | None, W_blocks: Tensor | None, logit_scale: Tensor, logit_bias: Tensor,
    ids: Tensor | None, normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    S = _similarities(a, b, {"W_diag": W_diag, "W_blocks": W_blocks}, normalize)
    positive = torch.eye(len(a), dtype=torch.bool) | _others_of_same_id(ids, len(a))
    labels = torch.where(positive, 1.0, -1.0).double()
    return _reduced(-F.logsigmoid(labels * (logit_scale * S + logit_bias)).sum(1), reduction)


def triplet_loss(
    a: Tensor, b: Tensor, *, W_diag: Tensor | None, W_blocks: Tensor | None, margin: float = 0.2, hardest: bool = True,
    ids: Tensor | None, normalize: bool = False, reduction: str = "sum",
) -> Tensor:  # fmt: skip
    S = _similarities(a, b, {"W_diag": W_diag, "W_blocks": W_blocks}, normalize)
    barred = torch.eye(len(a), dtype=torch.bool) | _others_of_same_id(ids, len(a))
    by_row = (margin + S - S.diagonal()[:, None]).clamp_min(0).masked_fill(barred, 0)
    by_column = (margin + S - S.diagonal()[None, :]).clamp_min(0).masked_fill(barred, 0)
    if not len(a):
        return _reduced(S.sum(1), reduction)
    if hardest:
        return _reduced(by_row.max(1).values + by_column.max(0).values, reduction)
    return _reduced(by_row.sum(1) + by_column.sum(0), reduction)


def distillation_loss(
    a: Tensor, b: Tensor, *, W_diag: Tensor | None, W_blocks: Tensor | None, teacher: dict[str, Any],
    logit_scale: Tensor, normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    student = logit_scale * _similarities(a, b, {"W_diag": W_diag, "W_blocks": W_blocks}, normalize)
    weights = {"W_diag": teacher["teacher_W_diag"], "W_blocks": teacher["teacher_W_blocks"]}
    x, y = teacher["teacher_a"].double(), teacher["teacher_b"].double()
    if weights["W_diag"] is None and weights["W_blocks"] is None:
        weights["W_diag"] = torch.ones(x.shape[1], dtype=torch.float64)
    target = (logit_scale.detach() * _similarities(x, y, weights, normalize)).softmax(1)
    return _reduced(F.kl_div(student.log_softmax(1), target, reduction="none").sum(1), reduction)
