"""The cache folder, files that are written whole or not at all, and files that are looked at before they are trusted.

Nothing is unpickled. A file that cannot be used is a `ValueError` that names it, what was expected and what came; one
that is not there, or may not be opened, is the `OSError` it always is.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

#: Where results that later runs use lie, instead of the user's cache directory.
CACHE_VARIABLE = "GSSF_CACHE_DIR"

#: What this process has warned of.
_warned: set[Hashable] = set()


def warn_once(about: Hashable, message: str, stacklevel: int = 2) -> None:
    """Warn of a fault that costs no result, once a process."""
    if about not in _warned:
        _warned.add(about)
        warnings.warn(message, stacklevel=stacklevel + 1)


def _usual_cache_folder() -> str:
    """Where platformdirs puts the cache, for a machine that lacks it; not absolute for a user without a home."""
    if sys.platform == "win32":
        return os.path.join(os.environ.get("LOCALAPPDATA", ""), "gssf_triton", "gssf_triton", "Cache")
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    # The XDG specification has relative paths ignored.
    return os.path.join(chosen if os.path.isabs(chosen) else os.path.expanduser(usual), "gssf_triton")


def cache_folder() -> Path | None:
    """Where results that later runs use lie: $GSSF_CACHE_DIR, or the user's cache directory for gssf_triton.

    None for a user who has no such directory, such as a number without an entry in the password file and without $HOME.
    The directory may be missing, or not be writable.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    try:
        from platformdirs import user_cache_dir

        found = user_cache_dir("gssf_triton")
    # It is not installed, or finds no home. Its older releases return "~/.cache" unchanged then.
    except (ImportError, KeyError, OSError, RuntimeError):
        found = _usual_cache_folder()
    return Path(found) if os.path.isabs(found) else None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path`, open for writing, that takes its place at the end: a reader sees the old one or the new.

    So does whoever comes after a process that was killed here. Several processes may replace one file at a time; the
    last one's stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with scratch.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def unusable(path: Path, expected: str, got: str) -> ValueError:
    """The error about a file that is there."""
    return ValueError(f"{path}: expected {expected}, got {got}")


def reason(error: BaseException) -> str:
    """An error's first line, or its name where it says nothing."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` archive by name.

    Raises:
        ValueError: anything but a whole archive of plain arrays.
    """
    expected = "an .npz archive of arrays"
    with path.open("rb") as stream:
        try:
            found = np.load(stream, allow_pickle=False)
            arrays = {} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
        # A damaged archive raises whatever the first damaged field leads to, from a dozen modules.
        except Exception as error:
            raise unusable(path, expected, f"a file that cannot be read ({reason(error)})") from error
    if isinstance(found, np.ndarray):
        raise unusable(path, expected, "an .npy array")
    return arrays


def read_json(path: Path, what: str, fields: Sequence[str]) -> dict[str, Any]:
    """A JSON object that has `fields`, whatever else it has.

    Raises:
        ValueError: anything else.
    """
    expected = f"{what}, a JSON object with {', '.join(fields)}"
    content = path.read_bytes()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise unusable(path, expected, f"{len(content)} bytes that are no JSON ({reason(error)})") from None
    if not isinstance(found, dict):
        raise unusable(path, expected, f"a {type(found).__name__}")
    if missing := [name for name in fields if name not in found]:
        raise unusable(path, expected, f"one without {', '.join(missing)}")
    return found
