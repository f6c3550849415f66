"""Tables of configurations: their JSON form, one line an entry so that a diff can be read, and its validation.

A file is taken whole or not at all: one field of the wrong type, outside its range or unknown, and it is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from gssf_triton.autotune import model
from gssf_triton.autotune.keys import NUMERICS, ROW_KERNELS, WITHOUT_COLUMNS, Key, bucket
from gssf_triton.autotune.space import SPACES, Config, parse_config
from gssf_triton.kernels.devices import Device
from gssf_triton.storage import read_text

#: Raised when the file's layout or a configuration's meaning changes: older files are then set aside.
FORMAT = 1
#: "measured" on the device, or the static "model"'s choice, which nobody timed.
SOURCES = ("measured", "model")
#: No tensor has more rows, columns or channels.
LARGEST_SIZE = 2**63 - 1
SHIPPED = Path(__file__).parent / "tables"

_ENTRY_FIELDS = ("kernel", "dtype", "M", "N", "D", "B", "config", "source")
_MEASURED_FIELDS = ("seconds", "spread", "torch", "triton", "commit")


class TableError(ValueError):
    """A table that must not be used, and why."""


@dataclass(frozen=True)
class Entry:
    """A configuration and where it comes from.

    Attributes:
        config: What to launch.
        source: One of `SOURCES`.
        seconds: Median of a call; None for the model's.
        spread: Interquartile range over the median; None for the model's.
        torch: Version it was measured with.
        triton: Version it was measured with, "none" where there is none.
        commit: The checkout it was measured in, "" outside one.
    """

    config: Config
    source: str
    seconds: float | None = None
    spread: float | None = None
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


def _number(value: object, name: str) -> float:
    # An integer may lie beyond the floats, and does not convert then.
    good = type(value) in (int, float) and 0 <= value <= sys.float_info.max  # type: ignore[operator]
    _check(good, f"{name} must be a finite number from 0 up, got {shown(value)}")
    return float(value)  # type: ignore[arg-type]


def _text(value: object, name: str) -> str:
    _check(isinstance(value, str), f"{name} must be text, got {shown(value)}")
    return str(value)


def _size(value: object, name: str, least: int) -> int:
    good = type(value) is int and least <= value <= LARGEST_SIZE
    _check(good, f"{name} must be a whole number from {least} to {LARGEST_SIZE}, got {shown(value)}")
    return value  # type: ignore[return-value]


def _one_of(value: object, name: str, known: Collection[str]) -> str:
    # By type first: a list cannot be looked up in a dictionary.
    _check(isinstance(value, str) and value in known, f"{name} must be one of {', '.join(known)}, got {shown(value)}")
    return str(value)


def _parse_entry(row: object, arch: str) -> tuple[Key, Entry]:
    if not isinstance(row, dict):
        raise TableError(f"an entry must be an object, got {shown(row)}")
    measured = row.get("source") == "measured"
    wanted = _ENTRY_FIELDS + (_MEASURED_FIELDS if measured else ())
    _check(sorted(row) == sorted(wanted), f"an entry must have the fields {', '.join(wanted)}, got {', '.join(row)}")
    kernel = _one_of(row["kernel"], "kernel", SPACES)
    dtype = _one_of(row["dtype"], "dtype", NUMERICS)
    source = _one_of(row["source"], "source", SOURCES)
    sizes = [_size(row[name], name, least) for name, least in (("D", 1), ("B", 0), ("M", 1), ("N", 0))]
    key = Key(kernel, dtype, *sizes)
    _check(bucket(key.M) == key.M and bucket(key.N) == key.N, f"M and N must be powers of two, got {key.M}, {key.N}")
    _check(not key.N or kernel not in ROW_KERNELS, f"N must be 0 for {kernel}, got {key.N}")
    _check(bool(key.N) or kernel in WITHOUT_COLUMNS, f"N must be at least 1 for {kernel}, got 0")
    _check(not key.B or key.D % key.B == 0, f"B must divide D, got D = {key.D}, B = {key.B}")
    try:
        config = parse_config(kernel, row["config"], key)
    except ValueError as fault:
        raise TableError(str(fault)) from None
    _check(model.fits(config, key, arch), f"{config} does not fit a block of {arch} for {key}")
    if not measured:
        return key, Entry(config, source)
    return key, Entry(
        config, source, _number(row["seconds"], "seconds"), _number(row["spread"], "spread"),
        _text(row["torch"], "torch"), _text(row["triton"], "triton"), _text(row["commit"], "commit"),
    )  # fmt: skip


def _load(text: str) -> tuple[Table, list[Any]]:
    """A table without its entries, and those as they stand in the file."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise TableError(f"no JSON: {fault}") from None
    _check(isinstance(data, dict), "no table: the file must hold an object")
    _check(data.get("format") == FORMAT, f"format must be {FORMAT}, got {shown(data.get('format'))}")
    wanted = ("format", "device", "arch", "names", "identity", "entries")
    _check(sorted(data) == sorted(wanted), f"a table must have the fields {', '.join(wanted)}, got {', '.join(data)}")
    slug, arch = _text(data["device"], "device"), _text(data["arch"], "arch")
    names, identity, rows = data["names"], data["identity"], data["entries"]
    _check(isinstance(names, list) and bool(names), f"names must be a list of names, got {shown(names)}")
    _check(isinstance(identity, dict), f"identity must be an object, got {shown(identity)}")
    _check(isinstance(rows, list), f"entries must be a list, got {type(rows).__name__}")
    names = tuple(_text(name, "a name") for name in names)
    return Table(slug, arch, names, {k: _text(v, "identity") for k, v in identity.items()}), rows


def _fill(table: Table, rows: list[Any]) -> Table:
    entries: dict[Key, Entry] = {}
    for row in rows:
        key, entry = _parse_entry(row, table.arch)
        _check(key not in entries, f"{key} stands twice")
        entries[key] = entry
    return replace(table, entries=entries)


def parse(text: str) -> Table:
    """The table that a file's text describes.

    Raises:
        TableError: text that is no table, or one with anything in it that must not be used.
    """
    return _fill(*_load(text))


def parse_measured(text: str) -> Table:
    """As `parse`, of the measured entries alone: the model's may have been written by another model.

    Raises:
        TableError: as `parse`.
    """
    table, rows = _load(text)
    return _fill(table, [row for row in rows if not (isinstance(row, dict) and row.get("source") == "model")])


def _row(key: Key, entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {
        "kernel": key.kernel, "dtype": key.dtype, "M": key.M, "N": key.N, "D": key.D, "B": key.B,
        "config": asdict(entry.config), "source": entry.source,
    }  # fmt: skip
    if entry.source == "measured":
        row |= {name: getattr(entry, name) for name in _MEASURED_FIELDS}
    return row


def render(table: Table) -> str:
    """A table as text: the same table gives the same text, whatever order its entries came in."""
    head = {
        "format": FORMAT,
        "device": table.slug,
        "arch": table.arch,
        "names": list(table.names),
        "identity": dict(sorted(table.identity.items())),
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    rows = [f"    {json.dumps(_row(key, table.entries[key]))}" for key in sorted(table.entries)]
    body = ",\n".join(rows)
    return "{\n" + "\n".join(lines) + '\n  "entries": [\n' + body + ("\n" if rows else "") + "  ]\n}\n"


def _shipped(wanted: Callable[[Table], bool]) -> list[Table]:
    found = []
    # Not macOS's ._*.json of a copy to another disk.
    for path in sorted(SHIPPED.glob("[!.]*.json")):
        try:
            table, rows = _load(read_text(path))
            if wanted(table):
                found.append(_fill(table, rows))
        except ValueError as fault:
            raise TableError(f"{path}: {fault}") from None
    return found


def shipped() -> list[Table]:
    """The tables that come with the package, by file name.

    Raises:
        TableError: a damaged file, named: an installation that is not what was released.
    """
    return _shipped(lambda table: True)


def shipped_for(device: Device) -> list[Table]:
    """Those of them that serve a device; the others' entries are not even looked at.

    Raises:
        TableError: as `shipped`.
    """
    return _shipped(lambda table: table.serves(device))
