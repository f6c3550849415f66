"""What the commands read: features and labels in `.npy`, weights in `.npz`, lists of images and of texts.

Every error names the option, the file, what was expected and what was found. Nothing is unpickled.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gssf_triton.command.usage import UsageError
from gssf_triton.data.files import LARGEST, DataError, image_file, numbered_lines, visible_files
from gssf_triton.integrations.arrays import load_arrays
from gssf_triton.metric import Metric
from gssf_triton.storage import reason

FEATURE_DTYPES = ("float16", "float32", "float64")
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def _existing(option: str, path: Path, what: str) -> None:
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "no file" if os.path.exists(path) else "no such file"
        raise UsageError(f"{option}: {path}: {found}; expected {what}")


def load_array(option: str, path: Path, what: str) -> NDArray[Any]:
    """A `.npy` array, memory-mapped: pages are read when they are used, and never written back."""
    _existing(option, path, what)
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    # A damaged header can raise almost any exception.
    except Exception as fault:
        why = reason(fault)
        raise UsageError(f"{option}: {path}: expected {what}, got a file that NumPy cannot read ({why})") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise UsageError(f"{option}: {path}: expected {what}, got an .npz archive")
    return array


def load_features(option: str, path: Path) -> NDArray[Any]:
    """(rows, D) floats, in the file's byte order."""
    what = f"an .npy array of shape (rows, D) and dtype {', '.join(FEATURE_DTYPES[:-1])} or {FEATURE_DTYPES[-1]}"
    array = load_array(option, path, what)
    if array.ndim != 2 or array.dtype.name not in FEATURE_DTYPES:
        raise UsageError(f"{option}: {path}: expected {what}, got {array.dtype} of shape {array.shape}")
    return array


def load_labels(option: str, path: Path, rows: int, of: str) -> Tensor:
    """One integer for each of the `rows` rows of `of`."""
    what = f"an .npy array of {rows} integers, one for each row of {of}"
    array = load_array(option, path, what)
    if array.shape != (rows,) or array.dtype.kind not in "iu":
        raise UsageError(f"{option}: {path}: expected {what}, got {array.dtype} of shape {array.shape}")
    if array.dtype.kind == "u" and array.max(initial=0) > LARGEST:
        raise UsageError(f"{option}: {path}: expected integers of at most {LARGEST}, got {array.max()}")
    return torch.from_numpy(array.astype(np.int64))


def load_weights(option: str, path: Path) -> Metric:
    """`W_diag`, `W_blocks` or both, on the CPU, from a file as `save_arrays` writes it."""
    what = "an .npz archive (or .safetensors) with W_diag (D,) or W_blocks (G, B, B), or both"
    _existing(option, path, what)
    try:
        arrays = load_arrays(path)
    except (ValueError, OSError) as fault:
        raise UsageError(f"{option}: {path}: expected {what}, got a file that cannot be read ({fault})") from None
    found = {name: arrays[name] for name in ("W_diag", "W_blocks") if name in arrays}
    if not found:
        raise UsageError(f"{option}: {path}: expected {what}, got {', '.join(arrays) or 'nothing'}")
    for name, array in found.items():
        if array.dtype.name not in FEATURE_DTYPES:
            raise UsageError(f"{option}: {path}: expected floats in {name}, got {array.dtype}")
    return Metric(**{name: torch.from_numpy(array) for name, array in found.items()})


def load_texts(option: str, path: Path, rows: int, of: str) -> list[str]:
    """One line of text for each row."""
    what = "a text, one a line"
    try:
        lines = [text for _, text in numbered_lines(path, what)]
    except (DataError, OSError) as fault:
        raise UsageError(f"{option}: {fault}") from None
    if len(lines) != rows:
        raise UsageError(f"{option}: {path}: expected {rows} lines, one for each row of {of}, got {len(lines)}")
    return lines


def load_images(option: str, source: Path, rows: int, of: str) -> list[Path]:
    """One image file for each row: the lines of a list, relative to it, or a folder's images sorted by name.

    The list is the user's own, and may name files anywhere.
    """
    what = "the path of an image file"
    try:
        if os.path.isdir(source):
            files = [image_file(source, None, path) for path in visible_files(source, IMAGE_SUFFIXES)]
        else:
            files = [image_file(source, number, source.parent / text) for number, text in numbered_lines(source, what)]
    except (DataError, OSError) as fault:
        raise UsageError(f"{option}: {fault}") from None
    if len(files) != rows:
        raise UsageError(f"{option}: {source}: expected {rows} images, one for each row of {of}, got {len(files)}")
    return files
