"""Region–word scores in float64 as their papers write them: a loop over pairs, of whose rows only the valid ones exist.

Nothing is masked, padded, folded or streamed, so nothing is shared with the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gssf_triton
from support.reference import WORST_COORDINATE, assert_close, dense_metric, features, tolerance, weights

Mask = Tensor | None


def _valid(x: Tensor, mask: Mask, index: int) -> Tensor:
    return x[index] if mask is None else x[index][mask[index].bool()]


def _loop(regions: Tensor, words: Tensor, region_mask: Mask, word_mask: Mask, score: Callable[..., Tensor]) -> Tensor:
    """score(x, y) of every pair's valid rows; 0 where either has none."""
    rows = []
    for i in range(len(regions)):
        x = _valid(regions, region_mask, i)
        row = []
        for t in range(len(words)):
            y = _valid(words, word_mask, t)
            nothing = 0 * (x.nan_to_num(0, 0, 0).sum() + y.nan_to_num(0, 0, 0).sum())
            row.append(score(x, y) if len(x) and len(y) else nothing)
        rows.append(torch.stack(row) if row else regions.new_zeros(0))
    return torch.stack(rows) if rows else regions.new_zeros(0, len(words))


def late_interaction(
    regions: Tensor,
    words: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    region_mask: Mask = None,
    word_mask: Mask = None,
    pooling: str = "max-mean",
    sharpness: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    metric = dense_metric(W_diag, W_blocks).to(regions.dtype)
    if normalize:
        regions, words = (torch.nn.functional.normalize(x, dim=-1) for x in (regions, words))

    def score(x: Tensor, y: Tensor) -> Tensor:
        S = x @ metric @ y.T
        if pooling == "lse-mean":
            return ((sharpness * S).logsumexp(0) / sharpness).mean()
        best = torch.stack([column[column.argmax()] for column in S.T])
        return best.sum() if pooling == "max-sum" else best.mean()

    return _loop(regions, words, region_mask, word_mask, score)


def cross_attention_sim(
    regions: Tensor,
    words: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    region_mask: Mask = None,
    word_mask: Mask = None,
    smooth: float = 9.0,
    normalize: bool = False,
) -> Tensor:
    metric = dense_metric(W_diag, W_blocks).to(regions.dtype)

    def score(x: Tensor, y: Tensor) -> Tensor:
        x, y = (torch.nn.functional.normalize(rows, dim=-1) for rows in (x, y))
        e = torch.nn.functional.leaky_relu(x @ y.T, 0.1)
        e = e / (e.norm(dim=1, keepdim=True) + 1e-8)
        c = torch.nn.functional.normalize((smooth * e).softmax(0).T @ x, dim=-1)
        return torch.einsum("lm,mn,ln->l", c, metric, y).mean()

    return _loop(regions, words, region_mask, word_mask, score)


REFERENCES = {"late_interaction": late_interaction, "cross_attention_sim": cross_attention_sim}


def mask(items: int, rows: int, device: str, empty: bool = True) -> Tensor:
    """Any pattern, an item with no valid row and one with all of them among them where there are enough items."""
    valid = torch.rand(items, rows) < 0.6
    if items > 2 and empty:
        valid[items // 2], valid[0] = False, True
    return valid.to(device)


def problem(
    items: tuple[int, int],
    rows: tuple[int, int],
    G: int,
    B: int,
    kind: str = "diag+blocks",
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Any]:
    """Leaves: regions (I, R, D), words (T, L, D) and the weights that `kind` names, in float32 at least."""
    tensors: dict[str, Tensor | None] = {
        name: features(n, k, G * B, dtype=dtype, device=device)
        for name, n, k in zip(("regions", "words"), items, rows, strict=True)
    }
    wide = torch.promote_types(dtype, torch.float32)
    tensors |= weights(kind, G, B, wide, device)
    return {name: None if x is None else x.requires_grad_() for name, x in tensors.items()}


def _typical_similarity(
    regions: Tensor, words: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, *, normalize: bool
) -> Tensor:
    """Root mean square of the similarities if the terms of each had random signs: one may cancel to nothing."""
    if normalize:
        regions, words = (torch.nn.functional.normalize(x, dim=-1) for x in (regions, words))
    x, y = ((rows.detach().double() ** 2).flatten(0, 1).mean(0) for rows in (regions, words))
    return (x @ dense_metric(W_diag, W_blocks).detach() ** 2 @ y).sqrt()


def _in_dtype(
    function: str, tensors: dict[str, Tensor | None], incoming: Tensor | None, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loop's scores and gradients, computed in `dtype`."""
    copies = {
        name: None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad) for name, x in tensors.items()
    }
    scores = REFERENCES[function](**copies, **options)
    leaves = {name: x for name, x in copies.items() if x is not None and x.requires_grad}
    if not leaves:
        return scores, {}
    grads = torch.autograd.grad(scores, list(leaves.values()), incoming.to(dtype), materialize_grads=True)
    return scores.detach(), dict(zip(leaves, grads, strict=True))


def _error(actual: Tensor, exact: Tensor) -> float:
    """The smallest tolerance under which `assert_close` lets `actual` pass."""
    if not exact.numel() or not exact.any():
        return 0.0
    error, typical = (actual.double() - exact).abs(), exact.norm() / exact.numel() ** 0.5
    return max(float(error.norm() / exact.norm()), float((error / (exact.abs() + typical)).max()) / WORST_COORDINATE)


#: Where the loop itself, in float32, or in float64 on inputs rounded to float32, is off by more than the table allows,
#: we may be off by this many times as much: a softmax of large differences, or e / ‖e‖ of a caption whose words all but
#: miss a region, magnify any rounding. Two samples of it, since one may be off by little by chance.
TIMES_THE_LOOPS_ERROR = 6.0


def _rounded(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The tensors in float64, each number off by about half a unit in float32's last place."""
    shaken: dict[str, Tensor | None] = {}
    for name, x in tensors.items():
        if x is None or not x.is_floating_point():
            shaken[name] = x
        else:
            wide = x.detach().double()
            shaken[name] = (wide * (1 + 2.0**-24 * torch.randn_like(wide))).requires_grad_(x.requires_grad)
    return shaken


def check(function: str, tensors: dict[str, Tensor | None], *, backend: str, **options: Any) -> Tensor:
    """Hold the scores and every gradient to the reference; returns the scores."""
    kept = {name: None if x is None else x.detach().clone() for name, x in tensors.items()}
    scores = getattr(gssf_triton, function)(**tensors, backend=backend, **options)
    incoming = torch.randn_like(scores)
    leaves = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
    grads = torch.autograd.grad(scores, list(leaves.values()), incoming) if leaves else ()
    exact, exact_grads = _in_dtype(function, tensors, incoming, torch.float64, **options)
    rough, rough_grads = _in_dtype(function, tensors, incoming, torch.float32, **options)
    shaken, shaken_grads = _in_dtype(function, _rounded(tensors), incoming, torch.float64, **options)

    dtype = tensors["regions"].dtype  # type: ignore[union-attr]
    assert scores.dtype == dtype
    normalized = options.get("normalize", False) or function == "cross_attention_sim"
    size = _typical_similarity(**tensors, normalize=normalized) / max(1, tensors["words"].shape[1]) ** 0.5
    margin = 0.0 if dtype == torch.float64 else TIMES_THE_LOOPS_ERROR
    tol = max(tolerance(dtype), margin * _error(rough, exact), margin * _error(shaken, exact))
    assert_close(scores, exact, tol, name=f"{function} scores", size=size.expand_as(exact))
    for (name, x), grad in zip(leaves.items(), grads, strict=True):
        assert grad.dtype == x.dtype and grad.shape == x.shape
        off = max(_error(sample[name], exact_grads[name]) for sample in (rough_grads, shaken_grads))
        tol = max(tolerance(dtype, x.dtype), margin * off)
        assert_close(grad, exact_grads[name], tol, name=f"{function} d{name}")
    for name, x in tensors.items():
        assert x is None or torch.equal(x.detach(), kept[name]), f"{function} changed its input {name}"
    return scores.detach()
