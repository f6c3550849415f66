"""One run, one JSON: written after every cell, taken up again, compared with an older one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, machine
from gssf_triton.storage import json_rows, read_json, replacing, unusable

SCHEMA = 1
#: What a run holds, of what is looked at again.
RUN = ("schema", "suite", "device", "driver", "cpu", "versions", "settings", "commit", "complete", "cells")
#: A median that moved by less than this is noise, however narrow the quartiles are.
NOISE = {"cuda": 0.03, "cpu": 0.10}

#: Where a line through the shapes could hold several values of the other dimensions, these are preferred.
PREFERRED = {"D": 1024, "B": 32}

#: What README shows.
RESULTS = ROOT / "perf" / "results"

Run = dict[str, Any]
CellRow = dict[str, Any]


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def new(suite: str, device: torch.device, **facts: Any) -> Run:
    """A run that begins now: what it is measured on, and these facts."""
    return {"schema": SCHEMA, "suite": suite, "started": now(), **machine.describe(device), **facts}


def write(path: Path, run: Run) -> None:
    """Replace `path` in one step: a run that is killed leaves the previous cell's file, never half of one."""
    content = (json_rows(run) + "\n").encode()
    with replacing(path) as file:
        file.write(content)


def read(path: Path, fields: Sequence[str] = RUN) -> Run:
    """A run, which has these fields at least.

    Raises:
        ValueError: the file is not one, or of another schema.
    """
    run: Run = read_json(path, "a run", ("schema",))
    if run["schema"] != SCHEMA:
        raise unusable(path, f"a run of schema {SCHEMA}", f"schema {run['schema']!r}")
    return read_json(path, "a run", fields)


def differences(old: Run, new: Run, names: Sequence[str]) -> list[str]:
    """Why `new` may not add to `old`: one run is one machine, one build, one setting."""
    return [f"{name}: {old[name]} then, {new[name]} now" for name in names if old[name] != new[name]]


def measure_of(run: Run) -> str:
    """A GPU's seconds compare from run to run; a CPU's only against the baseline beside them."""
    return "seconds" if run["device"]["type"] == "cuda" else "relative"


def compare(old: Run, new: Run) -> tuple[list[str], int]:
    """Lines that say what got slower, or stopped being right, and how many measurements were compared.

    Slower beyond noise: the quartiles lie apart and the median moved by more than `NOISE`.

    Raises:
        ValueError: the two runs come from different devices, or numbers of threads.
    """
    one, other = device_name(old), device_name(new)
    if one != other or old["device"]["type"] != new["device"]["type"]:
        raise ValueError(f"cannot compare {one} with {other}")
    measure, noise = measure_of(new), NOISE[new["device"]["type"]]
    lines, compared = [], 0
    for key, cell in new["cells"].items():
        for name, entry in cell["contenders"].items():
            before = old["cells"].get(key, {}).get("contenders", {}).get(name)
            if before is None or before["status"] != "ok" or not entry["ours"]:
                continue
            compared += 1
            if entry["status"] != "ok":
                lines.append(f"{key} {name}: {entry['status']} ({entry['reason']}), was ok")
                continue
            then, now = before.get(measure), entry.get(measure)
            if then is None or now is None:  # a baseline that did not run leaves nothing to relate to
                compared -= 1
                continue
            if now["q1"] > then["q3"] and now["median"] > then["median"] * (1 + noise):
                change = now["median"] / then["median"]
                unit = "s" if measure == "seconds" else "× baseline"
                lines.append(f"{key} {name}: {change:.2f}× ({then['median']:.4g} {unit} → {now['median']:.4g} {unit})")
    return lines, compared


def device_name(run: Run) -> str:
    """For people: a CPU's name with the threads it was given."""
    if run["device"]["type"] == "cpu":
        threads = run["cpu"]["threads"]
        return f"{run['device']['name']}, {threads} thread{'s' * (threads > 1)}"
    return str(run["device"]["name"])


def operations(run: Run) -> list[str]:
    """The operations that were measured, in order."""
    return list(dict.fromkeys(cell["operation"] for cell in run["cells"].values()))


def picture_prefix(run: Run, path: Path, operation: str) -> str:
    """How the names of an operation's pictures begin, beside the run's JSON `path`."""
    return f"{path.stem}-{operation}-" if len(operations(run)) > 1 else f"{path.stem}-"


def draw(run: Run, path: Path, operations: Sequence[str] = (), kinds: Sequence[str] = ()) -> list[Path]:
    """The run's pictures, all or these, beside its JSON `path`; none without matplotlib."""
    if find_spec("matplotlib") is None:
        print('no plots: they need matplotlib (pip install "gssf_triton[data]")', file=sys.stderr)
        return []
    from bench import plots  # matplotlib is optional

    return plots.draw(run, path, operations, kinds)


def sizes(cell: CellRow) -> dict[str, int]:
    """A cell's sizes by name, M, N, D and B first."""
    return {name: int(cell[name]) for name in cell.get("sizes", ("M", "N", "D", "B"))}


def size_text(values: dict[str, int]) -> str:
    """For people: "M = N = 1,024, B = 32"."""
    named = {name: f"{value:,}" for name, value in values.items()}
    if "M" in named and named["M"] == named.get("N"):
        del named["N"]
        named = {"M = N" if name == "M" else name: text for name, text in named.items()}
    return ", ".join(f"{name} = {text}" for name, text in named.items())


def line(cells: list[CellRow], axis: str) -> tuple[str, list[CellRow]]:
    """What is fixed along `axis`, a size or "MN" (M = N), and the cells of the longest line along it.

    Of equally long lines a square S's is taken, then the one nearest to what is usual.
    """
    moving = ("M", "N") if axis == "MN" else (axis,)
    lines: dict[tuple[tuple[str, int], ...], list[CellRow]] = {}
    for cell in cells:
        if axis == "MN" and cell["M"] != cell["N"]:
            continue
        fixed = tuple((name, value) for name, value in sizes(cell).items() if name not in moving)
        lines.setdefault(fixed, []).append(cell)
    if not lines:
        return "", []

    def rank(fixed: tuple[tuple[str, int], ...]) -> tuple[int, bool, int, tuple[tuple[str, int], ...]]:
        values = dict(fixed)
        preferred = sum(PREFERRED.get(name) == value for name, value in fixed)
        return len(lines[fixed]), values.get("M") == values.get("N"), preferred, fixed

    best = max(lines, key=rank)
    return size_text(dict(best)), sorted(lines[best], key=lambda cell: int(cell[moving[0]]))
