"""Every check of a tensor at the boundary: what came, what was wanted, before anything runs.

Each function raises `TypeError` for something that is not a tensor and `ValueError` for a tensor that does not fit; the
message names the argument, what came and what was wanted. Nothing here reads a tensor's values, so no check ever waits
for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT_NAMES = "float16, bfloat16, float32 or float64"


def shape_of(x: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, which prints as users write it."""
    return tuple(x.shape)


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        hint = " (torch.from_numpy makes a tensor of it)" if type(x).__module__ == "numpy" else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}{hint}")


def check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in FEATURE_DTYPES:
        raise ValueError(f"{name} must be {FLOAT_NAMES}, got {x.dtype}")


def check_features(name: str, x: object, min_dim: int = 2) -> None:
    """Features are floating-point tensors of at least `min_dim` dimensions, the last one the D channels."""
    check_tensor(name, x)
    assert isinstance(x, Tensor)
    check_floating(name, x)
    if x.dim() < min_dim:
        wanted = "(..., rows, D)" if min_dim == 2 else "(..., D)"
        raise ValueError(f"{name} must have at least {min_dim} dimension(s) {wanted}, got shape {shape_of(x)}")


def check_same_device(reference_name: str, reference: Tensor, name: str, x: Tensor) -> None:
    if x.device != reference.device:
        raise ValueError(
            f"{name} must be on {reference_name}'s device: {reference_name} is on {reference.device}, "
            f"{name} is on {x.device}"
        )


def _check_weight_forms(W_diag: object, W_blocks: object, prefix: str = "", heads: bool = False) -> None:
    """One weight at least; W_diag a float vector, W_blocks a float (G, B, B); with `heads` also one of each a head."""
    diag, blocks = f"{prefix}W_diag", f"{prefix}W_blocks"
    if W_diag is None and W_blocks is None:
        raise ValueError(f"no weight given: {diag} and {blocks} are both None, at least one of them is wanted")
    if W_diag is not None:
        check_tensor(diag, W_diag)
        assert isinstance(W_diag, Tensor)
        check_floating(diag, W_diag)
        if W_diag.dim() not in (1, 1 + heads):
            hint = f" (blocks are given as {blocks}=)" if W_diag.dim() >= 3 else ""
            raise ValueError(f"{diag} must have shape (D,){' or (H, D)' * heads}, got {shape_of(W_diag)}{hint}")
    if W_blocks is not None:
        check_tensor(blocks, W_blocks)
        assert isinstance(W_blocks, Tensor)
        check_floating(blocks, W_blocks)
        shape = W_blocks.shape
        if W_blocks.dim() not in (3, 3 + heads) or shape[-2] != shape[-1] or shape[-1] == 0:
            form = f"(G, B, B){' or (H, G, B, B)' * heads}"
            raise ValueError(f"{blocks} must have shape {form}, square blocks, B >= 1, got {shape_of(W_blocks)}")


def check_weights(
    name: str, x: Tensor, W_diag: object, W_blocks: object, *, prefix: str = "", heads: bool = False
) -> None:
    """W_diag (D,) and W_blocks (G, B, B) with G*B = D, at least one of them, on the features' device.

    `prefix` is what the caller's arguments have before these names; with `heads` a weight may be one a head as well.
    """
    _check_weight_forms(W_diag, W_blocks, prefix, heads)
    channels = x.shape[-1]
    if isinstance(W_diag, Tensor):
        if W_diag.shape[-1] != channels:
            raise ValueError(
                f"{prefix}W_diag must have shape ({channels},){f' or (H, {channels})' * heads}, the channels of "
                f"{name} {shape_of(x)}, got {shape_of(W_diag)}"
            )
        check_same_device(name, x, f"{prefix}W_diag", W_diag)
    if isinstance(W_blocks, Tensor):
        covered = W_blocks.shape[-3] * W_blocks.shape[-2]
        if covered != channels:
            raise ValueError(
                f"{prefix}W_blocks of shape {shape_of(W_blocks)} covers G*B = {covered} channels, "
                f"but {name} of shape {shape_of(x)} has D = {channels}"
            )
        check_same_device(name, x, f"{prefix}W_blocks", W_blocks)


def check_metric(W_diag: object, W_blocks: object) -> None:
    """The weights alone, with no features beside them: they must agree with each other."""
    _check_weight_forms(W_diag, W_blocks)
    if isinstance(W_diag, Tensor) and isinstance(W_blocks, Tensor):
        check_weights("W_diag", W_diag, None, W_blocks)


def check_pair(a: object, b: object, names: tuple[str, str] = ("a", "b")) -> None:
    """Two sets of features that can meet: same device and D."""
    name_a, name_b = names
    check_features(name_a, a)
    check_features(name_b, b)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"{name_a} and {name_b} must have the same D: {name_a} is {shape_of(a)}, {name_b} is {shape_of(b)}"
        )
    check_same_device(name_a, a, name_b, b)


def check_batches(names: tuple[str, str], a: object, b: object, paired: bool) -> None:
    """Two matrices of features, (M, D) and (N, D); with `paired` M = N, a[i] matching b[i]."""
    check_pair(a, b, names)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    for name, x in zip(names, (a, b), strict=True):
        if x.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions (rows, D), got shape {shape_of(x)}")
    if paired and a.shape[0] != b.shape[0]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same number of rows, {names[0]}[i] matching {names[1]}[i]: "
            f"{names[0]} is {shape_of(a)}, {names[1]} is {shape_of(b)}"
        )


def check_same_dtype(a: Tensor, b: Tensor, names: tuple[str, str] = ("a", "b")) -> None:
    if a.dtype != b.dtype:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same dtype: {names[0]} is {a.dtype}, {names[1]} is {b.dtype}"
        )


def broadcast_batch(a: Tensor, b: Tensor) -> Sequence[int]:
    """The common leading dimensions of a (..., M, D) and b (..., N, D)."""
    try:
        return torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"the leading dimensions of a and b must broadcast: a is {shape_of(a)}, b is {shape_of(b)}"
        ) from None


def check_paired_rows(a: Tensor, b: Tensor) -> None:
    if a.shape[-2] != b.shape[-2]:
        raise ValueError(
            f"a and b must have the same number of rows to be paired: a is {shape_of(a)}, b is {shape_of(b)}"
        )


def check_head_weights(q: Tensor, W_diag: object, W_blocks: object) -> None:
    """Attention's metric: shared, (D,) and (G, B, B), or (H, D) and (H, G, B, B) one a head of q (..., H, L, D)."""
    check_weights("q", q, W_diag, W_blocks, heads=True)
    heads = q.shape[-3] if q.dim() > 2 else None
    for name, weight, dims, form in (("W_diag", W_diag, 2, "(H, D)"), ("W_blocks", W_blocks, 4, "(H, G, B, B)")):
        if isinstance(weight, Tensor) and weight.dim() == dims and weight.shape[0] != heads:
            raise ValueError(
                f"{name} must have shape {form} with the H, D of q (..., H, L, D) {shape_of(q)}, got {shape_of(weight)}"
            )


def check_attention(q: object, k: object, v: object) -> None:
    """q (..., L, D), k (..., S, D) and v (..., S, E) that can meet."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_features(name, x)
    assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    check_same_device("q", q, "k", k)
    check_same_device("q", q, "v", v)
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same D: q is {shape_of(q)}, k is {shape_of(k)}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have the same number of rows: k is {shape_of(k)}, v is {shape_of(v)}")
    try:
        torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"the leading dimensions of q, k and v must broadcast: q is {shape_of(q)}, k is {shape_of(k)}, "
            f"v is {shape_of(v)}"
        ) from None


def check_mask(
    name: str,
    mask: object,
    reference_name: str,
    reference: Tensor,
    shapes: Sequence[Sequence[int]],
    broadcast: bool = False,
) -> None:
    """A boolean or floating-point mask of one of `shapes`, or with `broadcast` one that broadcasts to the first."""
    if mask is None:
        return
    check_tensor(name, mask)
    assert isinstance(mask, Tensor)
    if mask.dtype != torch.bool and mask.dtype not in FEATURE_DTYPES:
        raise ValueError(f"{name} must be bool, {FLOAT_NAMES}, got {mask.dtype}")
    wanted = [tuple(shape) for shape in shapes]
    if shape_of(mask) not in wanted:
        try:
            fits = broadcast and tuple(torch.broadcast_shapes(mask.shape, wanted[0])) == wanted[0]
        except RuntimeError:
            fits = False
        if not fits:
            form = "broadcast to" if broadcast else "have shape"
            raise ValueError(f"{name} must {form} {' or '.join(map(str, wanted))}, got {shape_of(mask)}")
    check_same_device(reference_name, reference, name, mask)
