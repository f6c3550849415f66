"""Checks of every argument that is no tensor of features, weights, ids or masks: flags, numbers, choices, places.

As `gssf_triton.checks`: a `TypeError` for something of the wrong type and a `ValueError` for one that does not fit,
naming the argument, what came and what was wanted, before anything runs. What came is named by its type wherever it may
be a tensor, whose values are not looked at.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gssf_triton.checks import FEATURE_DTYPES, FLOAT_NAMES, check_floating, check_same_device, shape_of


def check_flags(**flags: object) -> None:
    """Switches are booleans: the text "no" would switch them on."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    wanted = f"{name} must be one of {', '.join(map(repr, choices))}"
    if not isinstance(value, str):
        raise TypeError(f"{wanted}, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{wanted}, got {value!r}")


def _real(name: str, value: object, wanted: str = "a number") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
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
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if most is None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and not least <= value <= most:
        raise ValueError(f"{name} must lie between {least} and {most}, got {value}")


def check_block_size(name: str, value: object, channels: int, of: str) -> None:
    """A size of blocks that divides the channels they cut."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1 or channels % value:
        raise ValueError(f"{name} must divide {of}, got {value}")


def check_terms(diag: object, blocks: object) -> None:
    """Which terms of the metric a module learns."""
    check_flags(diag=diag, blocks=blocks)
    if not diag and not blocks:
        raise ValueError("no term to learn: diag and blocks are both False, at least one of them is wanted")


def check_dtype(name: str, dtype: object) -> None:
    """The dtype of something that is made: a floating-point one, or None for the default."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or None, got {type(dtype).__name__}")
    if dtype not in FEATURE_DTYPES:
        raise ValueError(f"{name} must be {FLOAT_NAMES}, got {dtype}")


def check_device(name: str, device: object) -> None:
    """Whatever `torch.device` takes, or None for the default."""
    if device is None or isinstance(device, torch.device):
        return
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise TypeError(f"{name} must be a torch.device, its name or None, got {type(device).__name__}")
    try:
        torch.device(device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name} must be a torch.device, its name or None, got {device!r} ({reason})") from None


def check_place(device: object, dtype: object) -> None:
    """Where a module makes its weights, and of which dtype."""
    check_device("device", device)
    check_dtype("dtype", dtype)


def check_group(group: object) -> None:
    """A process group that this process is in, or None."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group must be a torch.distributed process group or None, got {type(group).__name__}")


def check_module(name: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")


def check_path(name: str, path: object) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, a str or a pathlib.Path, got {type(path).__name__}")
