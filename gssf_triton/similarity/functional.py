"""The public functions: check, choose a backend, call it.

One tensor's way through the package: `functional` (checks, autocast, batch dimensions) → `ops` (autograd) →
`gssf_triton.kernels` (launcher, kernel), or → `torch_backend`.

Source of the metric: Diao et al., "GSSF: Generalized Structural Sparse Function for Deep Cross-modal Metric Learning",
IEEE TIP 2024, arXiv 2410.15266.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.fx
from torch import Tensor

from gssf_triton import checks, options
from gssf_triton.backend import resolve_backend
from gssf_triton.precision import float16_operands, full_precision, joined, product_dtype
from gssf_triton.similarity import bilinear, paired, terms, torch_backend


def fold_rows(x: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, normalize: bool, *, backend: str) -> Tensor:
    """T(x), (..., D), in float32 at least, whatever autocast says; without weights the rows, normalised or as they are.

    Half-precision rows are rounded nowhere on the way: that is for the product that takes them.
    """
    x = x.to(torch_backend.accumulate_dtype(x.dtype))
    with full_precision(x):
        if backend == "torch":
            return torch_backend.fold(x, W_diag, W_blocks, normalize)
        if W_diag is None and W_blocks is None and not normalize:
            return x
        return bilinear.fold(torch_backend.as_rows(x), W_diag, W_blocks, normalize).view(x.shape)


def _kernels_take(x: Tensor, backend: str) -> bool:
    """True where the operators fold and multiply rows as they are: not where autocast has a dtype of its own for it."""
    return backend == "triton" and x.dtype == product_dtype(x)


def _as_matrices(a: Tensor, b: Tensor, batch: torch.Size | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """a (Z, M, D) and b (Z, N, D) for the kernels.

    A gallery shared by the whole batch makes one tall matrix of the queries; other shared sides are broadcast by their
    stride where they can be.
    """
    M, N, D = a.shape[-2], b.shape[-2], a.shape[-1]
    matrices = math.prod(batch)
    if math.prod(b.shape[:-2]) == 1:
        return a.expand(*batch, M, D).reshape(1, matrices * M, D), b.reshape(1, N, D)
    return a.expand(*batch, M, D).reshape(matrices, M, D), b.expand(*batch, N, D).reshape(matrices, N, D)


@dataclass(frozen=True)
class _Call:
    """A call of `pairwise_sim` or `pairwise_terms` that passed every check."""

    a: Tensor
    b: Tensor
    normalize: bool
    batch: tuple[int, ...]
    out_dtype: torch.dtype
    backend: str

    @property
    def by_kernels(self) -> bool:
        return _kernels_take(self.a, self.backend)

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        return _as_matrices(self.a, self.b, self.batch)

    def shaped(self, S: Tensor) -> Tensor:
        return S.view(*self.batch, self.a.shape[-2], self.b.shape[-2])

    def similarity(self, W_diag: Tensor | None, W_blocks: Tensor | None) -> Tensor:
        if self.by_kernels:
            return self.shaped(bilinear.pairwise(*self.matrices, W_diag, W_blocks, self.normalize, self.out_dtype))
        folding = partial(fold_rows, backend=self.backend)
        dtype = product_dtype(self.a)
        with full_precision(self.a):
            t, y = torch_backend.operands(self.a, self.b, W_diag, W_blocks, self.normalize, folding)
            if self.backend == "torch" or self.out_dtype == dtype:
                return torch_backend.product(t, y, dtype, self.out_dtype)
            # The library would round the sums, a kernel does not; to it these rows are features of the identity.
            t, y = float16_operands(t, y) if dtype == torch.float16 else (t.to(dtype), y.to(dtype))
            identity = t.new_ones(t.shape[-1])
            S = bilinear.pairwise(*_as_matrices(t, y, self.batch), identity, None, False, self.out_dtype)
            return self.shaped(S)


def _check_pairwise(
    a: Tensor,
    b: Tensor,
    W_diag: Tensor | None,
    W_blocks: Tensor | None,
    normalize: bool,
    out_dtype: torch.dtype | None,
    backend: str,
) -> _Call:
    options.check_flags(normalize=normalize)
    checks.check_pair(a, b)
    checks.check_weights("a", a, W_diag, W_blocks)
    batch = tuple(checks.broadcast_batch(a, b))
    options.check_dtype("out_dtype", out_dtype)
    a, b = joined(a, b)
    checks.check_same_dtype(a, b)
    out_dtype = out_dtype or product_dtype(a)
    return _Call(a, b, normalize, batch, out_dtype, resolve_backend(backend, a, W_blocks))


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
    return _check_pairwise(a, b, W_diag, W_blocks, normalize, out_dtype, backend).similarity(W_diag, W_blocks)


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
    """The two terms of `pairwise_sim` apart; they sum to it.

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
    call = _check_pairwise(a, b, W_diag, W_blocks, normalize, out_dtype, backend)
    if not call.by_kernels or call.a.dtype == torch.float16:  # whose range T(a) may leave
        return call.similarity(W_diag, None), call.similarity(None, W_blocks)
    diagonal, block = terms.pairwise_terms(*call.matrices, W_diag, W_blocks, normalize, call.out_dtype)
    return call.shaped(diagonal), call.shaped(block)


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
    options.check_flags(normalize=normalize)
    checks.check_pair(a, b)
    checks.check_paired_rows(a, b)
    checks.check_weights("a", a, W_diag, W_blocks)
    batch = checks.broadcast_batch(a, b)
    options.check_dtype("out_dtype", out_dtype)
    a, b = joined(a, b)
    checks.check_same_dtype(a, b)
    dtype = out_dtype or product_dtype(a)
    if resolve_backend(backend, a, W_blocks) == "torch":
        with full_precision(a):
            return torch_backend.paired(a, b, W_diag, W_blocks, normalize, dtype)
    shape = (*batch, *a.shape[-2:])
    rows_a, rows_b = (torch_backend.as_rows(x.expand(shape)) for x in (a, b))
    if a.dtype == torch.float16:
        # The kernel multiplies in the rows' dtype, and weights have a range of their own.
        rows_a, rows_b = rows_a.float(), rows_b.float()
    return paired.paired(rows_a, rows_b, W_diag, W_blocks, normalize, dtype).view(shape[:-1])


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
        T(x), of x's shape and dtype (autocast's under torch.autocast). It is rounded to that dtype, and must fit it:
        `pairwise_sim` and the others take care of a T(x) beyond float16's range, a product with what this returns
        cannot. Under autocast, too, transform float32 features outside it where that matters.

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
    options.check_choice("side", side, ("a", "b"))
    options.check_flags(normalize=normalize)
    weight = W_blocks.mT if W_blocks is not None and side == "b" else W_blocks
    backend = resolve_backend(backend, x, W_blocks)
    if _kernels_take(x, backend) and x.dtype != torch.float16:  # whose range weights may leave
        return bilinear.fold(torch_backend.as_rows(x), W_diag, weight, normalize).view(x.shape)
    return fold_rows(x, W_diag, weight, normalize, backend=backend).to(product_dtype(x))


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
