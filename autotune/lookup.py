"""What tables hold for a device, and what they answer for a key.

A key's own entry comes first, then the nearest measured neighbour's; else the model chooses (`kernels.choice`). The
user's results overrule the package's tables. The same tables give the same answers always.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from gssf_triton.autotune import model
from gssf_triton.autotune.space import Key, distance
from gssf_triton.autotune.store import Store
from gssf_triton.autotune.tables import Entry, TableError, shipped
from gssf_triton.kernels import choice
from gssf_triton.kernels.devices import Device


@dataclass(frozen=True)
class Answer:
    """A measured configuration and why it runs."""

    entry: Entry
    why: str


_stores: dict[Device, Store] = {}
_entries: dict[Device, dict[Key, Entry]] = {}
#: What this process has tried to tune on first use: once is enough, whether or not it succeeded.
tried: set[tuple[Device, Key]] = set()
#: Guards the tables; re-entrant, since tuning looks configurations up itself.
lock = threading.RLock()
#: True while the tuner is measuring, so that its own launches do not start tuning again.
is_tuning = False


def _after_fork() -> None:
    """In a child: no other thread of the parent is here to release the lock or to end its tuning."""
    global lock, is_tuning
    lock, is_tuning = threading.RLock(), False


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)


def forget() -> None:
    """Forget every answer and table read so far: the next call reads the files, and the environment, again."""
    with lock:
        choice.forget()
        _stores.clear()
        _entries.clear()
        tried.clear()


@contextmanager
def tuning() -> Iterator[None]:
    """Answer without tuning inside, and forget afterwards what was answered."""
    global is_tuning
    before, is_tuning = is_tuning, True
    try:
        yield
    finally:
        is_tuning = before
        choice.forget()


def shipped_entries(device: Device) -> dict[Key, Entry]:
    """What the package's own tables hold for a device."""
    try:
        return {key: entry for table in shipped() if table.serves(device) for key, entry in table.entries.items()}
    except TableError as fault:
        warnings.warn(f"a table of the package is damaged ({fault}): going on with the model", stacklevel=2)
        return {}


def store_for(device: Device) -> Store:
    """The user's results for a device."""
    with lock:
        if device not in _stores:
            _stores[device] = Store(device)
        return _stores[device]


def entries_for(device: Device) -> Mapping[Key, Entry]:
    """All entries for a device, the user's and the package's; read once a process."""
    with lock:
        if device not in _entries:
            _entries[device] = {**shipped_entries(device), **store_for(device).read()}
        return _entries[device]


def learn(device: Device, found: Mapping[Key, Entry], *, overwrite: bool = False) -> None:
    """Take new results into the user's file and into this process's answers."""
    with lock:
        _entries[device] = {**shipped_entries(device), **store_for(device).add(found, overwrite=overwrite)}
        choice.forget()


def find(key: Key, arch: str, entries: Mapping[Key, Entry]) -> Answer | None:
    """The entry for a key on an architecture, else for its nearest neighbour; None where the model is to choose.

    Entries that would not run are passed over.
    """
    exact = entries.get(key)
    if exact is not None and model.is_legal(exact.config, key, arch):
        return Answer(exact, "measured, for this very key")
    near = [
        (far, other)
        for other, entry in entries.items()
        if (far := distance(key, other)) is not None and model.is_legal(entry.config, key, arch)
    ]
    if not near:
        return None
    far, other = min(near)
    return Answer(entries[other], f"measured, for the neighbour {other}, {far:.1f} doublings off")
