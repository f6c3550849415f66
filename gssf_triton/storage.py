"""The cache folder, files that are written whole or not at all, and files that are looked at before they are trusted.

Nothing is unpickled. A file that cannot be used is a `ValueError` that names it, what was expected and what came; one
that is not there, or may not be opened, is the `OSError` it always is.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import platform
import stat
import sys
import time
import uuid
import warnings
import zlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

if sys.platform != "win32":
    import fcntl

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


#: Windows would turn the ends of lines.
BINARY = getattr(os, "O_BINARY", 0)
#: How the names of files end that are being written.
SCRATCH_ENDING = ".gssf-part"
#: The lock of another machine's writer may not be seen here: what it left is removed once it is so old.
FOREIGN_SCRATCH_SECONDS = 3600.0


def _kind(mode: int) -> str:
    """What stands where a file is expected."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a disk"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _status(path: Path) -> os.stat_result | None:
    """What is at `path`, or where it leads to, if anything is."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _descriptor(path: Path) -> int | None:
    """The number of what this process has open, if `path` is a name of it, by links too: /dev/stdout, /dev/fd/3."""
    folders = {os.path.realpath(name) for name in ("/dev/fd", "/proc/self/fd")} if sys.platform != "win32" else set()
    place = os.path.abspath(path)
    for _ in range(40):  # as many links as systems follow
        folder, name = os.path.split(place)
        folder = os.path.realpath(folder)
        if folder in folders and name.isascii() and name.isdecimal():
            return int(name)
        place = os.path.join(folder, name)
        if not os.path.islink(place):
            break
        place = os.path.normpath(os.path.join(folder, os.readlink(place)))
    return None


def _written_directly(path: Path, status: os.stat_result | None) -> bool:
    """Whether `path` is no file that could be replaced: a device, a pipe, what a process has open (/dev/stdout)."""
    if _descriptor(path) is not None:
        return True
    opened = os.path.abspath(path).startswith("/proc/")
    return status is not None and (opened or not stat.S_ISREG(status.st_mode))


def replaceable(path: Path) -> bool:
    """Whether `replacing` may be asked for `path` again and again: each time the file is another."""
    return not _written_directly(path, _status(path))


def _check_open(path: Path, number: int) -> None:
    standard = (sys.__stdin__, sys.__stdout__, sys.__stderr__)
    try:
        if number < len(standard) and standard[number] is None:  # another file may have its number by now
            raise OSError
        mode = os.fstat(number).st_mode
    except (OSError, OverflowError):
        raise OSError(errno.EBADF, "is closed", str(path)) from None
    if stat.S_ISBLK(mode) or stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, f"is {_kind(mode)}; expected a file's name", str(path))
    if sys.platform != "win32" and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise PermissionError(errno.EACCES, "is open for reading alone", str(path))


def check_target(path: Path, *inputs: Path | None) -> None:
    """Whether `replacing` may write `path`: to be asked before the work, not after it.

    Raises:
        ValueError: it is one of the `inputs`, under whatever name.
        OSError: a folder, a socket, a disk, a file that may not be written, a name that cannot be, or no folder to
            write it in.
    """
    found = _status(path)
    for given in inputs:
        if given is not None and found and os.path.exists(given) and os.path.samestat(found, os.stat(given)):
            raise ValueError(f"{path}: expected a file of its own, got one that is read: {given}")
    number = _descriptor(path)
    if number is not None:
        return _check_open(path, number)
    if found and stat.S_IFMT(found.st_mode) in (stat.S_IFDIR, stat.S_IFSOCK, stat.S_IFBLK):
        kind = IsADirectoryError if stat.S_ISDIR(found.st_mode) else OSError
        raise kind(errno.EISDIR, f"is {_kind(found.st_mode)}; expected a file's name", str(path))
    if found and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "cannot be written", str(path))
    if not _written_directly(path, found):
        folder = Path(os.path.realpath(path)).parent
        while not os.path.lexists(folder) and folder != folder.parent:
            folder = folder.parent  # `replacing` makes those that are missing
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, "is no folder to write in", str(folder))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "cannot be written in", str(folder))


def _lock(file: int, *, wait: bool) -> bool:
    """Lock a scratch file until it is closed; False where another holds it, or the disk knows no locks."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _remove_left_over(folder: Path, here: str) -> None:
    """Remove the scratch files of writers that were killed: their locks went with them."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(SCRATCH_ENDING):
                continue
            with suppress(OSError):
                old = time.time() - entry.stat(follow_symlinks=False).st_mtime > FOREIGN_SCRATCH_SECONDS
                if entry.is_file(follow_symlinks=False) and (here in entry.name or old):
                    with open(entry.path, "r+b") as file:
                        if _lock(file.fileno(), wait=False):
                            os.unlink(entry.path)


def _new_scratch(path: Path, mode: int) -> tuple[int, Path]:
    """A new file beside `path`, open and locked."""
    here = f".{zlib.crc32(platform.node().encode()):08x}-"
    _remove_left_over(path.parent, here)
    while True:
        # Of a long name its beginning: a name has 255 bytes at most.
        scratch = path.with_name(f".{path.name[:40]}{here}{uuid.uuid4().hex[:12]}{SCRATCH_ENDING}")
        file = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, mode)
        _lock(file, wait=True)
        if sys.platform == "win32" or os.fstat(file).st_nlink:
            return file, scratch
        os.close(file)  # before it was locked it looked left over, and was removed


def _keep_owner_and_mode(file: int, scratch: Path, of: os.stat_result) -> None:
    """As far as this user, and the disk, may."""
    if sys.platform != "win32":
        for ids in ((-1, of.st_gid), (of.st_uid, -1)):
            with suppress(OSError):
                os.fchown(file, *ids)
    with suppress(OSError):
        os.chmod(scratch, stat.S_IMODE(of.st_mode))


def _write_directly(path: Path, content: bytes) -> None:
    number = _descriptor(path)
    if number is not None:
        # Opened anew it would have an offset of its own: whatever is printed later would lie over the content.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        with os.fdopen(number, "wb", closefd=False) as opened:
            opened.write(content)
        return
    try:
        # A pipe that nobody reads refuses to be opened so, rather than let this wait for ever.
        file = os.open(path, os.O_WRONLY | os.O_APPEND | BINARY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "is a pipe that nobody reads", str(path)) from None
        raise
    with os.fdopen(file, "wb") as stream:
        if sys.platform != "win32":
            os.set_blocking(file, True)
        stream.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path`, open for writing, that takes its place at the end: a reader sees the old one or the new.

    So does whoever comes after a process that was killed here; what that left is removed by the next who writes there.
    Several processes may replace one file at a time; the last one's stays. Where `path` is a link, its target is
    replaced; the mode of what is replaced is kept. A device, a pipe or what this process has open (/dev/stdout) is
    written to, once all is there.

    Raises:
        OSError: as `check_target`, or a pipe that nobody reads.
    """
    check_target(path)
    status = _status(path)
    if _written_directly(path, status):
        content = io.BytesIO()
        yield content
        _write_directly(path, content.getvalue())
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # What a private file is to hold is private from its first byte on.
    number, scratch = _new_scratch(path, 0o666 if status is None else 0o600)
    try:
        with os.fdopen(number, "wb") as file:
            if status is not None:
                _keep_owner_and_mode(number, scratch, status)
            yield file
            file.flush()
            os.fsync(number)
            if sys.platform != "win32":
                os.replace(scratch, path)  # under the lock
        if sys.platform == "win32":
            os.replace(scratch, path)  # an open file cannot be moved there
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def regular(path: Path) -> Path:
    """`path`, of a file: who opens a pipe waits for whoever writes to it.

    Raises:
        ValueError: a pipe, a device or a socket.
        OSError: it is not there.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder raises what it always does
        raise unusable(path, "a file", _kind(mode))
    return path


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark, whatever its ends of lines.

    Raises:
        ValueError: anything else.
        OSError: it cannot be read.
    """
    content = regular(path).read_bytes()
    try:
        return io.StringIO(content.removeprefix(codecs.BOM_UTF8).decode(), newline=None).read()
    except UnicodeDecodeError as error:
        raise unusable(path, "a text in UTF-8", f"{len(content)} bytes that are none ({error.reason})") from None


def native(array: NDArray[Any]) -> NDArray[Any]:
    """The array itself, or a copy in this machine's byte order, which is what PyTorch takes."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def unusable(path: Path, expected: str, got: str) -> ValueError:
    """The error about a file that is there."""
    return ValueError(f"{path}: expected {expected}, got {got}")


def reason(error: BaseException) -> str:
    """An error's first line, or its name where it says nothing."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` archive by name, in this machine's byte order.

    Raises:
        ValueError: anything but a whole archive of plain arrays.
    """
    expected = "an .npz archive of arrays"
    with regular(path).open("rb") as stream:
        try:
            found = np.load(stream, allow_pickle=False)
            arrays = {} if isinstance(found, np.ndarray) else {name: native(found[name]) for name in found.files}
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
    content = regular(path).read_bytes()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise unusable(path, expected, f"{len(content)} bytes that are no JSON ({reason(error)})") from None
    if not isinstance(found, dict):
        raise unusable(path, expected, f"a {type(found).__name__}")
    if missing := [name for name in fields if name not in found]:
        raise unusable(path, expected, f"one without {', '.join(missing)}")
    return found
