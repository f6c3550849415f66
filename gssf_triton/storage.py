"""The cache folder; files that are replaced whole or not at all; files that are checked when they are read.

Nothing is unpickled. A file that cannot be used raises a `ValueError` that names the file, what was expected and what
was found. A file that is missing or cannot be opened raises the usual `OSError`.
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

#: Environment variable that names a folder to use instead of the user's cache directory.
CACHE_VARIABLE = "GSSF_CACHE_DIR"

#: Warnings that this process has given.
_warned: set[Hashable] = set()


def warn_once(about: Hashable, message: str, stacklevel: int = 2) -> None:
    """Warn, once a process, of a fault that changes no result."""
    if about not in _warned:
        _warned.add(about)
        warnings.warn(message, stacklevel=stacklevel + 1)


def _usual_cache_folder() -> str:
    """The folder that platformdirs would choose, if it is missing; relative for a user without a home directory."""
    if sys.platform == "win32":
        return os.path.join(os.environ.get("LOCALAPPDATA", ""), "gssf_triton", "gssf_triton", "Cache")
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    # The XDG specification says to ignore relative paths.
    return os.path.join(chosen if os.path.isabs(chosen) else os.path.expanduser(usual), "gssf_triton")


def cache_folder() -> Path | None:
    """The folder of results that later runs reuse: $GSSF_CACHE_DIR, or the user's cache directory for gssf_triton.

    None for a user who has no such directory, such as a number without an entry in the password file and without $HOME.
    The directory may be missing, or not be writable.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    try:
        from platformdirs import user_cache_dir

        found = user_cache_dir("gssf_triton")
    # Not installed, or no home directory: older releases then return "~/.cache" unchanged.
    except (ImportError, KeyError, OSError, RuntimeError):
        found = _usual_cache_folder()
    return Path(found) if os.path.isabs(found) else None


#: Without it Windows changes line endings.
BINARY = getattr(os, "O_BINARY", 0)
#: Suffix of files that are still being written.
SCRATCH_ENDING = ".gssf-part"
#: Locks of other machines may be invisible here: their leftover files are removed once they are this old.
FOREIGN_SCRATCH_SECONDS = 3600.0


def _kind(mode: int) -> str:
    """What is there instead of a file."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a disk"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _status(path: Path) -> os.stat_result | None:
    """The status of `path`, links followed, or None if nothing is there."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _descriptor(path: Path) -> int | None:
    """The file descriptor that `path` names, also through links (/dev/stdout, /dev/fd/3), or None."""
    folders = {os.path.realpath(name) for name in ("/dev/fd", "/proc/self/fd")} if sys.platform != "win32" else set()
    place = os.path.abspath(path)
    for _ in range(40):  # systems follow no more links
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
    """Whether `path` cannot be replaced by another file: a device, a pipe, an open file of a process (/dev/stdout)."""
    if _descriptor(path) is not None:
        return True
    opened = os.path.abspath(path).startswith("/proc/")
    return status is not None and (opened or not stat.S_ISREG(status.st_mode))


def replaceable(path: Path) -> bool:
    """Whether `replacing` can replace `path` repeatedly; not a device, a pipe or an open file, which it appends to."""
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
    """Check that `replacing` can write `path`; to be called before the work.

    Raises:
        ValueError: it is one of the `inputs`, perhaps under another name.
        OSError: a folder, a socket, a disk, a file that may not be written, an impossible name, or no folder to
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
            folder = folder.parent  # `replacing` makes missing folders
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, "is no folder to write in", str(folder))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "cannot be written in", str(folder))


def _lock(file: int, *, wait: bool) -> bool:
    """Lock a scratch file until it is closed; False if another process has it locked, or the disk has no locks."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _remove_left_over(folder: Path, here: str) -> None:
    """Remove the scratch files of killed writers: nothing locks them any more."""
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
        # Cut, because a file name has at most 255 bytes.
        scratch = path.with_name(f".{path.name[:40]}{here}{uuid.uuid4().hex[:12]}{SCRATCH_ENDING}")
        file = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, mode)
        _lock(file, wait=True)
        if sys.platform == "win32" or os.fstat(file).st_nlink:
            return file, scratch
        os.close(file)  # another writer removed it before it was locked


def _keep_owner_and_mode(file: int, scratch: Path, of: os.stat_result) -> None:
    """Copy owner and mode as far as this user and the disk allow."""
    if sys.platform != "win32":
        for ids in ((-1, of.st_gid), (of.st_uid, -1)):
            with suppress(OSError):
                os.fchown(file, *ids)
    with suppress(OSError):
        os.chmod(scratch, stat.S_IMODE(of.st_mode))


def _write_directly(path: Path, content: bytes) -> None:
    number = _descriptor(path)
    if number is not None:
        # A new descriptor would have its own offset, and later prints would overwrite the content.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        with os.fdopen(number, "wb", closefd=False) as opened:
            opened.write(content)
        return
    try:
        # O_NONBLOCK: opening a pipe that nobody reads fails, instead of waiting for ever.
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
    """A scratch file, open for writing, that replaces `path` at the end: readers see the old file or the whole new one.

    That holds even if this process is killed; the next writer in the folder removes the scratch file. Several processes
    may replace one file at a time: the last one wins. If `path` is a link, its target is replaced. The replaced file's
    mode is kept. A device, a pipe or an open file of this process (/dev/stdout) is written directly, at the end.

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
    # A private file's new content is private from its first byte.
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
    """`path` itself, if it is a file: opening a pipe would wait for its writer.

    Raises:
        ValueError: a pipe, a device or a socket.
        OSError: it is not there.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder raises an OSError
        raise unusable(path, "a file", _kind(mode))
    return path


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark, with any line endings.

    Raises:
        ValueError: it is not UTF-8, or not a file.
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
    """The error about a file that exists and cannot be used."""
    return ValueError(f"{path}: expected {expected}, got {got}")


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type if there is none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` archive by name, in this machine's byte order.

    Raises:
        ValueError: it is not a whole archive of plain arrays.
    """
    expected = "an .npz archive of arrays"
    with regular(path).open("rb") as stream:
        try:
            found = np.load(stream, allow_pickle=False)
            arrays = {} if isinstance(found, np.ndarray) else {name: native(found[name]) for name in found.files}
        # A damaged archive can raise almost any exception.
        except Exception as error:
            raise unusable(path, expected, f"a file that cannot be read ({reason(error)})") from error
    if isinstance(found, np.ndarray):
        raise unusable(path, expected, "an .npy array")
    return arrays


def read_json(path: Path, what: str, fields: Sequence[str]) -> dict[str, Any]:
    """A JSON object that has at least `fields`.

    Raises:
        ValueError: it is not one.
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


def json_rows(content: Any, levels: int = 2) -> str:
    """JSON with a line for each entry of the outer levels: a row of results is one line of the file, and of a diff.

    Example:
        >>> from gssf_triton.storage import json_rows
        >>> print(json_rows({"schema": 1, "rows": [{"name": "one", "n": [1, 2]}, {"name": "two", "n": []}]}))
        {
         "schema": 1,
         "rows": [
          {"name": "one", "n": [1, 2]},
          {"name": "two", "n": []}
         ]
        }
    """
    if not levels or not content or not isinstance(content, (dict, list)):
        return json.dumps(content)
    if isinstance(content, dict):
        entries = [f"{json.dumps(str(name))}: {json_rows(value, levels - 1)}" for name, value in content.items()]
    else:
        entries = [json_rows(value, levels - 1) for value in content]
    inner = ",\n".join(entries).replace("\n", "\n ")
    begin, end = "{}" if isinstance(content, dict) else "[]"
    return f"{begin}\n {inner}\n{end}"
