"""Render README.md's results from committed runs, so that no figure is ever copied by hand.

    python perf/report.py                            # of every run in perf/results; quick only without full
    python perf/report.py perf/results/cpu-2core/full.json
    python perf/report.py --check                    # exit status 1 where README.md is not what the runs say

The tables go between the markers `<!-- results:begin -->` and `<!-- results:end -->`, the FLOPs and bytes that rates
are computed from between `<!-- costs:begin -->` and `<!-- costs:end -->`. The pictures that README.md shows are drawn
beside the runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bench import ROOT, costs, results
from bench.cells import BOTH
from bench.operation import Operation
from bench.registry import OPERATIONS, SUITES, contender_names, labels
from bench.results import CellRow, Run
from gssf_triton import console
from gssf_triton.command.usage import UsageError, check_output
from gssf_triton.storage import read_text, replacing

RESULTS_MARKS = "<!-- results:begin -->", "<!-- results:end -->"
COSTS_MARKS = "<!-- costs:begin -->", "<!-- costs:end -->"

#: In the place of a ratio of times: of a CPU no time is shown by itself.
UNRELATED = "–"


def default_runs() -> list[Path]:
    """Of each device: its full suite, or the quick one where there is none, then the other suites."""
    found: list[Path] = []
    for folder in sorted(folder for folder in results.RESULTS.glob("*") if folder.is_dir()):
        there = [suite for suite in SUITES if (folder / f"{suite}.json").exists()]
        if "full" in there and "quick" in there:
            there.remove("quick")
        found += [folder / f"{suite}.json" for suite in there]
    return found


def chosen_cells(run: Run, operation: Operation) -> list[CellRow]:
    """For a reader of the README: along the operation's first axis, and for M = N the tall galleries."""
    rows: list[CellRow] = []
    mine = [cell for cell in run["cells"].values() if cell["operation"] == operation.name]
    for dtype in dict.fromkeys(cell["dtype"] for cell in mine):
        for mode in operation.modes:
            cells = [c for c in mine if c["dtype"] == dtype and c["mode"] == mode]
            _, chosen = results.line(cells, operation.axes[0])
            rows += chosen
            if operation.axes[0] == "MN":
                tall = [c for c in cells if c["M"] != c["N"]]
                at = {(c["D"], c["B"]) for c in chosen}
                rows += [c for c in tall if (c["D"], c["B"]) in at] or tall[:1]
    return rows


def _time(cell: CellRow, name: str, gpu: bool) -> str:
    entry = cell["contenders"].get(name)
    if entry is None:
        return ""
    if entry["status"] != "ok":
        return str(entry["status"])
    if "relative" not in entry:
        return UNRELATED
    ratio = entry["relative"]
    text = f"{ratio['median']:.2f}" if name != cell["baseline"] else "1"
    return f"{text} ({entry['seconds']['median'] * 1e3:.3g} ms)" if gpu else text


def _memory(cell: CellRow) -> str:
    ours, base = cell["contenders"].get("gssf"), cell["contenders"].get(cell["baseline"])
    if not ours or "peak_bytes" not in ours:
        return ""
    if base is None:
        return f"{ours['peak_bytes'] / 2**20:,.0f} MiB"
    if not base.get("peak_bytes"):
        return ""
    return f"{ours['peak_bytes'] / base['peak_bytes']:.2f}"


def table(run: Run, operation: Operation) -> list[str]:
    """One operation's lines of Markdown."""
    gpu = run["device"]["type"] == "cuda"
    cells = chosen_cells(run, operation)
    present = {name for cell in cells for name in cell["contenders"]}
    # A CPU's baseline would be a column of ones.
    names = [n for n in contender_names([operation.name]) if n in present and (gpu or n != operation.baseline)]
    shown = labels(operation.name)
    further = list(dict.fromkeys(name for cell in cells for name in list(results.sizes(cell))[2:]))
    heads = ["pass", "dtype", "M × N", *further, *(shown[n] for n in names), f"our memory / {operation.relative_to}'s"]
    title = f"`{operation.name}`, time relative to {operation.relative_to}'s"
    rows = []
    for cell in cells:
        shape = [f"{cell['M']:,} × {cell['N']:,}", *(str(cell[name]) for name in further)]
        times = [_time(cell, name, gpu) for name in names]
        rows.append([cell["mode"], cell["dtype"], *shape, *times, _memory(cell)])
    lines = costs.markdown(heads, rows, numbers=len(names) + 1)
    return [title + (", milliseconds in brackets:" if gpu else ":"), "", *lines, "", _in_words(cells, operation)]


def _in_words(cells: list[CellRow], operation: Operation) -> str:
    """Our least and our largest ratio of the table, and what its gaps mean."""

    def said(cell: CellRow) -> str:
        return f"{cell['M']:,} × {cell['N']:,} ({cell['mode']}, {cell['dtype']})"

    ratios = {
        i: entry["relative"]["median"]
        for i, cell in enumerate(cells)
        if "relative" in (entry := cell["contenders"].get("gssf", {}))
    }
    text = ""
    if ratios:
        least, most = min(ratios, key=lambda i: ratios[i]), max(ratios, key=lambda i: ratios[i])
        text = (
            f"gssf_triton takes {ratios[least]:.2f} of {operation.relative_to}'s time at {said(cells[least])} to "
            f"{ratios[most]:.2f} at {said(cells[most])}."
        )
    if len(ratios) < len(cells):
        text += f" {UNRELATED}: called once, for its memory and its errors; no ratio of times."
    return text.strip()


def error_table(run: Run, operation: Operation) -> list[str]:
    """The largest error of a result or a gradient, of every contender, where errors are part of what is compared."""
    if operation.bars is None:
        return []
    cells = [c for c in run["cells"].values() if c["operation"] == operation.name and c["mode"] == BOTH]
    cells = [c for c in cells if any("error" in entry for entry in c["contenders"].values())]
    cells.sort(key=lambda c: (list(operation.bars or ()).index(c["dtype"]), c["D"], c["M"]))
    names = [n for n in contender_names([operation.name]) if any(n in c["contenders"] for c in cells)]
    shown = labels(operation.name)
    heads = ["dtype", "M × N", "D", *(shown[n] for n in names), "ours may err"]
    rows = []
    for cell in cells:
        found = [cell["contenders"].get(name, {}).get("error") for name in names]
        errors = ["" if error is None else f"{error:.1e}" for error in found]
        size = [f"{cell['M']:,} × {cell['N']:,}", str(cell["D"])]
        rows.append([cell["dtype"], *size, *errors, f"{operation.bars[cell['dtype']]:g}"])
    title = f"`{operation.name}`, the largest relative error of the loss or a gradient against float64:"
    return [title, "", *costs.markdown(heads, rows, numbers=len(names) + 1)]


def pictured(run: Run) -> tuple[Operation, tuple[str, ...]]:
    """The operation whose pictures are shown, the run's first, and their kinds: of errors where errors are compared."""
    first = OPERATIONS[results.operations(run)[0]]
    return first, ("roofline", "relative") if first.bars is None else ("memory", "errors")


def pictures_of(run: Run, path: Path) -> list[Path]:
    """The pictures beside a run that are shown."""
    if not run["cells"]:
        return []
    first, kinds = pictured(run)
    prefix = results.picture_prefix(run, path, first.name)
    return sorted(p for kind in kinds for p in path.parent.glob(f"{prefix}{kind}*.png"))


def section(run: Run, path: Path, readme: Path) -> str:
    """One run's tables and pictures."""
    gpu = run["device"]["type"] == "cuda"
    versions, revision = run["versions"], run["commit"]["hash"]
    build = f"torch {versions['torch']}, Triton {versions['triton']}" if gpu else f"torch {versions['torch']}"
    at = f", commit {revision[:10]}{' with changes' if run['commit']['dirty'] else ''}" if revision else ""
    load = run["load_at_start"]
    busy = "" if gpu or load is None else f", load {load} at the start"
    folder = Path(os.path.relpath(path.parent, readme.parent)).as_posix()
    lines = [
        f"**{results.device_name(run)}**, {build}{at}{busy}, `--suite {run['suite']}`: medians of interleaved runs; "
        f"every shape, with its spread, is in [{path.name}]({folder}/{path.name})."
    ]
    for name in results.operations(run):
        lines += ["", *table(run, OPERATIONS[name])]
        if errors := error_table(run, OPERATIONS[name]):
            lines += ["", *errors]
    lines += [f"\n![{p.stem.replace('-', ' ')}]({folder}/{p.name})" for p in pictures_of(run, path)]
    return "\n".join(lines)


def _put(text: str, marks: tuple[str, str], content: str, readme: Path) -> str:
    """`text` with `content` between the marks, each of which must be there once."""
    begin, end = marks
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{readme} needs one {begin} and after it one {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def render(text: str, runs: list[Path], readme: Path) -> str:
    """`text` with the parts between the markers made anew; that of the costs may be missing.

    Raises:
        ValueError: markers are missing, double or out of order.
    """
    sections = [section(results.read(path), path.resolve(), readme) for path in runs]
    text = _put(text, RESULTS_MARKS, "\n\n".join(sections), readme)
    if any(mark in text for mark in COSTS_MARKS):
        text = _put(text, COSTS_MARKS, f"{costs.CONVENTIONS}\n\n{costs.table()}", readme)
    return text


def draw(paths: list[Path]) -> None:
    """The pictures that are shown of these runs, beside them."""
    for path in paths:
        if (run := results.read(path))["cells"]:
            first, kinds = pictured(run)
            results.draw(run, path, [first.name], kinds)


def main(argv: list[str] | None = None) -> int:
    console.ready()
    p = argparse.ArgumentParser(prog="perf/report.py", description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("runs", nargs="*", type=Path, help="runs to show (default: all; quick only without full)")
    p.add_argument("--readme", type=Path, default=ROOT / "README.md")
    p.add_argument("--check", action="store_true", help="write nothing; exit status 1 where it would change something")
    args = p.parse_args(argv)
    readme = args.readme.resolve()
    paths = args.runs or default_runs()
    try:
        if not args.check:
            check_output("--readme", readme, *args.runs)
        before = read_text(readme)
        after = render(before, paths, readme)
        if args.check:
            if before != after:
                print(f"{readme} is not what the runs say: python perf/report.py renders it", file=sys.stderr)
            return int(before != after)
        draw(paths)
        after = render(read_text(readme), paths, readme)  # drawing takes seconds, and pictures may be new
    except (OSError, ValueError, UsageError) as error:
        p.error(str(error))
    with replacing(readme) as file:
        file.write(after.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
