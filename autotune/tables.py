"""Tables of measured configurations: their JSON form, one line an entry so that a diff can be read, and its validation.

A file is taken whole or not at all: one field of the wrong type, outside its range or unknown, and it is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from gssf_triton.autotune import model
from gssf_triton.autotune.space import NUMERICS, ROW_KERNELS, SPACES, WITHOUT_COLUMNS, Key, bucket, parse_config
from gssf_triton.kernels.choice import Config
from gssf_triton.kernels.devices import Device
from gssf_triton.storage import read_text

#: Raised when the file's layout or a configuration's meaning changes: older files are then set aside.
FORMAT = 1
#: No tensor has more rows, columns or channels.
LARGEST_SIZE = 2**63 - 1
#: Tables of the package, as `export` writes them.
SHIPPED = Path(__file__).parent / "tables"

_ROW = ("kernel", "dtype", "M", "N", "D", "B", "config", "source", "seconds", "spread", "torch", "triton", "commit")
_HEAD = ("format", "device", "arch", "names", "identity", "entries")


class TableError(ValueError):
    """A table that must not be used, and why."""


@dataclass(frozen=True)
class Entry:
    """A measured configuration.

    Attributes:
        config: What to launch.
        seconds: Median of a call.
        spread: Interquartile range over the median.
        torch: Version it was measured with.
        triton: Version it was measured with, "none" where there is none.
        commit: The checkout it was measured in, "" outside one.
    """

    config: Config
    seconds: float
    spread: float
    torch: str = ""
    triton: str = ""
    commit: str = ""


@dataclass(frozen=True)
class Table:
    """The entries of one device.

    Attributes:
        slug: The device, as its file is named.
        arch: Its architecture.
        names: A device whose name starts with one of these uses the table.
        identity: What else must agree, such as the driver; empty in shipped tables.
        entries: Key → entry.
    """

    slug: str
    arch: str
    names: tuple[str, ...]
    identity: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[Key, Entry] = field(default_factory=dict)

    def serves(self, device: Device) -> bool:
        """Whether its entries are for this device; a CPU's are for one number of threads."""
        same_threads = self.arch != "cpu" or device.slug == self.slug
        return device.arch == self.arch and same_threads and device.name.startswith(self.names)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise TableError(message)


def _number(value: Any, name: str) -> float:
    # An integer may lie beyond the floats, and does not convert then.
    good = type(value) in (int, float) and 0 <= value <= sys.float_info.max
    _check(good, f"{name} must be a finite number from 0 up, got {shown(value)}")
    return float(value)


def _text(value: object, name: str) -> str:
    _check(isinstance(value, str), f"{name} must be text, got {shown(value)}")
    return str(value)


def _size(value: Any, name: str, least: int) -> int:
    good = type(value) is int and least <= value <= LARGEST_SIZE
    _check(good, f"{name} must be a whole number from {least} to {LARGEST_SIZE}, got {shown(value)}")
    return int(value)


def _one_of(value: object, name: str, known: Collection[str]) -> str:
    # By type first: a list cannot be looked up in a dictionary.
    _check(isinstance(value, str) and value in known, f"{name} must be one of {', '.join(known)}, got {shown(value)}")
    return str(value)


def _parse_entry(row: object, arch: str) -> tuple[Key, Entry]:
    if not isinstance(row, dict):
        raise TableError(f"an entry must be an object, got {shown(row)}")
    _check(sorted(row) == sorted(_ROW), f"an entry must have the fields {', '.join(_ROW)}, got {', '.join(row)}")
    kernel = _one_of(row["kernel"], "kernel", SPACES)
    dtype = _one_of(row["dtype"], "dtype", NUMERICS)
    _one_of(row["source"], "source", ("measured",))
    key = Key(kernel, dtype, *(_size(row[name], name, least) for name, least in zip("DBMN", (1, 0, 1, 0), strict=True)))
    _check(bucket(key.M) == key.M and bucket(key.N) == key.N, f"M and N must be powers of two, got {key.M}, {key.N}")
    _check(not key.N or kernel not in ROW_KERNELS, f"N must be 0 for {kernel}, got {key.N}")
    _check(bool(key.N) or kernel in WITHOUT_COLUMNS, f"N must be at least 1 for {kernel}, got 0")
    _check(not key.B or key.D % key.B == 0, f"B must divide D, got D = {key.D}, B = {key.B}")
    try:
        config = parse_config(kernel, row["config"], key)
    except ValueError as fault:
        raise TableError(str(fault)) from None
    _check(model.fits(config, key, arch), f"{config} does not fit a block of {arch} for {key}")
    seconds, spread = (_number(row[name], name) for name in ("seconds", "spread"))
    return key, Entry(config, seconds, spread, *(_text(row[name], name) for name in ("torch", "triton", "commit")))


def _is_outdated(row: object) -> bool:
    """An earlier version's row that is no result of today's: never measured, or of a plan that is gone."""
    if not isinstance(row, dict):
        return False
    config = row.get("config")
    return row.get("source") == "model" or (isinstance(config, dict) and config.get("kind") == "fold_own_product")


def parse(text: str, *, skip_outdated: bool = False) -> Table:
    """The table that a file's text describes.

    Args:
        text: The file's text.
        skip_outdated: Leave out the rows that only an earlier version wrote, rather than refuse the table.

    Raises:
        TableError: text that is no table, or one with anything in it that must not be used.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise TableError(f"no JSON: {fault}") from None
    _check(isinstance(data, dict), "no table: the file must hold an object")
    _check(data.get("format") == FORMAT, f"format must be {FORMAT}, got {shown(data.get('format'))}")
    _check(sorted(data) == sorted(_HEAD), f"a table must have the fields {', '.join(_HEAD)}, got {', '.join(data)}")
    slug, arch = _text(data["device"], "device"), _text(data["arch"], "arch")
    names, identity, rows = data["names"], data["identity"], data["entries"]
    _check(isinstance(names, list) and bool(names), f"names must be a list of names, got {shown(names)}")
    _check(isinstance(identity, dict), f"identity must be an object, got {shown(identity)}")
    _check(isinstance(rows, list), f"entries must be a list, got {type(rows).__name__}")
    entries: dict[Key, Entry] = {}
    for row in rows:
        if skip_outdated and _is_outdated(row):
            continue
        key, entry = _parse_entry(row, arch)
        _check(key not in entries, f"{key} is there twice")
        entries[key] = entry
    names = tuple(_text(name, "a name") for name in names)
    return Table(slug, arch, names, {k: _text(v, "identity") for k, v in identity.items()}, entries)


def render(table: Table) -> str:
    """A table as text: the same table gives the same text, whatever order its entries came in."""
    identity = dict(sorted(table.identity.items()))
    head = dict(zip(_HEAD, (FORMAT, table.slug, table.arch, list(table.names), identity), strict=False))
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    rows = [
        json.dumps({name: row[name] for name in _ROW})
        for key, entry in sorted(table.entries.items())
        for row in [asdict(key) | asdict(entry) | {"source": "measured"}]
    ]
    body = ",\n".join(f"    {row}" for row in rows)
    return "{\n" + "\n".join(lines) + '\n  "entries": [\n' + body + ("\n" if rows else "") + "  ]\n}\n"


def shipped() -> list[Table]:
    """The tables that come with the package, by file name.

    Raises:
        TableError: a damaged file, named: an installation that is not what was released.
    """
    tables = []
    for path in sorted(SHIPPED.glob("[!.]*.json")):  # not macOS's ._*.json of a copy to another disk
        try:
            tables.append(parse(read_text(path)))
        except ValueError as fault:
            raise TableError(f"{path}: {fault}") from None
    return tables
