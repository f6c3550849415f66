"""What first_run.py found, for people: a table, and the failures with all that is known of each."""

from __future__ import annotations

import json
from typing import Any

Row = dict[str, Any]


def _microseconds(spread: dict[str, float] | None) -> str:
    return "" if spread is None else f"{spread['median'] * 1e6:,.1f}"


def _number(row: Row, name: str, form: str, factor: float = 1.0) -> str:
    value = row.get(name)
    return "" if value is None else format(value * factor, form)


#: (heading, what of a row stands below it).
COLUMNS = (
    ("GPU µs", lambda row: _microseconds(row.get("seconds")) if isinstance(row.get("seconds"), dict) else ""),
    ("host µs", lambda row: _microseconds(row.get("host_seconds")) + ("!" if row.get("host_exposed") else "")),
    ("wall µs", lambda row: _microseconds(row.get("wall_seconds"))),
    ("TFLOP/s", lambda row: _number(row, "tflops", ".1f")),
    ("GB/s", lambda row: _number(row, "gbps", ",.0f")),
    ("of library", lambda row: _number(row, "share", ".0%")),
    ("ours / its", lambda row: _number(row, "ours_relative", ".3f")),
    ("MiB", lambda row: _number(row, "peak_bytes", ",.0f", 2**-20)),
    ("error", lambda row: _number(row, "error", ".1e")),
)


def _note(row: Row) -> str:
    """The last column of a row: what was launched, or why there is no time."""
    if not row["ok"]:
        return "FAILED"
    if "reason" in row:
        return str(row["reason"])
    return "; ".join(row.get("launches", row.get("kernels") if isinstance(row.get("kernels"), list) else []) or [])


def _stage(name: str, stage: dict[str, Any]) -> list[str]:
    rows = list(stage["rows"].values())
    good = sum(row["ok"] for row in rows)
    seconds = "" if stage["seconds"] is None else f", {stage['seconds']} s"
    lines = [f"== {name}: {stage['status']}{seconds}; {good} of {len(rows)} rows ok"]
    if name == "compile":
        # As many rows as kernels: the file has them all.
        rows = [row for row in rows if not row["ok"]]
    wide = max((len(row["name"]) for row in rows), default=0)
    shown = [(heading, cell) for heading, cell in COLUMNS if any(cell(row).strip("!") for row in rows)]
    if shown:
        lines.append(" " * wide + "".join(f" {heading:>12}" for heading, _ in shown))
    for row in rows:
        cells = "".join(f" {cell(row):>12}" for _, cell in shown)
        lines.append(f"{row['name']:{wide}}{cells}  {_note(row)}".rstrip())
    return lines


def table(found: dict[str, Any]) -> str:
    """All stages, the machine first; the failures in a line each come last."""
    device, tool = found.get("device") or {}, found.get("assembler")
    commit = (found.get("commit") or {}).get("hash") or "unknown"
    lines = [
        f"{device.get('name', 'no device')}, driver {found.get('driver')}, {found.get('arch')}; "
        f"{', '.join(f'{name} {version}' for name, version in (found.get('versions') or {}).items())}",
        f"commit {commit}, source {found.get('source')}, assembler {tool and tool['path']} {tool and tool['version']}",
        str(found.get("toolchain")),
        *(found.get("clocks") or "").splitlines(),
    ]
    for name, stage in found["stages"].items():
        lines += _stage(name, stage)
    wrong = failed(found)
    lines.append(f"== {len(wrong)} failures" + (":" if wrong else ""))
    lines += [f"{stage}: {row['name']}" for stage, row in wrong]
    return "\n".join(lines)


def failed(found: dict[str, Any]) -> list[tuple[str, Row]]:
    """(stage, row) of what is not as it should be."""
    return [(name, row) for name, stage in found["stages"].items() for row in stage["rows"].values() if not row["ok"]]


def failures_text(found: dict[str, Any]) -> str:
    """Every failure with all that is known of it; empty where there is none."""
    return "\n\n".join(f"{stage}: {row['name']}\n{_detail(row)}" for stage, row in failed(found))


def _detail(row: Row) -> str:
    facts = {name: value for name, value in row.items() if name not in ("name", "ok", "failure")}
    failure = row.get("failure", {})
    lines = [f"  {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in facts.items()]
    for name, value in failure.items():
        if name in ("traceback", "last"):
            lines += [f"  {name}:", *(f"    {line}" for line in value)]
        elif name == "launches":
            lines += [f"  launch: {json.dumps(launch, ensure_ascii=False)}" for launch in value]
        elif name in ("where", "tensors"):
            lines += [f"  {part}: {json.dumps(facts, ensure_ascii=False)}" for part, facts in value.items()]
        elif name == "blocking":
            lines.append("  with CUDA_LAUNCH_BLOCKING=1:")
            lines += ["  " + line for line in _detail({"failure": value}).splitlines()]
        else:
            lines.append(f"  {name}: {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines)
