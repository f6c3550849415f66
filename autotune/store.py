"""The user's own results: one file a device, driver, Triton and package version, in the user's cache directory.

Many processes may tune at once: a write takes a lock, reads what the others have written, adds its own and replaces the
file in one step, so nothing is lost, and a process killed at any moment leaves a whole file behind. No fault of the
file or the disk, nor a missing cache directory, ever stops a run: it costs one warning a process, and this process's
results stay in memory.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gssf_triton.autotune.space import Key
from gssf_triton.autotune.tables import Entry, Table, TableError, parse, render
from gssf_triton.kernels import devices
from gssf_triton.kernels.devices import Device
from gssf_triton.storage import CACHE_VARIABLE, cache_folder, read_text, regular, warn_once

if sys.platform != "win32":
    import fcntl

#: How often a lock is asked for, and for how long: a holder needs milliseconds.
LOCK_POLL_SECONDS, LOCK_PATIENCE_SECONDS = 0.02, 30.0


def identity(device: Device) -> dict[str, str]:
    """What a measurement holds for: another driver, Triton or version of this package may time differently."""
    return {
        "driver": devices.driver(device),
        "triton": devices.package_version("triton"),
        "gssf_triton": sys.modules["gssf_triton"].__version__,  # an import at the top would be a circle
    }


def path_for(device: Device) -> Path | None:
    """The file of a device's results, in `autotune` of `storage.cache_folder`; None where there is no such folder."""
    folder = cache_folder()
    if folder is None:
        return None
    driver, triton, package = identity(device).values()
    name = devices.slug(f"{device.slug}-driver-{driver}-triton-{triton}-gssf-{package}")
    return folder / "autotune" / f"{name}.json"


def _beside(file: Path, ending: str) -> Path:
    """The lock or the scratch file of a file: to open a pipe in its place would wait for ever.

    Raises:
        OSError: something else lies there.
    """
    path = file.with_name(file.name + ending)
    try:
        return regular(path)
    except FileNotFoundError:
        return path
    except ValueError as fault:
        raise OSError(str(fault)) from None


class Store:
    """One device's file. Reading and writing never raise for a bad file or disk; they warn, once each.

    Args:
        device: Whose results.
        path: The file; the device's own in the user's cache directory where None.

    Attributes:
        path: The file; None where the user has no cache directory: results then hold for this process only.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from gssf_triton.kernels.configs import ChunkConfig
        >>> from gssf_triton.kernels.devices import Device
        >>> from gssf_triton.autotune.store import Store
        >>> from gssf_triton.autotune.space import Key
        >>> from gssf_triton.autotune.tables import Entry
        >>> key = Key("chunk", "fp32", 256, 0, 4096, 4096)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = Store(Device("cpu-1", "some CPU", "cpu"), Path(folder) / "results.json")
        ...     _ = store.add({key: Entry(ChunkConfig(512, 4096), 0.01, 0.02)})
        ...     store.read()[key].config
        ChunkConfig(rows=512, columns=4096)
    """

    def __init__(self, device: Device, path: Path | None = None) -> None:
        self.device = device
        self.path = path or path_for(device)
        self._unsaved: dict[Key, Entry] = {}
        self._set_one_aside = False

    @property
    def _file(self) -> Path:
        """The file.

        Raises:
            FileNotFoundError: there is no place for it.
        """
        if self.path is None:
            raise FileNotFoundError("this user has no cache directory")
        return self.path

    def _go_on_without(self, fault: OSError) -> None:
        """One warning a folder: in it lie the files of several devices, and where none is read, none is written."""
        folder = self.path and self.path.parent
        where = f" in {folder}" if folder else ""
        warn_once(
            ("tuning cache", folder),
            f"the tuning cache{where} cannot be used ({fault}): going on without it, results hold for this process "
            f"only ({CACHE_VARIABLE} chooses another folder)",
            stacklevel=3,
        )

    def _blank(self) -> Table:
        return Table(self.device.slug, self.device.arch, (self.device.name,), identity(self.device))

    def _load(self) -> Table:
        """The file's table, empty where there is no file.

        Raises:
            ValueError: the file is not this device's table.
            OSError: it cannot be read.
        """
        try:
            table = parse(read_text(self._file), skip_outdated=True)
        except FileNotFoundError:
            return self._blank()
        if replace(table, entries={}) != self._blank():
            raise TableError(f"it is for {table.slug} ({dict(table.identity)})")
        return table

    def _load_or_set_aside(self) -> Table:
        try:
            return self._load()
        except ValueError as fault:
            self._set_aside(fault)
            return self._blank()

    def _set_aside(self, fault: ValueError) -> None:
        # To the nanosecond: no broken file may take the place of another.
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}"
        aside = self._file.with_name(f"{self._file.name}.broken-{stamp}")
        try:
            os.replace(self._file, aside)
        except FileNotFoundError:
            return  # another process was faster
        if not self._set_one_aside:
            self._set_one_aside = True
            message = f"the tuning cache {self._file} cannot be used ({fault}): kept as {aside.name}, begun anew"
            warnings.warn(message, stacklevel=4)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file's lock. The lock file stays: removing it would let two processes hold one each."""
        if sys.platform == "win32":  # the file is still replaced in one step; of two writers the last one wins
            yield
            return
        with open(_beside(self._file, ".lock"), "a", encoding="utf-8") as handle:
            deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{handle.name} was locked for {LOCK_PATIENCE_SECONDS:.0f} s") from None
                    time.sleep(LOCK_POLL_SECONDS)
            try:
                yield
            finally:
                # Not left to the closing: a child forked meanwhile has the file open too and would keep the lock.
                fcntl.flock(handle, fcntl.LOCK_UN)

    def read(self) -> dict[Key, Entry]:
        """The results there are; a file that cannot be used is set aside, with a warning."""
        try:
            try:
                saved = self._load().entries
            except ValueError:
                # Look again under the lock: another process may be setting it aside right now.
                with self._locked():
                    saved = self._load_or_set_aside().entries
        except OSError as fault:
            self._go_on_without(fault)
            saved = {}
        return {**saved, **self._unsaved}

    def add(self, found: Mapping[Key, Entry], *, overwrite: bool = False) -> dict[Key, Entry]:
        """Add results to the file and return all it holds then.

        Of two results for one key the earlier stays, so that every process runs the same configuration; `overwrite`
        is for tuning anew. What cannot be saved is kept, and saved with what is added next.
        """
        found = {**self._unsaved, **found} if overwrite else {**found, **self._unsaved}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                table = self._load_or_set_aside()
                entries = {**table.entries, **found} if overwrite else {**found, **table.entries}
                if entries != table.entries or not self._file.exists():
                    self._replace(render(replace(table, entries=entries)))
        except OSError as fault:
            self._go_on_without(fault)
            self._unsaved = {}
            saved = self.read()
            self._unsaved = found if overwrite else {key: found[key] for key in found if key not in saved}
            return {**saved, **self._unsaved}
        self._unsaved = {}
        return entries

    def _replace(self, text: str) -> None:
        """Whole or not at all. Under the lock one name will do, and what a killed writer left is overwritten."""
        target = Path(os.path.realpath(self._file))  # a link stays one
        temporary = _beside(target, ".tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
