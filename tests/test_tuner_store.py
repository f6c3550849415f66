"""The user's results on disk: nothing lost by many writers, by a kill, by a broken file; no disk stops a run."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forks import forked
from support.store_writers import DEVICE, reported
from support.tuner_kit import a_chunk, measured, stream_key

from gssf_triton.autotune import lookup, model
from gssf_triton.autotune import store as store_module
from gssf_triton.autotune.space import SPACES, make_key
from gssf_triton.autotune.store import Store
from gssf_triton.autotune.tables import Entry, Table, TableError, parse, render
from gssf_triton.kernels.configs import ChunkConfig
from gssf_triton.kernels.devices import Device

KEY = stream_key()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "cpu-1.json"


def test_what_is_added_is_read_back(path: Path) -> None:
    assert Store(DEVICE, path).read() == {}, "no file, no results, no warning"
    assert Store(DEVICE, path).add({KEY: a_chunk()}) == {KEY: a_chunk()}
    assert Store(DEVICE, path).read() == {KEY: a_chunk()}
    assert sorted(x.name for x in path.parent.iterdir()) == ["cpu-1.json", "cpu-1.json.lock"]


def test_the_earlier_of_two_results_stays_unless_tuned_anew(path: Path) -> None:
    """Every process then runs the same configuration, whichever of them was last."""
    Store(DEVICE, path).add({KEY: a_chunk(512)})
    assert Store(DEVICE, path).add({KEY: a_chunk(1024)}) == {KEY: a_chunk(512)}
    assert Store(DEVICE, path).add({KEY: a_chunk(1024)}, overwrite=True) == {KEY: a_chunk(1024)}
    assert Store(DEVICE, path).read() == {KEY: a_chunk(1024)}


def test_files_are_kept_apart_by_device_driver_triton_and_package(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {store_module.path_for(DEVICE), store_module.path_for(Device("cpu-2", "a CPU", "cpu"))}
    for name in ("driver", "triton", "gssf_triton"):
        other = {**store_module.identity(DEVICE), name: "9.9.9"}
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "identity", lambda device, other=other: other)
            seen.add(store_module.path_for(DEVICE))
    assert len(seen) == 5


# ---------------------------------------------------------------------------------------------------- broken files


def truncate(text: str) -> str:
    return text[: len(text) // 2]


def edit(change: Callable[[dict], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return apply


def row(**values: object) -> Callable[[dict], object]:
    return lambda data: data["entries"][0].update(values)


BROKEN = {
    "empty": lambda text: "",
    "truncated": truncate,
    "not JSON": lambda text: "hello",
    "a list": lambda text: "[]",
    "nested without end": lambda text: "[" * 100_000,
    "an older format": edit(lambda data: data.update(format=0)),
    "another device's": edit(lambda data: data.update(device="cpu-64")),
    "another driver's": edit(lambda data: data["identity"].update(driver="1.2.3")),
    "another package version's": edit(lambda data: data["identity"].update(gssf_triton="99")),
    "a field too many": edit(lambda data: data.update(note="mine")),
    "no entries": edit(lambda data: data.pop("entries")),
    "entries no list": edit(lambda data: data.update(entries={})),
    "an entry no object": edit(lambda data: data["entries"].append(3)),
    "an entry twice": edit(lambda data: data["entries"].append(data["entries"][0])),
    "an unknown kernel": edit(row(kernel="magic")),
    "an unknown dtype": edit(row(dtype="int8")),
    "an unknown source": edit(row(source="heard of")),
    "rows no power of two": edit(row(M=4000)),
    "rows below one": edit(row(M=0)),
    "rows in text": edit(row(M="4096")),
    "channels a fraction": edit(row(D=256.0)),
    "blocks that do not divide": edit(row(B=100)),
    "a configuration outside the space": edit(row(config={"rows": 513, "columns": 4096})),
    "a configuration that is text": edit(row(config="fast")),
    "a negative time": edit(row(seconds=-1.0)),
    "a time that is no number": edit(row(seconds=True)),
    "an infinite time": edit(row(seconds=float("inf"))),
    "a spread in text": edit(row(spread="small")),
    "versions as numbers": edit(row(torch=2)),
    "no text": lambda text: "\udcff",
    "a kernel in a list": edit(row(kernel=["chunk"])),
    "a time beyond the floats": edit(row(seconds=10**400)),
    "a spread beyond the floats": edit(row(spread=10**400)),
    "rows beyond a tensor's": edit(row(M=2**1100)),
    "columns beyond a tensor's": edit(row(N=2**63)),
    "channels beyond a tensor's": edit(row(D=10**400)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_set_aside_with_one_warning_and_begun_anew(kind: str, path: Path) -> None:
    Store(DEVICE, path).add({KEY: a_chunk()})
    broken = BROKEN[kind](path.read_text(encoding="utf-8")).encode("utf-8", "surrogateescape")
    path.write_bytes(broken)
    store = Store(DEVICE, path)
    with pytest.warns(UserWarning, match="cannot be used") as warned:
        assert store.read() == {}
        assert store.add({KEY: a_chunk(1024)}) == {KEY: a_chunk(1024)}
    assert len(warned) == 1
    (aside,) = path.parent.glob("cpu-1.json.broken-*")
    assert aside.read_bytes() == broken, "what a person wrote is not thrown away"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Store(DEVICE, path).read() == {KEY: a_chunk(1024)}


#: What no field of a table expects, or none but one or two.
ODD = (None, True, [], {}, [[]], {"a": 1}, "", "\ud800", "cpu", -1, 0.5, 2**63, 2**1100, -(10**400), 1e308, math.nan)


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in JSON data, whole parts of it included."""
    for key in range(len(data)) if isinstance(data, list) else list(data):
        yield data, key
        if isinstance(data[key], (list, dict)):
            yield from places(data[key])


@pytest.mark.parametrize("kernel", SPACES)
def test_an_odd_value_anywhere_is_refused_or_does_no_harm(kernel: str) -> None:
    """One value of a good table is replaced; a table that is taken all the same must answer every look-up."""
    arch, B = "cpu" if kernel == "chunk" else "sm_90", 32 if kernel in ("pairwise", "fold", "gradient", "plan") else 0
    key = make_key(kernel, "bf16", 64, 32, 256, B)
    config = model.default(key, arch)
    data = json.loads(render(Table("a-gpu", arch, ("a GPU",), {"driver": "1"}, {key: measured(config)})))
    refused = 0
    for container, place in list(places(data)):
        good = container[place]
        for odd in ODD:
            container[place] = odd
            try:
                table = parse(json.dumps(data))
            except TableError as fault:
                assert len(str(fault)) < 1000
                refused += 1
                continue
            for rows in (64, 2**40):
                wanted = make_key(kernel, "bf16", rows, rows, 256, B)
                lookup.find(wanted, arch, table.entries)
            assert parse(render(table)) == table
        container[place] = good
    assert refused > 200 and parse(json.dumps(data)).entries == {key: measured(config)}


def test_a_file_broken_twice_by_one_process_warns_once_and_keeps_both(path: Path) -> None:
    store = Store(DEVICE, path)
    path.parent.mkdir()
    path.write_text("one", encoding="utf-8")
    with pytest.warns(UserWarning) as warned:
        store.read()
        path.write_text("two", encoding="utf-8")
        store.read()
    assert len(warned) == 1
    assert {x.read_text(encoding="utf-8") for x in path.parent.glob("*.broken-*")} == {"one", "two"}


# ------------------------------------------------------------------------------------------------------ bad disks


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    store = Store(DEVICE, tmp_path / "file" / "results.json")
    with pytest.warns(UserWarning) as warned:
        assert store.add({KEY: a_chunk()}) == {KEY: a_chunk()}, "they hold for this process"
        store.add({stream_key(64): a_chunk()})
    assert sum("hold for this process only" in str(w.message) for w in warned) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("step", ["write", "fsync", "replace", "lock"])
def test_a_full_or_read_only_disk_costs_a_warning_and_no_results(
    step: str, code: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(DEVICE, path).add({KEY: a_chunk()})
    before = path.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    real_open = open

    def open_but_not_to_write(file: Path, *args: object, **kwargs: object) -> object:
        return fail() if str(file).endswith(".tmp") else real_open(file, *args, **kwargs)  # type: ignore[call-overload]

    store = Store(DEVICE, path)
    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(store_module, "open", open_but_not_to_write, raising=False)
        elif step == "lock":
            patch.setattr(store_module.fcntl, "flock", fail)
        else:
            patch.setattr(store_module.os, step, fail)
        with pytest.warns(UserWarning, match="hold for this process only") as warned:
            assert set(store.add({stream_key(64): a_chunk()})) == {KEY, stream_key(64)}
            assert set(store.add({stream_key(128): a_chunk()})) == {KEY, stream_key(64), stream_key(128)}
        assert len(warned) == 1
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp"))
    store.add({stream_key(256): a_chunk()})
    assert len(Store(DEVICE, path).read()) == 4, "once there is room, what waited is saved"


def test_a_lock_that_is_never_released_costs_a_warning(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(DEVICE, path).add({KEY: a_chunk()})
    monkeypatch.setattr(store_module, "LOCK_PATIENCE_SECONDS", 0.1)
    with open(f"{path}.lock", "a", encoding="utf-8") as holder:
        store_module.fcntl.flock(holder, store_module.fcntl.LOCK_EX)
        with pytest.warns(UserWarning, match="was locked for"):
            Store(DEVICE, path).add({stream_key(64): a_chunk()})
    assert Store(DEVICE, path).read() == {KEY: a_chunk()}


# -------------------------------------------------------------------------------------------------- many processes


def look(path: Path) -> set[int]:
    """The D of all results, as a reader meets the file at any moment: whole."""
    try:
        return {key.D for key in parse(path.read_text(encoding="utf-8")).entries}
    except FileNotFoundError:
        return set()


def test_eight_processes_lose_nothing(path: Path) -> None:
    """Each adds results of its own; all are there afterwards, and at every moment the file is whole and only grows."""
    path.parent.mkdir()
    with forked("store_writers.add_results", path, 12) as nursery:
        nursery.start(*range(1, 97, 12))
        seen: set[int] = set()
        while len(seen) < 96:
            before = reported(path)
            now = look(path)
            assert seen | before <= now
            seen = now
        assert nursery.end() == [0] * 8
    assert {key.D for key in Store(DEVICE, path).read()} == set(range(1, 97))
    assert not list(path.parent.glob("*.broken-*"))


def test_a_kill_at_any_moment_leaves_a_whole_file(path: Path) -> None:
    """SIGKILL while they write, again and again: all that was reported is there, and the others go on."""
    path.parent.mkdir()
    chance = random.Random(torch.initial_seed())
    with forked("store_writers.add_results", path, 0) as nursery:
        for attempt in range(12):
            children = nursery.start(*(1000 * (3 * attempt + writer) + 1 for writer in range(3)))
            for child in children:
                deadline = time.monotonic() + chance.uniform(0, 0.06)
                while time.monotonic() < deadline:
                    before = reported(path)
                    assert before <= look(path)
                os.kill(child, signal.SIGKILL)
            assert nursery.end() == [-signal.SIGKILL] * 3
            assert reported(path) <= look(path)
    assert len(reported(path)) > 12, "they did write"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reported(path) <= {key.D for key in Store(DEVICE, path).read()}
        assert KEY in Store(DEVICE, path).add({KEY: a_chunk()})
    assert not list(path.parent.glob("*.broken-*"))


def test_a_rest_of_a_killed_writer_is_no_obstacle(path: Path) -> None:
    path.parent.mkdir()
    path.with_name(f"{path.name}.tmp").write_text("half a fi", encoding="utf-8")
    Store(DEVICE, path).add({KEY: a_chunk()})
    assert Store(DEVICE, path).read() == {KEY: a_chunk()}
    assert not list(path.parent.glob("*.tmp"))


def test_the_file_is_a_readable_diff(path: Path) -> None:
    """One line an entry, in a fixed order, whatever order they came in."""
    keys = [stream_key(2**n) for n in range(6, 12)]
    Store(DEVICE, path).add({key: a_chunk() for key in reversed(keys)})
    text = path.read_text(encoding="utf-8")
    Store(DEVICE, path).add({stream_key(2**20): measured(ChunkConfig(1024, 1024))})
    old, new = text.splitlines(), path.read_text(encoding="utf-8").splitlines()
    assert len(new) == len(old) + 1 and len(set(new) - set(old)) <= 2, "a new line, and a comma"
    assert list(parse(text).entries) == keys
    assert isinstance(parse(text).entries[keys[0]], Entry)
