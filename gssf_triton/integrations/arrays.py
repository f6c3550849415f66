"""GSSF for any vector database: plain float32 arrays whose inner products are the similarities.

The metric is folded into the queries and the gallery is unchanged, so new weights need no re-indexing.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gssf_triton import checks
from gssf_triton.integrations import as_tensor
from gssf_triton.metric import IDENTITY, Metric
from gssf_triton.optional import require
from gssf_triton.precision import full_precision
from gssf_triton.similarity import functional, torch_backend
from gssf_triton.storage import check_target, read_npz, reason, regular, replacing, unusable

Features = Tensor | NDArray[np.floating]


def _matrix(name: str, x: Features) -> Tensor:
    """Features as a float32 (n, D) tensor."""
    if isinstance(x, np.ndarray):
        if x.dtype.kind != "f" or x.dtype.itemsize > 8:
            raise ValueError(f"{name} must be {checks.FLOAT_NAMES}, got an array of {x.dtype}")
        x = as_tensor(x)
    checks.check_kind(name, x, Tensor, "a torch.Tensor or a numpy.ndarray")
    x = checks.check_features(name, x)
    checks.check_matrix(name, x, "(n, D)")
    return _float(x)


def _float(x: Tensor) -> Tensor:
    return x.detach().float()


def _plain(x: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(x.cpu().numpy())


def folded_queries(
    queries: Features, W_diag: Tensor | None = None, W_blocks: Tensor | None = None, *, normalize: bool = False
) -> NDArray[np.float32]:
    """T(queries): their inner product with `gallery_rows` is the similarity. They must not be normalised again.

    Args:
        queries: (Q, D), a tensor or an array.
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block weight, (G, B, B), or None.
        normalize: Put the queries on the unit sphere *before* they are folded; give `gallery_rows` the same.

    Returns:
        (Q, D) float32, contiguous.

    Raises:
        TypeError: neither a tensor nor an array.
        ValueError: shapes or devices that do not agree, or no weight.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266): s(x, y) = xᵀ(W ⊙ U)y = ⟨T(x), y⟩.

    Example:
        >>> import torch
        >>> from gssf_triton.integrations.arrays import folded_queries, gallery_rows
        >>> queries, gallery = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
        >>> folded_queries(queries, torch.tensor([1.0, 10.0])) @ gallery_rows(gallery).T
        array([[ 83., 125.]], dtype=float32)
    """
    checks.check_flags(normalize=normalize)
    x = _matrix("queries", queries)
    checks.check_weights("queries", x, W_diag, W_blocks)
    with full_precision(x):
        metric = Metric(W_diag, W_blocks).map(_float)
        return _plain(functional.transform(x, metric.W_diag, metric.W_blocks, normalize=normalize))


def gallery_rows(gallery: Features, *, normalize: bool = False) -> NDArray[np.float32]:
    """The gallery as an index takes it, (N, D) float32 and contiguous: as it is, or on the unit sphere.

    Example:
        >>> import torch
        >>> from gssf_triton.integrations.arrays import gallery_rows
        >>> gallery_rows(torch.tensor([[3.0, 4.0]]), normalize=True)
        array([[0.6, 0.8]], dtype=float32)
    """
    checks.check_flags(normalize=normalize)
    return _plain(torch_backend.fold(_matrix("gallery", gallery), IDENTITY, normalize))


def _form(path: str | PathLike[str]) -> str:
    checks.check_path("path", path)
    suffix = Path(path).suffix.lower()
    if suffix not in (".npz", ".safetensors"):
        raise ValueError(f"path must end in .npz or .safetensors, got {str(path)!r}")
    return suffix


def save_arrays(
    path: str | PathLike[str],
    *,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    queries: Features | None = None,
    gallery: Features | None = None,
    normalize: bool = False,
) -> None:
    """Write what a vector database needs to a `.npz` or `.safetensors` file: folded queries, gallery rows, the weights.

    Args:
        path: Ends in `.npz` or `.safetensors` (the extra `gssf_triton[safetensors]`).
        W_diag: Diagonal weight, written as `W_diag`.
        W_blocks: Block weight, written as `W_blocks`.
        queries: (Q, D), written as `queries`, folded.
        gallery: (N, D), written as `gallery`, for inner products.
        normalize: As in `folded_queries` and `gallery_rows`.

    Raises:
        ValueError: another ending, no weight, or shapes that do not agree.
        OSError: a folder, or a file that may not be written.
        ModuleNotFoundError: `.safetensors` without the library.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from gssf_triton.integrations.arrays import load_arrays, save_arrays
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "index.npz"
        ...     save_arrays(path, W_diag=torch.ones(4), gallery=torch.ones(10, 4))
        ...     {name: array.shape for name, array in load_arrays(path).items()}
        {'W_diag': (4,), 'gallery': (10, 4)}
    """
    form = _form(path)
    check_target(Path(path))
    checks.check_flags(normalize=normalize)
    checks.check_metric(W_diag, W_blocks)
    weights = {"W_diag": W_diag, "W_blocks": W_blocks}
    arrays = {name: _plain(_float(weight)) for name, weight in weights.items() if weight is not None}
    if queries is not None:
        arrays["queries"] = folded_queries(queries, W_diag, W_blocks, normalize=normalize)
    if gallery is not None:
        rows = _matrix("gallery", gallery)
        metric = Metric(W_diag, W_blocks).map(Tensor.cpu)
        checks.check_weights("gallery", rows.cpu(), metric.W_diag, metric.W_blocks)
        arrays["gallery"] = gallery_rows(rows, normalize=normalize)
    if form == ".npz":
        with replacing(Path(path)) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    else:
        content = require("safetensors.numpy", "safetensors").save(arrays)
        with replacing(Path(path)) as file:
            file.write(content)


def load_arrays(path: str | PathLike[str]) -> dict[str, NDArray[Any]]:
    """Read a file that `save_arrays` wrote: name → array, in this machine's byte order. Nothing in it is unpickled.

    Raises:
        ValueError: another ending, or a file that is not whole; it is named.
        ModuleNotFoundError: `.safetensors` without the library.
    """
    if _form(path) == ".npz":
        return read_npz(Path(path))
    load = require("safetensors.numpy", "safetensors").load
    content = regular(Path(path)).read_bytes()
    try:
        arrays: dict[str, NDArray[Any]] = load(content)
    # The library's own error, and NumPy's of a dtype that it lacks.
    except Exception as error:
        raise unusable(Path(path), "arrays as safetensors", f"a file that cannot be read ({reason(error)})") from error
    return arrays
