"""Every check at the boundary: one function a kind of fault, and one text for each.

A function raises `TypeError` for something of the wrong type and `ValueError` for something that does not fit. The
message names the argument, what came and what was wanted. Nothing here reads a tensor's values, so no check ever waits
for a device: where a tensor may have been passed by mistake, the message gives its type, not its value.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT_NAMES = "float16, bfloat16, float32 or float64"


def shape_of(x: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple."""
    return tuple(x.shape)


def wrong_type(name: str, wanted: str, value: object) -> TypeError:
    return TypeError(f"{name} must be {wanted}, got {type(value).__name__}")


def wrong_shape(name: str, wanted: str, x: Tensor) -> ValueError:
    return ValueError(f"{name} must have shape {wanted}, got {shape_of(x)}")


def _listed(names: Sequence[str], values: Sequence[object]) -> tuple[str, str]:
    """("q, k and v", "q is …, k is …, v is …") of what came."""
    came = ", ".join(f"{name} is {value}" for name, value in zip(names, values, strict=True))
    return f"{', '.join(names[:-1])} and {names[-1]}", came


def differing(what: str, names: Sequence[str], values: Sequence[object]) -> ValueError:
    """The error that `names` differ in `what`."""
    joint, came = _listed(names, values)
    return ValueError(f"{joint} must have the same {what}: {came}")


def check_tensor(name: str, x: object) -> Tensor:
    if isinstance(x, Tensor):
        return x
    hint = " (torch.from_numpy makes a tensor of it)" if type(x).__module__ == "numpy" else ""
    raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}{hint}")


def check_floating(name: str, x: object) -> Tensor:
    x = check_tensor(name, x)
    if x.dtype not in FEATURE_DTYPES:
        raise ValueError(f"{name} must be {FLOAT_NAMES}, got {x.dtype}")
    return x


def check_features(name: str, x: object, min_dim: int = 2) -> Tensor:
    """Features are floating-point tensors of at least `min_dim` dimensions, the last one the D channels."""
    x = check_floating(name, x)
    if x.dim() < min_dim:
        wanted = "(..., rows, D)" if min_dim == 2 else "(..., D)"
        raise ValueError(f"{name} must have at least {min_dim} dimension(s) {wanted}, got shape {shape_of(x)}")
    return x


def check_matrix(name: str, x: Tensor, wanted: str) -> None:
    if x.dim() != 2:
        raise wrong_shape(name, wanted, x)


def check_same_device(reference_name: str, reference: Tensor, name: str, x: Tensor) -> None:
    if x.device != reference.device:
        raise ValueError(
            f"{name} must be on {reference_name}'s device: {reference_name} is on {reference.device}, "
            f"{name} is on {x.device}"
        )


def check_same_dtype(a: Tensor, b: Tensor, names: tuple[str, str] = ("a", "b")) -> None:
    if a.dtype != b.dtype:
        raise differing("dtype", names, (a.dtype, b.dtype))


def check_meeting(a: Tensor, b: Tensor, names: tuple[str, str]) -> None:
    """Rows of one D on one device."""
    if a.shape[-1] != b.shape[-1]:
        raise differing("D", names, (shape_of(a), shape_of(b)))
    check_same_device(names[0], a, names[1], b)


def check_rows(a: Tensor, b: Tensor, names: tuple[str, str] = ("a", "b"), why: str = " to be paired") -> None:
    """As many rows on each side."""
    if a.shape[-2] != b.shape[-2]:
        raise differing(f"number of rows{why}", names, (shape_of(a), shape_of(b)))


def check_pair(a: object, b: object, names: tuple[str, str] = ("a", "b")) -> tuple[Tensor, Tensor]:
    """Two sets of features, (..., rows, D) each, that can meet: same device and D."""
    a, b = check_features(names[0], a), check_features(names[1], b)
    check_meeting(a, b, names)
    return a, b


def check_batches(a: object, b: object, names: tuple[str, str] = ("a", "b"), *, paired: bool) -> tuple[Tensor, Tensor]:
    """Two matrices of features, (M, D) and (N, D); with `paired` M = N, a[i] matching b[i]."""
    a, b = check_pair(a, b, names)
    for name, x in zip(names, (a, b), strict=True):
        if x.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions (rows, D), got shape {shape_of(x)}")
    if paired:
        check_rows(a, b, names, f", {names[0]}[i] matching {names[1]}[i]")
    return a, b


def broadcast_batch(**sides: Tensor) -> tuple[int, ...]:
    """The common leading dimensions of features (..., rows, D)."""
    if all(x.dim() == 2 for x in sides.values()):
        return ()
    first, *others = shapes = [tuple(x.shape[:-2]) for x in sides.values()]
    # torch's own answer takes 10 µs. Traced sizes are not compared: that would be a guard.
    if not torch.compiler.is_compiling() and all(shape == first for shape in others):
        return first
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        names, came = _listed(list(sides), [shape_of(x) for x in sides.values()])
        raise ValueError(f"the leading dimensions of {names} must broadcast: {came}") from None


def check_items(name: str, x: object, row: str) -> Tensor:
    """Features of items that have several rows each, (items, rows, D)."""
    x = check_features(name, x, min_dim=1)
    if x.dim() != 3:
        raise wrong_shape(name, f"(items, {row}, D)", x)
    return x


def check_regions_and_words(regions: object, words: object) -> tuple[Tensor, Tensor]:
    """Regions (I, R, D) and words (T, L, D) of one D and device."""
    regions, words = check_items("regions", regions, "regions"), check_items("words", words, "words")
    check_meeting(regions, words, ("regions", "words"))
    return regions, words


def check_gallery_array(queries: Tensor, gallery: np.ndarray) -> None:
    """A gallery that is read from an array: (N, D) of the queries' dtype."""
    if gallery.ndim != 2:
        raise ValueError(f"gallery must have shape (N, D), got {gallery.shape}")
    if gallery.dtype.name != str(queries.dtype).removeprefix("torch."):
        raise differing("dtype", ("queries", "gallery"), (queries.dtype, f"an array of {gallery.dtype}"))
    if gallery.shape[1] != queries.shape[1]:
        raise differing("D", ("queries", "gallery"), (shape_of(queries), gallery.shape))


def _check_weight_forms(W_diag: object, W_blocks: object, prefix: str = "", heads: bool = False) -> None:
    """One weight at least; W_diag a float vector, W_blocks a float (G, B, B); with `heads` also one of each a head."""
    diag, blocks = f"{prefix}W_diag", f"{prefix}W_blocks"
    if W_diag is None and W_blocks is None:
        raise ValueError(f"no weight given: {diag} and {blocks} are both None, at least one of them is wanted")
    if W_diag is not None:
        W_diag = check_floating(diag, W_diag)
        if W_diag.dim() not in (1, 1 + heads):
            hint = f" (blocks are given as {blocks}=)" if W_diag.dim() >= 3 else ""
            raise ValueError(f"{diag} must have shape (D,){' or (H, D)' * heads}, got {shape_of(W_diag)}{hint}")
    if W_blocks is not None:
        W_blocks = check_floating(blocks, W_blocks)
        shape = W_blocks.shape
        if W_blocks.dim() not in (3, 3 + heads) or shape[-2] != shape[-1] or shape[-1] == 0:
            form = f"(G, B, B){' or (H, G, B, B)' * heads}"
            raise wrong_shape(blocks, f"{form}, square blocks, B >= 1", W_blocks)


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
            wanted = f"({channels},){f' or (H, {channels})' * heads}, the channels of {name} {shape_of(x)}"
            raise wrong_shape(f"{prefix}W_diag", wanted, W_diag)
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
    """Weights without features: they must agree with each other."""
    _check_weight_forms(W_diag, W_blocks)
    if isinstance(W_diag, Tensor) and isinstance(W_blocks, Tensor):
        check_weights("W_diag", W_diag, None, W_blocks)


def _check_whole(name: str, x: Tensor, wanted: str) -> None:
    if x.is_floating_point() or x.is_complex():
        raise ValueError(f"{name} must be {wanted}, got {x.dtype}")


def check_labels(name: str, labels: object, count: int, of: str, features: Tensor) -> Tensor:
    """One whole number for each of the `count` rows of `of`, on the features' device: of any integer dtype, as int64.

    As `Tensor.long` has them: uint64 beyond 2⁶³ count on from −2⁶³, which keeps different ones different.
    """
    labels = check_tensor(name, labels)
    if labels.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {labels.dtype}")
    _check_whole(name, labels, "integers")
    if shape_of(labels) != (count,):
        raise wrong_shape(name, f"({count},), one for each row of {of}", labels)
    check_same_device(of, features, name, labels)
    return labels.long()


def check_pair_mask(name: str, mask: object, shape: tuple[int, int], queries: Tensor) -> Tensor:
    """A mask of queries by gallery, as booleans."""
    mask = check_tensor(name, mask)
    _check_whole(name, mask, "bool or integers, True or not 0 where an item may be ranked")
    if shape_of(mask) != shape:
        raise wrong_shape(name, f"{shape}, queries by gallery", mask)
    check_same_device("queries", queries, name, mask)
    return mask if mask.dtype == torch.bool else mask != 0


def check_row_mask(name: str, mask: object, of: str, x: Tensor) -> Tensor | None:
    """A mask of x's items and rows, True (or not 0) where a row is valid, as booleans; or None."""
    if mask is None:
        return None
    mask = check_tensor(name, mask)
    _check_whole(name, mask, "bool (or integer), true where a row is valid")
    if mask.shape != x.shape[:2]:
        raise wrong_shape(name, f"{shape_of(x)[:2]}, the items and rows of {of} {shape_of(x)}", mask)
    check_same_device(of, x, name, mask)
    return mask if mask.dtype == torch.bool else mask != 0


def check_flags(**flags: object) -> None:
    """Switches are booleans: a text such as "no" would count as true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise wrong_type(name, "True or False", value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if isinstance(value, str) and value in choices:
        return
    wanted = f"one of {', '.join(map(repr, choices))}"
    if not isinstance(value, str):
        raise wrong_type(name, wanted, value)
    raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _real(name: str, value: object, wanted: str = "a number") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_type(name, wanted, value)
    return value


def _int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, "an int", value)
    return value


def check_number(name: str, value: object) -> None:
    if not -math.inf < _real(name, value) < math.inf:
        raise ValueError(f"{name} must be finite, got {value!r}")


def check_positive(name: str, value: object, *, finite: bool = True) -> None:
    number = _real(name, value)
    if not number > 0 or (finite and number == math.inf):
        raise ValueError(f"{name} must be positive{' and finite' * finite}, got {value!r}")


def check_fraction(name: str, value: object) -> None:
    """A number in [0, 1)."""
    if not 0 <= _real(name, value) < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1, got {value!r}")


def check_probability(name: str, value: object) -> None:
    """A number in [0, 1]."""
    if not 0 <= _real(name, value) <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value!r}")


def check_scalar(name: str, value: object, like_name: str, like: Tensor) -> None:
    """A number, or a floating-point tensor of one element on the features' device or, as in PyTorch, on the CPU."""
    if not isinstance(value, Tensor):
        _real(name, value, "a number or a torch.Tensor")
        return
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one element, got shape {shape_of(value)}")
    check_floating(name, value)
    if value.device.type != "cpu":
        check_same_device(like_name, like, name, value)


def check_count(name: str, value: object, least: int, most: int | None = None) -> None:
    number = _int(name, value)
    if most is None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and not least <= number <= most:
        raise ValueError(f"{name} must lie between {least} and {most}, got {value}")


def check_block_size(name: str, value: object, channels: int, of: str) -> None:
    """A size of blocks, which must divide the channels."""
    size = _int(name, value)
    if size < 1 or channels % size:
        raise ValueError(f"{name} must divide {of}, got {value}")


def check_k(k: object, gallery: int | None = None) -> None:
    """k, at most the gallery's size if that is known."""
    check_count("k", k, 0)
    assert isinstance(k, int)
    if gallery is not None and k > gallery:
        raise ValueError(f"k must lie between 0 and the gallery's {gallery} items, got {k}")


def check_ks(ks: object) -> None:
    """The cut-offs of a metric: positive ints."""
    if not isinstance(ks, Sequence):
        raise wrong_type("ks", "a sequence of ints", ks)
    if not ks:
        raise ValueError(f"ks must be a sequence of at least one int, got {ks!r}")
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"ks must hold ints, got {type(k).__name__}")
        if k < 1:
            raise ValueError(f"ks must hold ints of at least 1, got {k}")


def check_terms(diag: object, blocks: object) -> None:
    """Which terms of the metric a module learns."""
    check_flags(diag=diag, blocks=blocks)
    if not diag and not blocks:
        raise ValueError("no term to learn: diag and blocks are both False, at least one of them is wanted")


def check_dtype(name: str, dtype: object) -> None:
    """A floating-point dtype, or None for the default."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise wrong_type(name, "a torch.dtype or None", dtype)
    if dtype not in FEATURE_DTYPES:
        raise ValueError(f"{name} must be {FLOAT_NAMES}, got {dtype}")


def check_place(device: object, dtype: object) -> None:
    """The device of new weights (anything `torch.device` takes, or None for the default), and their dtype."""
    wanted = "a torch.device, its name or None"
    if device is not None and not isinstance(device, torch.device):
        if isinstance(device, bool) or not isinstance(device, (str, int)):
            raise wrong_type("device", wanted, device)
        try:
            torch.device(device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device must be {wanted}, got {device!r} ({reason})") from None
    check_dtype("dtype", dtype)


def check_kind(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """An instance of `kind`, in words `wanted`."""
    if not isinstance(value, kind):
        raise wrong_type(name, wanted, value)


def check_group(group: object) -> None:
    """A process group that this process is in, or None."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise wrong_type("group", "a torch.distributed process group or None", group)


def check_module(name: str, module: object) -> None:
    check_kind(name, module, nn.Module, "a torch.nn.Module")


def check_path(name: str, path: object) -> None:
    check_kind(name, path, (str, os.PathLike), "a path, a str or a pathlib.Path")
