"""The public functions: check, choose a backend, call it.

One tensor's way through the package: `functional` (checks) → `triton_backend` (autocast, batch dimensions) → `bilinear`
(autograd) → `gssf_triton.kernels` (launcher, kernel), or → `torch_backend`.

Source of the metric: Diao et al., "GSSF: Generalized Structural Sparse Function for Deep Cross-modal Metric Learning",
IEEE TIP 2024, arXiv 2410.15266.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.fx
from torch import Tensor

from gssf_triton import checks
from gssf_triton.backend import resolve_backend
from gssf_triton.metric import Metric, accumulate_dtype
from gssf_triton.precision import joined, product_dtype
from gssf_triton.similarity import torch_backend, triton_backend


class Backend(Protocol):
    """What a backend computes, of arguments that fit each other."""

    def fold(self, x: Tensor, metric: Metric, normalize: bool) -> Tensor: ...

    def pairwise(self, a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype) -> Tensor: ...

    def pairwise_terms(
        self, a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]: ...

    def paired(self, a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype) -> Tensor: ...


BACKENDS: dict[str, Backend] = {"torch": torch_backend, "triton": triton_backend}


def fold_rows(x: Tensor, metric: Metric, normalize: bool, *, backend: str) -> Tensor:
    """T(x), (..., D), in float32 at least, under autocast too; without weights x itself, normalised if asked for.

    Nothing is rounded to half precision: that is left to the product that takes T(x).
    """
    x = x.to(accumulate_dtype(x.dtype))
    if metric.is_identity and not normalize:
        return x
    return BACKENDS[backend].fold(x, metric, normalize)


def folded(x: Tensor, metric: Metric, normalize: bool, *, backend: str) -> Tensor:
    """T(x), (..., D), in the dtype that rows like x are multiplied in."""
    dtype = product_dtype(x)
    if x.dtype == dtype != torch.float16:  # whose range T(x) may leave
        return BACKENDS[backend].fold(x, metric, normalize)
    return fold_rows(x, metric, normalize, backend=backend).to(dtype)


def _checked(
    a: Tensor,
    b: Tensor,
    metric: Metric,
    normalize: bool,
    out_dtype: torch.dtype | None,
    backend: str,
    paired: bool = False,
) -> tuple[Backend, Tensor, Tensor, torch.dtype]:
    """(backend, a, b, the dtype of S) of arguments that fit each other."""
    checks.check_flags(normalize=normalize)
    checks.check_pair(a, b)
    if paired:
        checks.check_rows(a, b)
    checks.check_weights("a", a, metric.W_diag, metric.W_blocks)
    checks.broadcast_batch(a=a, b=b)
    checks.check_dtype("out_dtype", out_dtype)
    a, b = joined(a, b)
    checks.check_same_dtype(a, b)
    return BACKENDS[resolve_backend(backend, a, metric.W_blocks)], a, b, out_dtype or product_dtype(a)


@torch.fx.wrap
def pairwise_sim(
    a: Tensor,
    b: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Similarity of every row of `a` with every row of `b` under the learned metric.

    $$S_{ij} = \sum_m a_{im} W^{diag}_m b_{jm} + \sum_g \sum_{p,q} a_{i,gB+p} W^{blocks}_{gpq} b_{j,gB+q}$$

    Args:
        a: Queries, (..., M, D), float16, bfloat16, float32 or float64; any strides.
        b: Gallery, (..., N, D), of a's dtype and device. Leading dimensions broadcast.
        W_diag: Diagonal weight, (D,), or None. Weights may be float32 beside half-precision features.
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D, or None. One of the two weights at least is given.
        normalize: Put both sides on the unit sphere first, x / max(‖x‖₂, 1e-12).
        out_dtype: Dtype of S; a's where None, autocast's under torch.autocast. Sums are in float32 at least, always.
        backend: "auto" (Triton where it compiles for the tensors' GPU, else torch), "triton" or "torch".

    Returns:
        S, (..., M, N). Differentiable twice in all four tensors, each gradient in its tensor's dtype.

    Raises:
        TypeError: an argument that is not a tensor.
        ValueError: shapes, dtypes or devices that do not agree, or no weight.
        RuntimeError: `backend="triton"` where Triton cannot run.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266): s(x, y) = xᵀ(W ⊙ U)y.

    Example:
        >>> import torch, gssf_triton
        >>> a = torch.tensor([[1.0, 0.0, 2.0, 0.0]])
        >>> b = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 0.0, 0.0]])
        >>> W_diag = torch.ones(4)
        >>> W_blocks = torch.tensor([[[0.0, 5.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
        >>> gssf_triton.pairwise_sim(a, b, W_diag)
        tensor([[3., 0.]])
        >>> gssf_triton.pairwise_sim(a, b, W_diag, W_blocks)
        tensor([[ 8., 15.]])
    """
    metric = Metric(W_diag, W_blocks)
    computing, a, b, dtype = _checked(a, b, metric, normalize, out_dtype, backend)
    return computing.pairwise(a, b, metric, normalize, dtype)


def pairwise_terms(
    a: Tensor,
    b: Tensor,
    W_diag: Tensor,
    W_blocks: Tensor,
    *,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The two terms of `pairwise_sim`, which sum to it.

    Args:
        a: Queries, (..., M, D).
        b: Gallery, (..., N, D).
        W_diag: Diagonal weight, (D,).
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D.
        normalize: As in `pairwise_sim`.
        out_dtype: As in `pairwise_sim`.
        backend: As in `pairwise_sim`.

    Returns:
        (diagonal, block), each (..., M, N).

    Raises:
        TypeError: an argument that is not a tensor; both weights are needed here.
        ValueError: shapes, dtypes or devices that do not agree.
        RuntimeError: `backend="triton"` where Triton cannot run.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch, gssf_triton
        >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> gssf_triton.pairwise_terms(a, b, torch.ones(2), torch.ones(1, 2, 2))
        (tensor([[11.]]), tensor([[21.]]))
    """
    checks.check_tensor("W_diag", W_diag)
    checks.check_tensor("W_blocks", W_blocks)
    metric = Metric(W_diag, W_blocks)
    computing, a, b, dtype = _checked(a, b, metric, normalize, out_dtype, backend)
    return computing.pairwise_terms(a, b, metric, normalize, dtype)


@torch.fx.wrap
def paired_sim(
    a: Tensor,
    b: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Similarity of a[i] with b[i] only: the diagonal of `pairwise_sim`, without forming the matrix.

    Args:
        a: (..., N, D).
        b: (..., N, D), as many rows as a. Leading dimensions broadcast.
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D, or None.
        normalize: As in `pairwise_sim`.
        out_dtype: As in `pairwise_sim`.
        backend: As in `pairwise_sim`.

    Returns:
        (..., N).

    Raises:
        TypeError: an argument that is not a tensor.
        ValueError: shapes, dtypes or devices that do not agree, or no weight.
        RuntimeError: `backend="triton"` where Triton cannot run.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch, gssf_triton
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> gssf_triton.paired_sim(a, a, torch.tensor([2.0, 3.0]))
        tensor([2., 3.])
    """
    metric = Metric(W_diag, W_blocks)
    computing, a, b, dtype = _checked(a, b, metric, normalize, out_dtype, backend, paired=True)
    return computing.paired(a, b, metric, normalize, dtype)


@torch.fx.wrap
def transform(
    x: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    side: str = "a",
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Fold the metric into one side, T(x): then a plain dot product gives the similarity.

    `pairwise_sim(a, b, …) == transform(a, …) @ b.T == a @ transform(b, …, side="b").T`, so a vector index that knows
    only dot products serves GSSF once the queries (or the gallery) are transformed.

    Args:
        x: Features, (..., D).
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D, or None.
        side: "a" folds for the left side of `pairwise_sim`, "b" (transposed blocks) for the right one.
        normalize: Put the rows on the unit sphere before they are folded.
        backend: As in `pairwise_sim`.

    Returns:
        T(x), of x's shape and dtype (autocast's under torch.autocast), rounded to that dtype. It may overflow float16;
        `pairwise_sim` and the others avoid that. If it matters, transform float32 features outside autocast.

    Raises:
        TypeError: an argument that is not a tensor.
        ValueError: shapes, dtypes or devices that do not agree, no weight, or an unknown side.
        RuntimeError: `backend="triton"` where Triton cannot run.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch, gssf_triton
        >>> W_blocks = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
        >>> x = torch.tensor([2.0, 3.0])
        >>> gssf_triton.transform(x, None, W_blocks)
        tensor([0., 2.])
        >>> gssf_triton.transform(x, None, W_blocks, side="b")
        tensor([3., 0.])
    """
    checks.check_features("x", x, min_dim=1)
    checks.check_weights("x", x, W_diag, W_blocks)
    checks.check_choice("side", side, ("a", "b"))
    checks.check_flags(normalize=normalize)
    metric = Metric(W_diag, W_blocks) if side == "a" else Metric(W_diag, W_blocks).mT
    return folded(x, metric, normalize, backend=resolve_backend(backend, x, W_blocks))


@torch.fx.wrap
def dense_metric(W_diag: Tensor | None = None, W_blocks: Tensor | None = None) -> Tensor:
    """The metric as one dense matrix, W ⊙ U: `pairwise_sim(a, b, …) == a @ dense_metric(…) @ b.T`.

    Args:
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D, or None.

    Returns:
        (D, D), in the weights' promoted dtype; differentiable.

    Raises:
        TypeError: a weight that is not a tensor.
        ValueError: weights whose shapes or devices do not agree, or no weight.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266): U is the topology, identity plus block diagonal.

    Example:
        >>> import torch, gssf_triton
        >>> gssf_triton.dense_metric(torch.ones(2), torch.tensor([[[2.0]], [[3.0]]]))
        tensor([[3., 0.],
                [0., 4.]])
    """
    checks.check_metric(W_diag, W_blocks)
    terms = []
    if W_diag is not None:
        terms.append(torch.diag_embed(W_diag))
    if W_blocks is not None:
        groups, size, _ = W_blocks.shape
        topology = torch.eye(groups, dtype=torch.bool, device=W_blocks.device).view(groups, 1, groups, 1)
        spread = torch.where(topology, W_blocks.unsqueeze(2), 0)
        terms.append(spread.reshape(groups * size, groups * size))
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]
